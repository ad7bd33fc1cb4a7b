"""Human-readable reports on runs and evaluations: learning curves, tables, figures and model cards."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bert_jax.tools.figure import Figure

HUB_METRICS = {
    "accuracy": "accuracy", "exact_match": "exact_match", "f1": "f1", "matthews": "matthews_correlation",
    "pearson": "pearsonr", "spearman": "spearmanr", "precision": "precision", "recall": "recall", "mse": "mse",
    "perplexity": "perplexity",
}  # fmt: skip
"""Maps parts of this package's metric names to the corresponding metric names on the Hugging Face Hub."""
EXAMPLES = {
    "text-classification": '"I am glad that it works."',
    "token-classification": '"Anna moved to Oslo."',
    "question-answering": '{"question": "Where did Anna move?", "context": "Anna moved to Oslo."}',
    "multiple-choice": '{"context": "She opened the door.", "choices": ["She went in.", "It was a Monday."]}',
    "fill-mask": '"Paris is the [MASK] of France."',
}
"""An example input for each task, as Python code."""
TRANSFORMERS = {
    "question-answering": """\
tokenizer = transformers.AutoTokenizer.from_pretrained(model)
network = transformers.AutoModelForQuestionAnswering.from_pretrained(model)
inputs = tokenizer("Where did Anna move?", "Anna moved to Oslo.", return_tensors="pt")
out = network(**inputs)
tokenizer.decode(inputs["input_ids"][0, out.start_logits.argmax() : out.end_logits.argmax() + 1])""",
    "multiple-choice": """\
tokenizer = transformers.AutoTokenizer.from_pretrained(model)
network = transformers.AutoModelForMultipleChoice.from_pretrained(model)
choices = ["She went in.", "It was a Monday."]
inputs = tokenizer(["She opened the door."] * 2, choices, padding=True, return_tensors="pt")
network(**{name: tensor[None] for name, tensor in inputs.items()}).logits.softmax(-1)""",
}
"""Example code for the tasks for which `transformers` 5 has no pipeline."""
CLASSES = {"by_frequency": "times in the texts", "by_position": "position in the row"}


def learning_curve(
    journal: Sequence[Mapping[str, Any]], metric: str, *, best: int | None = None, unit: str = "nats"
) -> "Figure":
    """Plots the training and validation losses by step and, on a second axis, the validation metric.

    Args:
        journal: The lines of a run's `metrics.jsonl` file, as returned by `read_journal`. Step 0 refers to the model
            before training.
        metric: The validation metric to plot.
        best: The step to mark as the best; None for no mark.
        unit: The unit of the loss.
    """
    from bert_jax.tools.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=f"loss ({unit})")
    steps = [line for line in journal if "loss" in line]
    axes.plot([line["step"] for line in steps], [line["loss"] for line in steps], color="0.7", label="training loss")
    if tested := [line for line in journal if "validation" in line]:
        x = [line["step"] for line in tested]
        axes.plot(x, [line["validation"]["loss"] for line in tested], "o-", color="C0", label="validation loss")
        if metric != "loss":
            right, label = axes.twinx(), f"validation {metric}"
            right.set_ylabel(f"{label} ({unit})" if metric == "mse" or metric.endswith("loss") else label)
            right.plot(x, [line["validation"][metric] for line in tested], "s-", color="C1", label=label)
            _show_shares(right, metric)
    if best is not None:
        axes.axvline(best, color="0.7", linestyle=":", zorder=0, label=f"best: step {best}")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def _show_shares(axes: Any, metric: str) -> None:
    """Scales the vertical axis from 0 to 100% if the metric is a share, such as accuracy."""
    from matplotlib.ticker import PercentFormatter

    if re.search("accuracy|f1|precision|recall|exact_match", metric):
        axes.set_ylim(0, 1.02)  # room for the markers of a perfect score
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))


def markdown(metrics: Mapping[str, Any]) -> str:
    """Formats metrics as Markdown.

    The first table contains the scalar metrics. Per-class scores and the confusion matrix, if available, are in
    separate tables.
    """
    names = {"f1": f"f1 of {metrics['f1_label']}"} if "f1_label" in metrics else {}
    numbers = {names.get(name, name): value for name, value in metrics.items() if isinstance(value, int | float)}
    parts = [table(["metric", ""], [[name, f"{value:.4f}"] for name, value in numbers.items()])]
    if per_class := metrics.get("per_class"):
        columns = list(next(iter(per_class.values())))
        rows = [[name, *(_number(row[column]) for column in columns)] for name, row in per_class.items()]
        parts.append(table(["label", *columns], rows))
        if confusion := metrics.get("confusion"):
            rows = [[name, *map(str, counts)] for name, counts in zip(per_class, confusion, strict=True)]
            parts.append(table(["true \\ predicted", *per_class], rows))
    return "\n\n".join(parts)


def held_out_markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Formats the results of `held_out.evaluate` as Markdown.

    The first table contains the metrics and their confidence intervals, with one column per model. For `fill-mask`, two
    more tables contain the results by token frequency and by token position. For minimal pairs, another table contains
    the accuracy for each phenomenon.
    """
    first = next(iter(results.values()))
    rows = []
    for name, entry in first.items():
        found = [result[name] for result in results.values()]
        if isinstance(entry, Mapping):
            rows.append([name, *(f"{each['value']:.4f} ({each['low']:.4f}–{each['high']:.4f})" for each in found)])
        elif isinstance(entry, int):
            rows.append([name, *(f"{each:,}" for each in found)])
    parts = [table(["", *results], rows)]
    for name, what in CLASSES.items():
        if name in first:
            rows = [
                [model, _class(part), f"{part['tokens']:,}", f"{part['nll']:.4f}", f"{part['accuracy@1']:.4f}"]
                for model, result in results.items() for part in result[name]
            ]  # fmt: skip
            parts.append(table(["model", what, "tokens", "nll", "accuracy@1"], rows))
    if every := first.get("by_phenomenon"):
        rows = [
            [part["phenomenon"], f"{part['pairs']:,}", *(f"{result['by_phenomenon'][n]['accuracy']:.4f}"
                                                          for result in results.values())]
            for n, part in enumerate(every)
        ]  # fmt: skip
        parts.append(table(["phenomenon", "pairs", *results], rows))
    return "\n\n".join(parts)


def held_out_figure(results: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Plots the results of `held_out.evaluate`.

    For `fill-mask`, the figure shows the accuracy by token frequency and by token position, with one line per model.
    For `next-sentence-prediction` and minimal pairs, the figure shows the accuracy of each model with its confidence
    interval. A line at 50% marks the chance level.
    """
    from bert_jax.tools.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    names = [name for name in CLASSES if name in next(iter(results.values()))]
    for n, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), n, xlabel=CLASSES[name], ylabel="accuracy@1")
        every = {part["from"]: _class(part) for result in results.values() for part in result[name]}
        # An invisible line through all classes arranges them in ascending order on the horizontal axis.
        axes.plot([every[low] for low in sorted(every)], [0.0] * len(every), color="none")
        for model, result in results.items():
            parts = result[name]
            axes.plot([_class(part) for part in parts], [part["accuracy@1"] for part in parts], "o-", label=model)
        _show_shares(axes, "accuracy@1")
        axes.legend()
    if not names:
        axes = figure.add_subplot(ylabel="accuracy")
        for model, result in results.items():
            value, low, high = (result["accuracy"][key] for key in ("value", "low", "high"))
            around = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar([model], [value], around, fmt="o", capsize=4)
        axes.axhline(0.5, color="0.7")
        _show_shares(axes, "accuracy")
    return figure


def _class(part: Mapping[str, Any]) -> str:
    low, high = part["from"], part["to"]
    return f"{low}+" if high is None else f"{low}–{high}" if high > low else f"{low}"


def model_card(
    name: str,
    task: str,
    made: str,
    results: Mapping[str, Any],
    *,
    metadata: Mapping[str, Any],
    datasets: Mapping[str, Mapping[str, str | None]],
    settings: str,
) -> str:
    """Returns a model card (`README.md`) with metadata, a description, usage examples, metrics, and details of the run.

    The metadata follows the format of `ModelCardData` in `huggingface_hub`. It also includes the metrics, in the
    `model-index` field.

    Args:
        name: The name of the model.
        task: The Hugging Face name of the model's task.
        made: How the model was made; for example, "`bert-base-cased` fine-tuned for …".
        results: The contents of `results.json`.
        metadata: Arguments for `ModelCardData`, such as `license`, `language` and `base_model`.
        datasets: Maps each split to the `huggingface_hub.EvalResult` arguments that describe its data set. The names of
            these arguments begin with `dataset_`.
        settings: The settings of the run, as YAML.
    """
    from huggingface_hub import EvalResult, ModelCardData

    splits = {split: results[split] for split in ("validation", "test") if results.get(split)}
    measured = [
        EvalResult(task_type=task, metric_type=kind, metric_name=label, metric_value=value, **datasets[split])
        for split, metrics in splits.items()
        for kind, label, value in hub_metrics(metrics)
    ]
    index = {"model_name": name, "eval_results": measured} if measured else {}
    data = ModelCardData(pipeline_tag=task, library_name="transformers", tags=["bert", "jax"], **metadata, **index)
    versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
    stopped = f" (stopped early: {reason})" if (reason := results.get("stopped_early")) else ""
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"{made} with [bert_jax](https://pypi.org/project/bert-jax) {results['versions']['bert-jax']}.",
        "## Use",
        f"`model` is the id of this model on the Hub, or the path of its folder.\n\n{_snippets(name, task, results)}",
        *(f"## {split.capitalize()}\n\n{markdown(metrics)}" for split, metrics in splits.items()),
        "![learning curve](curve.png)",
        f"## Settings\n\nSettings that are not listed have their defaults.\n\n```yaml\n{settings}```",
        f"Step {results['step']} of {results['steps']}{stopped}, {results['seconds']:.0f} s on {results['device']}; "
        f"{versions}.",
    ]
    return "\n\n".join(parts) + "\n"


def hub_metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yields each metric's Hub name, its name in this package, and its value. Omits losses and non-finite values."""
    names = {"f1": f"f1 of {metrics['f1_label']}"} if "f1_label" in metrics else {}
    for name, value in metrics.items():
        kind = next((kind for part, kind in HUB_METRICS.items() if part in name), None)
        if kind and isinstance(value, float) and math.isfinite(value):
            yield kind, names.get(name, name), value


def _snippets(name: str, task: str, results: Mapping[str, Any]) -> str:
    """Returns example code that uses the model with `bert_jax` and with `transformers`."""
    example, options = EXAMPLES[task], ""
    threshold = results.get("validation", {}).get("null_threshold")
    if threshold is not None:
        options = f", null_threshold={threshold:.4f}"
    ours = f'pipe = bert_jax.pipeline("{task}", model)\npipe({example}{options})'
    if options:
        ours += '  # the answer "" means that there is none'
    theirs = TRANSFORMERS.get(task, f'pipe = transformers.pipeline("{task}", model)\npipe({example})')
    if (threshold := results.get("validation", {}).get("threshold")) is not None:
        # `threshold` is the score above which a label is predicted. Pipelines return scores and do not apply the
        # threshold.
        labels = f'[each["label"] for each in pipe({example}, top_k=None) if each["score"] > {threshold:.6g}]'
        ours, theirs = (code.replace(f"pipe({example})", labels) for code in (ours, theirs))
    return "\n\n".join(
        f'```python\nimport {package}\n\nmodel = "OWNER/{name}"\n{code}\n```'
        for package, code in (("bert_jax", ours), ("transformers", theirs))
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [header, ["---"] * len(header), *rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
