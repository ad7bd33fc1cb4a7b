"""Fine-tuning: settings -> a folder with a model for a task, its metrics and its predictions."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from bert_jax.errors import InputError
from bert_jax.recipes.evaluation import evaluate_examples
from bert_jax.recipes.preparation import overview, prepare
from bert_jax.recipes.runs import ADAPTERS, ANSWERS, PREDICTIONS, begin, end, fit, is_finished, set_up, steps_of, write
from bert_jax.settings import Settings
from bert_jax.training import distributed, lora


def finetune(settings: Settings, *, console: Console | None = None) -> Path:
    """Fine-tunes a model and writes it, with its metrics and predictions, to `settings.output.folder`.

    After a kill, the same call resumes from the last checkpoint. After the end of the run, it does nothing.

    Returns:
        The folder.

    Raises:
        InputError: If the settings, the data or the folder cannot be used; the folder is left untouched.
        TrainingError: See `training.train`, which also raises the following errors.
        Interrupted: After Ctrl-C or SIGTERM.
        CheckpointError: If a file cannot be written.
    """
    console, began = console or Console(quiet=True), time.perf_counter()
    folder = Path(settings.output.folder)
    distributed.agree("The settings", settings.to_yaml)
    if is_finished(settings, console):
        return folder
    prepared = prepare(settings)
    console.print(overview(settings, prepared), highlight=False, markup=False)
    distributed.agree("The training examples", prepared.examples["train"].digest)
    train = prepared.examples["train"]
    steps = steps_of(settings, train)
    run = set_up(settings, prepared.task, prepared.model, train, steps)
    if "validation" in prepared.examples and not prepared.task.labelled(prepared.examples["validation"]):
        raise InputError(
            f"data.validation ({settings.data.validation}) has no labels, by which the best checkpoint would be "
            "chosen. Give it as data.test, or leave it out."
        )
    begin(settings)
    trained = fit(settings, run, steps, prepared.examples.get("validation"), console)
    results: dict[str, Any] = {"step": trained.step, "steps": trained.steps, "validation": trained.metrics}
    prepared.task.adopt(trained.metrics)
    split = "test" if "test" in prepared.examples else "validation"
    examples = prepared.examples.get(split)
    outputs: Mapping[str, Any] = {}
    if examples is not None:
        if split == "test" or trained.outputs is None:
            result = evaluate_examples(prepared.task, trained.model, examples, settings)
            results[split], outputs = result.metrics, result.outputs
        else:
            outputs = trained.outputs
            results[split] = trained.metrics | prepared.task.evaluate(outputs, examples)
    if not distributed.first():
        return folder
    trained.model.save_pretrained(folder)
    prepared.tokenizer.save_pretrained(folder)
    if settings.model.lora:
        assert run.plan.lora is not None
        lora.save_adapters(folder / ADAPTERS, trained.trained, run.plan.lora, settings.model.id,
                           prepared.task.peft_type)  # fmt: skip
    if examples is not None:
        results["predictions"] = split
        predictions = prepared.task.predictions(outputs, examples)
        lines = [row | {"prediction": p} for row, p in zip(prepared.rows[split], predictions, strict=True)]
        texts = [json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines]  # Parquet also has dates
        write(folder / PREDICTIONS, "".join(texts))
        if settings.task == "question-answering":  # the form that SQuAD's official scripts expect
            ids = [line["row"] - 1 if line.get("id") is None else line["id"] for line in lines]
            answers = {str(id): line["prediction"]["answer"] for id, line in zip(ids, lines, strict=True)}
            write(folder / ANSWERS, json.dumps(answers, ensure_ascii=False) + "\n")
    end(settings, results, settings.training.metric or prepared.task.metrics[0], began, console)
    return folder
