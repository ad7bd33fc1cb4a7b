"""Pretraining: settings and a corpus -> a model that fills masks."""

import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from bert_jax import tree, vocabulary
from bert_jax.config import BertConfig
from bert_jax.data import corpus
from bert_jax.data.masking import MaskedExamples, Masking
from bert_jax.errors import InputError
from bert_jax.model import BertPreTrainedModel
from bert_jax.recipes.preparation import describe, max_length
from bert_jax.recipes.runs import begin, end, fit, is_finished, set_up, steps_of
from bert_jax.settings import Pretraining
from bert_jax.tasks.base import check_pairs
from bert_jax.tasks.pretraining import MaskedLanguageModeling, PreTraining
from bert_jax.tokenizer import Tokenizer
from bert_jax.training import distributed

WORDS, BIAS, TRANSFORM = (
    "bert.embeddings.word_embeddings.weight", "predictions.bias", "predictions.transform.weight",
)  # fmt: skip


def pretrain(settings: Pretraining, *, console: Console | None = None) -> Path:
    """Pretrains a model and writes it, with its metrics, to `settings.output.folder`.

    After a kill, the same call resumes tokenization or training. After the end of the run, it does nothing.

    Returns:
        The folder.

    Raises:
        InputError: If the settings, the texts or the folder cannot be used.
        TrainingError: See `training.train`, which also raises the following errors.
        Interrupted: After Ctrl-C or SIGTERM.
        CheckpointError: If a shard is damaged, or a file cannot be written.
    """
    console, began = console or Console(quiet=True), time.perf_counter()
    folder = Path(settings.output.folder)
    distributed.agree("The settings", settings.to_yaml)
    if is_finished(settings, console):
        return folder
    source = settings.model.tokenizer or settings.model.id
    if source is None:
        raise InputError("model.tokenizer is not set; a network that begins anew needs a vocabulary.")
    tokenizer = Tokenizer.from_pretrained(source)
    examples = {split: read_corpus(settings, split, tokenizer, console) for split in ("train", "validation")}
    task = PreTraining() if settings.data.next_sentence else MaskedLanguageModeling()
    model, carried = starting_model(settings, tokenizer, task.model_class)
    max_length(settings, model.config)
    if settings.data.next_sentence:
        check_pairs(model.config)
    train = examples["train"]
    assert train is not None
    console.print(
        f"pretraining: {settings.model.id or 'a new network'}, {describe(model)}\n"
        f"examples: {len(train):,} of {int(train.lengths.sum()):,} tokens{carried}",
        highlight=False,
    )
    steps = steps_of(settings, train)
    run = set_up(settings, task, model, train, steps)
    begin(settings)
    trained = fit(settings, run, steps, examples["validation"], console)
    if not distributed.first():
        return folder
    trained.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    results = {"step": trained.step, "steps": trained.steps, "validation": trained.metrics}
    end(settings, results, settings.training.metric or task.metrics[0], began, console)
    return folder


def read_corpus(settings: Pretraining, split: str, tokenizer: Tokenizer, console: Console) -> MaskedExamples | None:
    """The examples of a split, or None if the split is not set. Missing shards are made first.

    Raises:
        InputError: See `corpus.tokenize`.
        CheckpointError: If a shard is damaged.
    """
    places = getattr(settings.data, split)
    if not places:
        return None
    folder = Path(settings.data.shards or f"{settings.output.folder}.shards") / split
    files = [Path(place) for place in ([places] if isinstance(places, str) else places)]
    if not distributed.first():
        distributed.wait(split)
    data, seed = settings.data, settings.training.seed
    shards = corpus.tokenize(
        files,
        folder,
        tokenizer,
        corpus.Layout(data.max_length, data.next_sentence, data.short),
        seed=seed,
        format=data.format,
        text=data.text,
        processes=data.processes,
        console=console,
    )
    if distributed.first():
        distributed.wait(split)
    if replaced := shards.manifest["replaced"]:
        console.print(f"data.{split}: {replaced:,} characters that are no UTF-8 are U+FFFD now.")
    return MaskedExamples.of(shards, tokenizer, Masking(**data.masked.model_dump()), seed)


def starting_model(settings: Pretraining, tokenizer: Tokenizer, model_class: Any) -> tuple[BertPreTrainedModel, str]:
    """The model that training begins with, and notes on it for the user.

    Raises:
        ConfigError: If model.config names an unknown field, or its values do not make a valid network.
        ModelNotFoundError: If there is no such checkpoint.
        CheckpointError: If the checkpoint does not fit; `model.new` names the parameters to reinitialise.
    """
    options: dict[str, Any] = {
        "compute_dtype": settings.precision.compute_dtype,
        "attention": settings.model.attention,
        "remat": settings.training.remat,
        "scan_layers": settings.training.scan_layers,
    }
    changes = dict(settings.model.config)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if (value := getattr(settings.model, name)) is not None:
            changes[name] = value
    rngs = nnx.Rngs(settings.training.seed)
    if settings.model.id is None:
        config = BertConfig.base_cased().replace(**{"vocab_size": tokenizer.vocab_size, **changes})
        return model_class(config, rngs=rngs, **options), ""
    model = model_class.from_pretrained(
        settings.model.id,
        revision=settings.model.revision,
        new=settings.model.new,
        ignore=settings.model.ignore,
        rngs=rngs,
        **options,
        **changes,
    )
    params, skeleton = tree.split(model)
    flat, notes = tree.flatten(params), ""
    if TRANSFORM in tree.select(settings.model.new, flat):
        # With a pretrained encoder, an identity transform is a better start than a random one.
        flat[TRANSFORM] = jnp.eye(model.config.hidden_size)
    before = Tokenizer.from_pretrained(settings.model.id, revision=settings.model.revision)
    if before.backend.get_vocab() != tokenizer.backend.get_vocab():
        sources, counts = vocabulary.carry(before, tokenizer)
        flat |= {path: jnp.asarray(vocabulary.rows(np.asarray(flat[path]), sources)) for path in (WORDS, BIAS)}
        config = model.config.replace(vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_token_id)
        _, skeleton = tree.split(model_class(config, **options))
        notes = "\nvocabulary: " + ", ".join(f"{n:,} {how}" for how, n in counts.items())
    return tree.merge(skeleton, tree.unflatten(flat)), notes
