"""Measures how results in bfloat16 and int8 differ from results in float32, and prints Markdown tables.

    python scripts/precision.py --runs runs/emotion_1 runs/wnut17_1 --texts reviews.txt --embeddings sentence-model

--runs        folders of finished fine-tuning runs, whose models are evaluated on the validation data: the metric, the
              difference with a 95% interval from the paired bootstrap over examples (Efron 1979), how many decisions
              (labels, tags, answers) are equal, and for how many examples all decisions are equal
--texts       a file of texts, one per line; the negative log-likelihood of masked tokens in them is measured with the
              model given by --model
--fillings    a file of texts with one [MASK] each, one per line; the same model predicts the three most likely tokens
--embeddings  a model whose sentence embeddings of the same texts are compared by their cosine similarity
"""

import argparse
import json
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import numpy as np

import bert_jax
from bert_jax.evaluation import held_out, metrics
from bert_jax.quantization import DTYPES
from bert_jax.recipes import finetuning, preparation, runs
from bert_jax.settings import Settings
from bert_jax.tasks.registry import TASKS

RESAMPLES = 2000


def counts_of(task: str, row: Mapping[str, Any], prediction: Mapping[str, Any]) -> tuple[float, float]:
    """Returns the numbers that an example adds to the numerator and the denominator of its metric (accuracy or F1)."""
    if task == "text-classification":
        return float(prediction["label"] == row["label"]), 1.0
    if task == "token-classification":
        truth, found = (set(metrics.entities(tags)) for tags in (row["tags"], prediction["tags"]))
        return 2.0 * len(truth & found), float(len(truth) + len(found))
    return metrics.answering([row["answers"]["text"]], [prediction["answer"]])["f1"], 1.0


def decisions(prediction: Mapping[str, Any]) -> list[str]:
    """Returns the tags of a text, or its only label or answer."""
    tags: list[str] | None = prediction.get("tags")
    return [prediction.get("label", prediction.get("answer", ""))] if tags is None else tags


def predicted(folder: Path, settings: Settings, dtype: Any) -> tuple[list[Any], list[Any]]:
    """Returns the rows of a run's validation data, and the predictions of the run's model in `dtype`."""
    task_class = TASKS[settings.task]
    loaded = preparation.read_split(settings, "validation")
    rows, _ = task_class.clean({"validation": loaded.rows}, preparation.read_options(settings))
    model = task_class.model_class.from_pretrained(folder, dtype=dtype)
    tokenizer = bert_jax.Tokenizer.from_pretrained(folder)
    task = preparation.make_task(settings, tokenizer, preparation.named(model.config, settings, loaded.labels))
    task = task.tuned(json.loads((folder / runs.RESULTS).read_text())["validation"])
    examples = preparation.featurize(task, rows)["validation"]
    found = finetuning.evaluate_examples(task, model, examples, settings)
    return rows["validation"], task.predictions(found.outputs, examples)


def compare_run(folder: Path) -> None:
    settings = Settings.from_file(folder / runs.SETTINGS)
    exact: tuple[np.ndarray, list[list[str]]] | None = None
    for dtype in DTYPES:
        rows, predictions = predicted(folder, settings, dtype)
        counts = np.array([counts_of(settings.task, *pair) for pair in zip(rows, predictions, strict=True)])
        made = [decisions(prediction) for prediction in predictions]
        exact = exact or (counts, made)
        random = np.random.default_rng(0)
        drawn = random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), RESAMPLES)
        (right, of), (right_before, of_before) = (drawn @ counts).T, (drawn @ exact[0]).T
        low, high = np.percentile(100 * (right / of - right_before / of_before), [2.5, 97.5])
        value, before = (100 * column.sum(axis=0)[0] / column.sum(axis=0)[1] for column in (counts, exact[0]))
        equal = [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(made, exact[1], strict=True)]
        row = f"{folder.name}, {len(rows):,} examples", dtype, f"{value:.2f}"
        print(
            f"| {' | '.join(row)} | {value - before:+.2f} ({low:+.2f} to {high:+.2f}) "
            f"| {np.mean(list(chain.from_iterable(equal))):.2%} | {np.mean([all(row) for row in equal]):.2%} |",
            flush=True,
        )


def compare_texts(model: str, texts: list[str]) -> None:
    before = None
    for dtype in DTYPES:
        nll = held_out.evaluate([model], texts, dtype=dtype)[model]["nll"]["value"]
        before = nll if before is None else before
        print(f"| {model}, NLL of masked tokens, {len(texts):,} texts | {dtype} | {nll:.4f} | {nll - before:+.4f} | |")


def compare_embeddings(model: str, texts: list[str]) -> None:
    exact = None
    for dtype in DTYPES:
        pipe = bert_jax.pipeline("feature-extraction", model, dtype=dtype)
        vectors = np.array(pipe(texts, pooling="auto"))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        exact = vectors if exact is None else exact
        cosines = (vectors * exact).sum(axis=1)
        what = f"{Path(model).name}, cosine to float32, {len(texts):,} texts"
        print(f"| {what} | {dtype} | mean {cosines.mean():.5f} | least {cosines.min():.5f} | |", flush=True)


def compare_fillings(model: str, texts: list[str]) -> None:
    columns = []
    for dtype in DTYPES:
        found = bert_jax.pipeline("fill-mask", model, dtype=dtype)(texts, top_k=3)
        columns.append([", ".join(f"{f['token_str']} {f['score']:.3f}" for f in fillings) for fillings in found])
    print(f"\n| {model} | {' | '.join(DTYPES)} |\n|---|{'---|' * len(DTYPES)}")
    for row in zip(texts, *columns, strict=True):
        print(f"| {' | '.join(row)} |")


def lines_of(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("--texts", type=Path, metavar="FILE")
    parser.add_argument("--fillings", type=Path, metavar="FILE")
    parser.add_argument("--model", default="bert-mini-cased")
    parser.add_argument("--embeddings", metavar="MODEL")
    arguments = parser.parse_args()
    if arguments.embeddings and not arguments.texts:
        parser.error("--embeddings needs --texts")
    print("| | dtype | value | difference | equal decisions | equal examples |\n|---|---|---|---|---|---|")
    for folder in arguments.runs:
        compare_run(folder)
    if arguments.texts:
        texts = lines_of(arguments.texts)
        compare_texts(arguments.model, texts)
        if arguments.embeddings:
            compare_embeddings(arguments.embeddings, texts)
    if arguments.fillings:
        compare_fillings(arguments.model, lines_of(arguments.fillings))


if __name__ == "__main__":
    main()
