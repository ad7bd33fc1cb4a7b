"""Pretraining: trains a model on a corpus (`pretrain`) and evaluates models on held-out texts (`evaluate_held_out`)."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from bert_jax import distributed, sharding, tree, vocabulary
from bert_jax.config import BertConfig
from bert_jax.data import corpus
from bert_jax.data.masking import MaskedExamples, Masking
from bert_jax.errors import InputError
from bert_jax.evaluation import held_out
from bert_jax.pretrained import BertPreTrainedModel
from bert_jax.recipes import preparation, runs
from bert_jax.settings import HeldOut, Pretraining
from bert_jax.tasks.base import check_pairs
from bert_jax.tasks.pretraining import MaskedLanguageModeling, PreTraining
from bert_jax.tokenizer import Tokenizer

BIAS, TRANSFORM = "predictions.bias", "predictions.transform.weight"


def pretrain(settings: Pretraining, *, console: Console | None = None) -> Path:
    """Pretrains a model and writes the model and its metrics to `settings.output.folder`.

    If the run is interrupted, repeating the call with the same settings resumes tokenization or training. If the run is
    already finished, the call does nothing.

    Returns:
        The folder.

    Raises:
        InputError: If the settings, the texts or the output folder cannot be used.
        ConfigError: See `starting_model`.
        ModelNotFoundError: See `starting_model`.
        CheckpointError: If the weights of the checkpoint do not fit the model, if a shard is damaged, or if a file
            cannot be written.
        TrainingError: If the loss or an output is not finite.
        OutOfMemoryError: If a batch does not fit in memory.
        Interrupted: If the process receives Ctrl-C or SIGTERM. The state is saved.
    """
    console, began = console or Console(quiet=True), time.perf_counter()
    folder = Path(settings.output.folder)
    if runs.is_finished(settings, console):
        return folder
    source = settings.model.tokenizer or settings.model.id
    if source is None:
        raise InputError(
            "model.tokenizer is not set; a new network needs one. To continue from a checkpoint, set model.id."
        )
    tokenizer = Tokenizer.from_pretrained(source)
    preparation.add_tokens(tokenizer, settings)
    train = read_corpus(settings, "train", tokenizer, console)
    validation = read_corpus(settings, "validation", tokenizer, console) if settings.data.validation else None
    task = PreTraining() if settings.data.next_sentence else MaskedLanguageModeling()
    model, carried = starting_model(settings, tokenizer, task.model_class)
    preparation.max_length(settings, model.config)
    if settings.data.next_sentence:
        check_pairs(model.config)
    console.print(
        f"pretraining: {settings.model.id or 'a new network'}, {preparation.describe(model)}\n"
        f"examples: {len(train):,} of {int(train.lengths.sum()):,} tokens{carried}",
        highlight=False,
    )
    run = runs.set_up(settings, task, model, train, runs.steps_of(settings, train))
    trained = runs.fit(settings, run, validation, console)
    if distributed.first():
        runs.end(settings, run, trained, tokenizer, {}, began, console)
    return folder


def read_corpus(settings: Pretraining, split: str, tokenizer: Tokenizer, console: Console) -> MaskedExamples:
    """Reads the examples of a split from its shards. Missing shards are created first.

    Raises:
        InputError: See `corpus.tokenize`.
        CheckpointError: If a shard is damaged.
    """
    data, seed = settings.data, settings.training.seed
    places = getattr(data, split)
    if not distributed.first():
        distributed.wait(split)
    shards = corpus.tokenize(
        [Path(place) for place in ([places] if isinstance(places, str) else places)],
        Path(data.shards or f"{settings.output.folder}.shards") / split,
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
        console.print(f"data.{split}: {replaced:,} characters are not UTF-8 and were replaced by U+FFFD.")
    return MaskedExamples.of(shards, tokenizer, Masking(**data.masked.model_dump()), seed)


def starting_model(settings: Pretraining, tokenizer: Tokenizer, model_class: Any) -> tuple[BertPreTrainedModel, str]:
    """Returns the model with which training starts, and notes about this model for the user.

    Raises:
        ConfigError: If `model.config` names an unknown field, or if its values do not define a valid network.
        ModelNotFoundError: If the checkpoint `model.id` does not exist.
        CheckpointError: If the weights of the checkpoint do not fit the model. To initialize parameters that the
            checkpoint lacks, set `model.new`.
    """
    options = preparation.network_options(settings)
    changes = settings.model.config | settings.model.model_dump(include=preparation.DROPOUT, exclude_none=True)
    rngs = nnx.Rngs(settings.training.seed)
    precision = settings.precision.model_dump()
    if settings.model.id is None:
        config = BertConfig.base_cased().replace(**{"vocab_size": tokenizer.vocab_size, **changes})
        return model_class(config, rngs=rngs, **precision, **options), ""
    model = model_class.from_pretrained(
        settings.model.id,
        revision=settings.model.revision,
        new=settings.model.new,
        ignore=settings.model.ignore,
        rngs=rngs,
        **options,
        **changes,
    )
    model.encoder.compute_dtype = settings.precision.compute_dtype
    params, skeleton = tree.split(model)
    flat, notes = tree.flatten(params), ""
    if TRANSFORM in tree.select(settings.model.new, flat):
        # For a pretrained encoder, the identity is a better initial transform than random weights.
        flat[TRANSFORM] = jnp.eye(model.config.hidden_size)
    before = Tokenizer.from_pretrained(settings.model.id, revision=settings.model.revision)
    if before.backend.get_vocab() != tokenizer.backend.get_vocab():
        sources, counts = vocabulary.carry(before, tokenizer)
        flat |= {
            path: jnp.asarray(vocabulary.rows(np.asarray(flat[path]), sources)) for path in (preparation.WORDS, BIAS)
        }
        config = model.config.replace(vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_token_id)
        _, skeleton = tree.split(model_class(config, **precision, **options))
        notes = "\nembeddings: " + ", ".join(f"{n:,} {how}" for how, n in counts.items())
    return tree.merge(skeleton, tree.unflatten(flat)), notes


def evaluate_held_out(
    models: Sequence[str], settings: HeldOut, split: str, *, ignore: Sequence[str] = (), console: Console | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluates pretrained models on a split.

    For minimal pairs, returns the results of `held_out.minimal_pairs`; otherwise, returns those of `held_out.evaluate`.
    """
    rows = preparation.read_split(settings, split).rows
    if not rows:
        raise InputError(f"data.{split} is not set; expected texts.")
    texts = [row["text"] for row in rows]
    mesh = sharding.local(settings.mesh.model_dump()) if settings.mesh else None
    if settings.task == "minimal-pairs":
        return held_out.minimal_pairs(
            models,
            [(row["text"], row["text_pair"]) for row in rows],
            [row["label"] for row in rows] if "label" in rows[0] else None,
            metric=settings.metric,
            seed=settings.seed,
            resamples=settings.resamples,
            dtype=settings.dtype,
            mesh=mesh,
            ignore=ignore,
            console=console,
        )
    return held_out.evaluate(
        models,
        texts,
        task=settings.task,
        max_length=settings.data.max_length,
        **settings.masking.model_dump(),
        seed=settings.seed,
        resamples=settings.resamples,
        dtype=settings.dtype,
        mesh=mesh,
        ignore=ignore,
        console=console,
    )
