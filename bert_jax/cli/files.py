"""Commands for model files and for checking this machine: `info`, `convert`, `export`, `push`, `check` and `verify`."""

import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from bert_jax.cli.options import Ignore, Model, Revision, TaskOption, app, load_pipeline
from bert_jax.compilation import use_compilation_cache
from bert_jax.errors import HubUnreachableError, InputError, check_extra
from bert_jax.training import memory

if TYPE_CHECKING:
    pass


@app.command()
def info(model: Model, revision: Revision = None, ignore: Ignore = None) -> None:
    """Show a model's config, parameter counts and memory use, and which of its weights can be loaded."""
    import bert_jax
    from bert_jax import hub, processor, tree, weights
    from bert_jax.quantization import DTYPES, hold

    folder = hub.download(model, revision=revision)
    if hub.config_file(folder).name == hub.MERGED_CONFIG_FILE:
        raise InputError(
            f"{folder} contains adapters. Show the model of the run instead: bert-jax info {folder.parent}"
        )
    config = bert_jax.BertConfig.from_file(folder / hub.CONFIG_FILE)
    architecture = next((name for name in hub.architectures(folder) if name in bert_jax.__all__), "BertModel")
    console = Console()
    console.print(f"[bold]{model}[/bold]  {architecture}  {folder}", highlight=False, soft_wrap=True)
    table = Table("config", "", box=None, pad_edge=False)
    for key, value in config.to_dict().items():
        table.add_row(key, str(value))
    console.print(table)
    specs: dict[str, Any] = {}  # by dtype
    sizes: dict[str, Counter[str]] = {}  # bytes by part and by dtype
    for dtype in DTYPES:
        network = getattr(bert_jax, architecture)(config)
        hold(network.encoder, dtype)
        specs[dtype] = tree.split(network)[1].specs
        for path, spec in specs[dtype].items():
            part = ".".join(path.split(".")[: 2 if path.startswith("bert.") else 1])
            for row in (part, "all"):
                sizes.setdefault(row, Counter())[dtype] += spec.size * spec.dtype.itemsize
    sizes["all"] = sizes.pop("all")  # last
    table = Table("parameters", "", *(f"{dtype}, MB" for dtype in DTYPES), box=None, pad_edge=False)
    for row, size in sizes.items():
        table.add_row(row, f"{size['float32'] // 4:,}", *(f"{size[dtype] / 1e6:,.1f}" for dtype in DTYPES))
    console.print(table)
    for dtype in DTYPES[1:]:
        console.print(f"On this machine, {dtype} {processor.speed(dtype)}.", highlight=False, soft_wrap=True)
    sources, report = weights.plan(folder, specs["float32"], ignore=ignore or ())
    stored = ", ".join(sorted({source.dtype for source in sources.values()}))
    console.print(f"weights, stored as {stored}:\n{report}", highlight=False)


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(help="A folder with flax_model.msgpack or pytorch_model.bin.")],
    output: Annotated[
        Path, typer.Option(help="A new folder, or the model folder, to which model.safetensors is then added.")
    ],
    ignore: Ignore = None,
) -> None:
    """Convert Flax or PyTorch weights to safetensors, the format that this package loads."""
    from bert_jax.convert import convert as convert_folder

    print(f"{output} contains the weights of {convert_folder(model, output, ignore=ignore or ())}.")


@app.command()
def export(
    model: Model,
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    task: TaskOption = None,
    revision: Revision = None,
    ignore: Ignore = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Dtype of the large weights.")] = "float32",
) -> None:
    """Export a model as a program that JAX can run without this package, on CPUs, NVIDIA GPUs and TPUs."""
    from bert_jax import hub
    from bert_jax.tools.export import check_folder
    from bert_jax.tools.export import export as export_model

    check_folder(folder)  # fails now, not after the model is loaded
    _, pipe = load_pipeline(task, model, revision, ignore, dtype)
    embedding = None
    if pipe.task.name == "feature-extraction" and hub.find_modules(pipe.task.folder):
        embedding = pipe.task.declared(pipe.task.folder)
    export_model(pipe.model(pipe.params), folder, task=pipe.task.name, tokenizer=pipe.tokenizer, embedding=embedding)
    print(f"{folder} contains the program, its parameters and tokenizer, and run.py, which runs it with JAX alone.")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished run, or another folder with a model.")],
    repo_id: Annotated[str, typer.Argument(metavar="ID", help="The id of the model on the Hub, such as me/emotion.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Whether a new model is private. Default: the account's setting."),
    ] = None,
    commit_message: Annotated[
        str | None, typer.Option(help='First line of the commit message. Default: "Upload model".')
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch to upload to; it is created if it does not exist. Default: main.")
    ] = None,
) -> None:
    """Upload a model, its card and its metrics to the Hugging Face Hub. First run `hf auth login`, or set HF_TOKEN."""
    from bert_jax.upload import push_folder

    url = push_folder(folder, repo_id, private=private, commit_message=commit_message, revision=revision)
    print(f"The model in {folder} is uploaded: {url}")


@app.command()
def check(
    output: Annotated[Path | None, typer.Option(help="Folder for the report (check.json and check.md).")] = None,
) -> None:
    """Compare this machine's results with reference outputs and measure speed. Exit status: 1 if a result is wrong."""
    check_extra("train", "optax", "orbax", "grain")
    memory.keep_freed()
    use_compilation_cache()
    from bert_jax import hub
    from bert_jax.tools import check as checks

    if output:
        with hub.replacing(output):  # fails now, not after minutes, if the folder is not writable
            pass
    console, rows = Console(), []
    for part, found in itertools.groupby(checks.check(), key=lambda row: row.part):
        table = Table("", "", "found", "expected", title=part, title_justify="left")
        for row in found:
            rows.append(row)
            table.add_row(checks.MARKS[row.passed], row.what, row.found, row.expected)
        console.print(table)
    if output:
        with hub.replacing(output) as staging:
            (staging / "check.json").write_text(json.dumps([vars(row) for row in rows], indent=2), encoding="utf-8")
            (staging / "check.md").write_text(checks.markdown(rows), encoding="utf-8")
    if wrong := sum(row.passed is False for row in rows):
        print(f"bert-jax: {wrong} result{'s are' if wrong > 1 else ' is'} wrong.", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def verify(
    models: Annotated[
        list[str] | None, typer.Argument(help="Models with published outputs. Default: all such models.")
    ] = None,
) -> None:
    """Compare models' outputs with published ones. Exit status: 1 if an output differs, 2 if a model is missing."""
    use_compilation_cache()
    import jax

    from bert_jax.tools import verify as published

    console = Console()
    console.print(f"{jax.devices()[0].device_kind} ({jax.default_backend()}), float32, tolerance {published.TOLERANCE}")
    misses = missing = 0
    for model in models or published.MODELS:
        table = Table("", "expected", "got", "difference", title=model, title_justify="left")
        try:
            for check in published.verify(model):
                misses += not check.passed
                mark = "[green]✓[/green]" if check.passed else "[red]✗[/red]"
                table.add_row(f"{mark} {check.what}", check.expected, check.got, f"{check.difference:.1e}")
        except HubUnreachableError as error:
            missing += 1
            print(f"bert-jax: not verified: {error}", file=sys.stderr)
        else:
            console.print(table)
    if misses or missing:
        print(f"bert-jax: {misses} outputs differ, {missing} models not verified.", file=sys.stderr)
        raise typer.Exit(1 if misses else 2)
