"""The command line: `bert-jax fill-mask | score | predict | serve | finetune | pretrain | evaluate | info | verify`.

Each command imports only what it needs.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bert_jax import __version__
from bert_jax.errors import BertJaxError, HubUnreachableError, Interrupted, check_extra, quoted
from bert_jax.hub import DEFAULT_MODEL
from bert_jax.training import memory

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from bert_jax.inference.pipelines import Pipeline
    from bert_jax.tasks.base import Task

FALLBACK_MODEL = "bert-mini-cased"
CACHE_VARIABLE = "BERT_JAX_COMPILATION_CACHE"

Processes = Annotated[
    str | None,
    typer.Option(
        help="The same command on several hosts: auto (TPU pods, SLURM), or i/n@host:port, the first's address."
    ),
]

Ignore = Annotated[
    list[str] | None,
    typer.Option(help=r"Tensors of the checkpoint to leave out, a regular expression: 'crf\..*'; may be given again."),
]

app = typer.Typer(
    help="BERT on JAX: the published checkpoints, number for number.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Compiled programs are kept in a cache; {CACHE_VARIABLE}=DIR moves it, {CACHE_VARIABLE}=off goes without.",
)


def main() -> None:
    """Entry point: a user's mistake prints one line to stderr and ends with exit status 2."""
    try:
        app()
    except Interrupted as error:
        print(f"bert-jax: {error}", file=sys.stderr)
        sys.exit(128 + error.signal)
    except BertJaxError as error:
        print(f"bert-jax: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("bert-jax: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, MemoryError) as error:  # such as a path too long, a locked folder, a batch of millions
        print(f"bert-jax: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command("fill-mask")
def fill_mask(
    text: Annotated[list[str], typer.Argument(help="Texts with [MASK] where a word is to be filled in.")],
    model: Annotated[
        str | None,
        typer.Option(help=f"Folder or Hub id; {DEFAULT_MODEL} or, where the Hub is out of reach, {FALLBACK_MODEL}."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    ignore: Ignore = None,
    top_k: Annotated[int | None, typer.Option(help="Fillings a mask: 5, or with targets all of them.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Score this word instead of the whole vocabulary; may be given again.")
    ] = None,
    joint: Annotated[bool, typer.Option("--joint", help="Fill all masks of a text together.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the model's name.")] = False,
) -> None:
    """Fill the [MASK]s of texts."""
    _use_compilation_cache()
    name, filler = _pipeline("fill-mask", model, revision, ignore)
    results = filler(text, top_k=top_k, targets=target, joint=joint)
    if as_json:
        print(json.dumps({"model": name, "inputs": text, "outputs": results}, ensure_ascii=False, indent=2))
        return
    console = _console()
    for entry, result in zip(text, results, strict=True):
        masks = [result] if isinstance(result[0], dict) else result
        for n, fillings in enumerate(masks):
            title = entry if len(masks) == 1 else f"{entry}  (mask {n + 1} of {len(masks)})"
            _print_fillings(console, title, fillings)


@app.command()
def score(
    file: Annotated[Path | None, typer.Argument(help="A request in JSON; stdin by default.")] = None,
    task: Annotated[str, typer.Option(help="By its name.")] = "fill-mask",
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; as for fill-mask by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    ignore: Ignore = None,
) -> None:
    """Answer a request of the model catalogue: {"inputs": {"input_string": ["…"]}, "parameters": {"top_k": 2}}."""
    from bert_jax.errors import InputError

    where = "stdin" if file is None else str(file)
    try:
        content = sys.stdin.buffer.read() if file is None else file.read_bytes()
        request = json.loads(content)
    except OSError as error:
        raise InputError(f"Cannot read {where}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    _use_compilation_cache()
    from bert_jax.inference import catalogue

    _, pipe = _pipeline(task, model, revision, ignore)
    print(json.dumps(catalogue.score(pipe, request), ensure_ascii=False))


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="Folder, Hub id, or bert-mini-cased.")],
    task: Annotated[
        str, typer.Option(help="fill-mask, text-classification, token-classification, question-answering, …")
    ],
    text: Annotated[list[str] | None, typer.Argument(help="Texts, instead of --input.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    ignore: Ignore = None,
    input: Annotated[
        list[Path] | None, typer.Option(help="JSONL, CSV, TSV, Parquet or text, perhaps gzipped; may be given again.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL, CSV (perhaps gzipped) or Parquet, by its name.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="The input's column; of pairs, given twice. Usual names by default.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="Of the inputs: jsonl, csv, tsv, parquet, text, text;label; by their names.")
    ] = None,
    shard: Annotated[str, typer.Option(help="i/n: each n-th row, beginning with the i-th.")] = "1/1",
    parameter: Annotated[list[str] | None, typer.Option(help="The task's own, name=value: top_k=2")] = None,
) -> None:
    """Predict texts, or files row by row; after a kill, the same command goes on."""
    import re

    from bert_jax.errors import InputError
    from bert_jax.yaml_file import assignments

    if bool(text) == bool(input) or bool(input) != bool(output):
        raise InputError("expected texts, or --input and --output.")
    if not (match := re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", shard)) or int(match[1]) > int(match[2]):
        raise InputError(f"--shard is {quoted(shard)}; expected i/n with i from 1 to n.")
    parameters = assignments(parameter or ())
    if input:
        memory.keep_freed(asynchronous=True)
    _use_compilation_cache()
    _, pipe = _pipeline(task, model, revision, ignore)
    from bert_jax.inference import catalogue, prediction

    if not input or not output:
        for result in pipe(text, **parameters):
            print(json.dumps(catalogue.jsonable(result), ensure_ascii=False))
        return
    console = _console()
    counts = prediction.predict_files(
        pipe, input, output, model=f"{model}@{revision}" if revision else model, columns=tuple(column or ()),
        format=format, shard=(int(match[1]), int(match[2])), parameters=parameters, console=console,
    )  # fmt: skip
    aside = f"; {counts.rejected:,} set aside in {output}.rejected.jsonl" if counts.rejected else ""
    programs = f"{len(pipe.programs)} programs"
    console.print(f"{output}: {counts.predicted:,} rows{aside} ({programs})", highlight=False, soft_wrap=True)


@app.command()
def finetune(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings, like configs/finetune/emotion.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value: training.epochs=1")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show settings, examples, shapes, memory and programs, and leave.")
    ] = False,
    processes: Processes = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="With --dry-run: chips to compile the step for, here or not: v5e:2x4, v6e:2x4, v5p:2x2x2, h100:8."
        ),
    ] = None,
) -> None:
    """Fine-tune a model; the same command goes on after a stop."""
    from bert_jax.errors import InputError
    from bert_jax.settings import Settings

    settings = Settings.from_file(config, overrides or ())  # before importing jax, so that mistakes show at once
    if target and not dry_run:
        raise InputError("--target goes with --dry-run: it says what to compile for, and nothing can run there.")
    if target:
        os.environ["JAX_PLATFORMS"] = "cpu"  # only compiles; programs for other chips cannot be cached
    memory.keep_freed()  # imports jax
    if not target:
        _use_compilation_cache()
    with _joined(processes) as console:
        from bert_jax import recipes

        if dry_run:
            found = recipes.dry_run(settings, target, console=console)
            console.print(found, highlight=False, markup=False, soft_wrap=True)
            return
        recipes.finetune(settings, console=console)


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings, like configs/pretrain/continue.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value: training.max_steps=1000")] = None,
    processes: Processes = None,
) -> None:
    """Pretrain a model on texts; the same command goes on after a stop."""
    from bert_jax.settings import Pretraining

    settings = Pretraining.from_file(config, overrides or ())
    memory.keep_freed()
    _use_compilation_cache()
    with _joined(processes) as console:
        from bert_jax import recipes

        recipes.pretrain(settings, console=console)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id, or bert-mini-cased.")],
    config: Annotated[Path, typer.Argument(help="The YAML file of settings that names the task and the data.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    beside: Annotated[
        list[str] | None, typer.Option(help="Of pretrained models: another, in the same table; may be given again.")
    ] = None,
    ignore: Ignore = None,
    split: Annotated[str | None, typer.Option(help="validation or test; the one of these that is set.")] = None,
    output: Annotated[Path | None, typer.Option(help="Leaves JSON, Markdown and PNG in this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's metrics on a data set."""
    from bert_jax.errors import InputError
    from bert_jax.settings import HELD_OUT_TASKS, HeldOut, read

    if split not in (None, "validation", "test"):
        raise InputError(f"--split is {quoted(split)}; expected validation or test.")
    settings = read(config, overrides or ())
    split = split or ("validation" if settings.data.validation else "test")
    if (beside or output) and not isinstance(settings, HeldOut):
        raise InputError(f"--beside and --output go with {' and '.join(HELD_OUT_TASKS)}.")
    memory.keep_freed(asynchronous=True)
    _use_compilation_cache()
    from rich.console import Console
    from rich.markdown import Markdown

    from bert_jax import hub, recipes
    from bert_jax.evaluation import held_out
    from bert_jax.tools import report

    if isinstance(settings, HeldOut):
        if output:
            check_extra("train", "matplotlib")
            with hub.replacing(output):  # checks now, not after the evaluation, that it is writable
                pass
        metrics = recipes.evaluate_held_out(
            [model, *(beside or ())], settings, split, ignore=ignore or (), console=Console(stderr=True)
        )
        markdown = report.held_out_markdown(metrics)
    else:
        metrics = recipes.evaluate(model, settings, split, ignore=ignore or (), console=Console(stderr=True))
        markdown = report.markdown(metrics)
    if as_json:
        print(json.dumps(metrics, indent=2))
    else:
        _console().print(Markdown(markdown))
    if output and isinstance(settings, HeldOut):  # last, because it may not be writable
        held_out.leave(output, settings.to_yaml(), metrics)


@app.command()
def serve(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub id; as for fill-mask by default.")] = None,
    config: Annotated[Path | None, typer.Argument(help="A YAML file of settings, like configs/serve.yaml.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="By its name, may be given again; the first at /score.")
    ] = None,
    ignore: Ignore = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at; this machine's own by default.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen at; 8000 by default.")] = None,
) -> None:
    """Answer over HTTP: the model catalogue's JSON at /score, typed bodies at /v1/…, and a page to look at."""
    from bert_jax.settings import Serving

    if model and not config and model.endswith((".yaml", ".yml")):
        config, model = Path(model), None
    given = {"model": model, "ignore": ignore, "tasks": task, "host": host, "port": port}
    changes = {name: value for name, value in given.items() if value is not None}
    tree = Serving.from_file(config).model_dump() if config else {}
    settings = Serving.from_dict(tree | changes, source=str(config or "serve"))
    check_extra("serve", "fastapi", "uvicorn", "prometheus_client")
    memory.keep_freed(asynchronous=True)
    _use_compilation_cache()
    from bert_jax import hub
    from bert_jax.inference import pipelines, server
    from bert_jax.inference.batcher import Limits
    from bert_jax.tasks import registry

    name, folder = _model(settings.model, settings.revision)
    # Published models have a next-sentence head but do not list it in their architectures.
    tasks = settings.tasks or [
        *(pipelines.tasks_of(hub.architectures(folder)) or ["fill-mask"]),
        "next-sentence-prediction",
    ]
    pipes: dict[str, Pipeline[Task]] = {}
    for task_name in dict.fromkeys(tasks):
        try:
            pipes[task_name] = pipelines.pipeline(
                registry.task_name(task_name), folder, ignore=settings.ignore, compute_dtype=settings.compute_dtype
            )
        except BertJaxError:
            if settings.tasks or not pipes:  # requested, or no task has loaded yet
                raise
    limits = Limits(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Limits)})
    server.serve(name, pipes, host=settings.host, port=settings.port, limits=limits)


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="Folder, Hub id, or bert-mini-cased.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    ignore: Ignore = None,
) -> None:
    """Show a model: config, parameters, memory, and what would load."""
    from rich.table import Table

    import bert_jax
    from bert_jax import hub, tree, weights

    folder = hub.download(model, revision=revision)
    config = bert_jax.BertConfig.from_file(folder / hub.CONFIG_FILE)
    known = [name for name in hub.architectures(folder) if name in bert_jax.__all__]
    architecture = known[0] if known else "BertModel"
    _, skeleton = tree.split(getattr(bert_jax, architecture)(config))
    console = _console()
    console.print(f"[bold]{model}[/bold]  {architecture}  {folder}", highlight=False, soft_wrap=True)
    table = Table("config", "", box=None, pad_edge=False)
    for key, value in config.to_dict().items():
        table.add_row(key, str(value))
    console.print(table)
    counts: dict[str, int] = {}
    for path, spec in skeleton.specs.items():
        part = ".".join(path.split(".")[: 2 if path.startswith("bert.") else 1])
        counts[part] = counts.get(part, 0) + spec.size
    table = Table("parameters", "", "float32", box=None, pad_edge=False)
    for part, count in [*counts.items(), ("all", sum(counts.values()))]:
        table.add_row(part, f"{count:,}", f"{count * 4 / 1e6:,.1f} MB")
    console.print(table)
    sources, report = weights.plan(folder, skeleton.specs, ignore=ignore or ())
    stored = ", ".join(sorted({source.dtype for source in sources.values()}))
    console.print(f"weights, stored as {stored}:\n{report}", highlight=False)


@app.command()
def verify(
    models: Annotated[
        list[str] | None, typer.Argument(help="Models with published outputs; all of them by default.")
    ] = None,
) -> None:
    """Compare with the published outputs of published checkpoints; exit status 1 on a miss."""
    _use_compilation_cache()
    import jax
    from rich.table import Table

    from bert_jax.tools import verify as published

    console = _console()
    console.print(f"{jax.devices()[0].device_kind} ({jax.default_backend()}), float32, tolerance {published.TOLERANCE}")
    misses, unreached = 0, []
    for model in models or published.MODELS:
        table = Table("", "expected", "got", "difference", title=model, title_justify="left")
        try:
            for check in published.verify(model):
                misses += not check.passed
                mark = "[green]✓[/green]" if check.passed else "[red]✗[/red]"
                table.add_row(f"{mark} {check.what}".replace("[MASK]", r"\[MASK]"), check.expected, check.got,
                              f"{check.difference:.1e}")  # fmt: skip
        except HubUnreachableError as error:
            unreached.append(model)
            print(f"bert-jax: not verified: {error}", file=sys.stderr)
            continue
        console.print(table)
    if misses or unreached:
        print(f"bert-jax: {misses} misses, {len(unreached)} models not verified.", file=sys.stderr)
        raise typer.Exit(1 if misses else 2)


def _pipeline(
    task: str, model: str | None, revision: str | None, ignore: list[str] | None
) -> tuple[str, "Pipeline[Task]"]:
    from bert_jax.inference import pipelines
    from bert_jax.tasks import registry

    name, folder = _model(model, revision)
    return name, pipelines.pipeline(registry.task_name(task), folder, ignore=ignore or ())


def _model(model: str | None, revision: str | None) -> tuple[str, Path]:
    """A model's name and folder; if the default model cannot be reached on the Hub, those of the embedded one."""
    from bert_jax import hub

    name = model or DEFAULT_MODEL
    try:
        folder = hub.download(name, revision=revision, timeout=10.0 if model else 3.0)
    except HubUnreachableError:
        if model or revision:
            raise
        print(f"bert-jax: {name} is not cached and the Hub does not answer: {FALLBACK_MODEL} does.", file=sys.stderr)
        folder = hub.download(name := FALLBACK_MODEL)
    return name, folder


def _print_fillings(console: "Console", title: str, fillings: list[dict[str, Any]]) -> None:
    """Prints a table with one bar per filling; bar lengths follow the scores, and the best score has a full bar."""
    from rich.bar import Bar
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for filling in fillings:
        words = filling["token_str"]
        row: list[RenderableType] = [Text(" · ".join(words) if isinstance(words, list) else words)]
        row.append(Bar(size=fillings[0]["score"], begin=0, end=filling["score"], width=30, color="cyan"))
        row.append(Text(f"{filling['score']:.4f}" if filling["score"] >= 5e-5 else f"{filling['score']:.1e}"))
        if "rank" in filling:
            row.append(Text(f"rank {filling['rank']}", "dim"))
        table.add_row(*row)
    console.print(Text(title, "bold"), table, "", sep="\n")


def _console(quiet: bool = False) -> "Console":
    from rich.console import Console

    return Console(quiet=quiet)


@contextlib.contextmanager
def _joined(given: str | None) -> Iterator["Console"]:
    """Joins the other processes, if there are any; yields the console, which only the first process writes to."""
    if given is None:
        yield _console()
        return
    from bert_jax.training import distributed

    distributed.start(given)
    try:
        with distributed.lost_ones_named():
            yield _console(quiet=not distributed.first())
    except Interrupted:
        raise
    except BertJaxError as error:
        print(f"bert-jax: {distributed.name()}: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # at once: JAX's normal exit waits for the other processes, which wait for this one


def _use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that the second run of a command does not compile."""
    place = os.environ.get(CACHE_VARIABLE) or str(
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bert_jax" / "programs"
    )
    # A program for several simulated devices can deadlock when it is loaded from the cache (jaxlib 0.10.2).
    if place == "off" or "--xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", place)
    # By default, JAX does not cache programs that compile in under a second, and most of ours do.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


if __name__ == "__main__":
    main()
