"""Metrics of models on labelled rows, or on texts that the models have not seen."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bert_jax import attention, sharding, tree
from bert_jax.data.loader import Examples
from bert_jax.errors import InputError, check_extra
from bert_jax.evaluation import held_out, measure
from bert_jax.model import BertPreTrainedModel
from bert_jax.recipes.preparation import featurize, make_task, named, read_options, read_split
from bert_jax.recipes.runs import RESULTS
from bert_jax.settings import HeldOut, Settings
from bert_jax.tasks.base import TrainableTask
from bert_jax.tasks.registry import TASKS
from bert_jax.tokenizer import Tokenizer


def evaluate(
    model_id: str, settings: Settings, split: str, *, ignore: Sequence[str] = (), console: Console | None = None
) -> dict[str, Any]:
    """Evaluates a fine-tuned model on a split of the settings' data.

    Values that the model's run found on validation, such as a threshold, are applied.

    Args:
        model_id: A folder or an id on the Hub.
        settings: Give the data, the length of examples and the batch size.
        split: "validation" or "test".
        ignore: Regular expressions of tensors in the checkpoint that are left out.
        console: Shows notes on the data; None shows nothing.

    Returns:
        The metrics.

    Raises:
        InputError: If the split is not set, has no labels, or has labels that the model does not have.
        CheckpointError: If the model has no head for the task.
    """
    check_extra("train", "sklearn")
    loaded = read_split(settings, split)
    rows = loaded.rows
    if not rows:
        raise InputError(f"data.{split} is not set.")
    task_class = TASKS[settings.task]
    found = task_class.clean({split: rows}, read_options(settings))
    tokenizer = Tokenizer.from_pretrained(model_id)
    model = task_class.model_class.from_pretrained(
        model_id, ignore=ignore, compute_dtype=settings.precision.compute_dtype
    )
    task = make_task(settings, tokenizer, named(model.config, settings, loaded.labels))
    examples = featurize(task, {split: rows})[split]
    if not task.labelled(examples):
        raise InputError(f"data.{split} has no labels; `bert-jax predict` does without.")
    if (results := Path(model_id) / RESULTS).is_file():
        task.adopt(json.loads(results.read_text(encoding="utf-8"))["validation"])
    if console and found:
        console.print(found, highlight=False, markup=False)
    return evaluate_examples(task, model, examples, settings).metrics


def evaluate_held_out(
    models: Sequence[str], settings: HeldOut, split: str, *, ignore: Sequence[str] = (), console: Console | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluates pretrained models on the texts of a split and returns model -> measures; see `held_out.evaluate`."""
    texts = [row["text"] for row in read_split(settings, split).rows]
    if not texts:
        raise InputError(f"data.{split} is not set.")
    return held_out.evaluate(
        models,
        texts,
        task=settings.task,
        max_length=settings.data.max_length,
        words=settings.masking.words,
        share=settings.masking.share,
        seed=settings.seed,
        resamples=settings.resamples,
        compute_dtype=settings.precision.compute_dtype,
        ignore=ignore,
        console=console,
    )


def evaluate_examples(
    task: TrainableTask, model: BertPreTrainedModel, examples: Examples, settings: Settings
) -> measure.Evaluation:
    """Evaluates a loaded model on examples."""
    mesh = sharding.mesh(**settings.mesh.model_dump())
    params, skeleton = tree.split(model)
    flat = tree.flatten(params)
    params = tree.unflatten(sharding.put(flat, sharding.placements(mesh, flat)))
    return measure.evaluate(
        task,
        measure.program(task, skeleton),
        params,
        examples,
        batch_size=settings.training.evaluation_batch_size,
        packing=model.config.max_position_embeddings if settings.data.packing else None,
        multiple=attention.multiple(model.encoder.attention),
        mesh=mesh,
    )
