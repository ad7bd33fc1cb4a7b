"""The command line, `bert-jax`. Each command imports only what it needs."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bert_jax import __version__
from bert_jax.compilation import CACHE_VARIABLE, use_compilation_cache
from bert_jax.errors import BertJaxError, HubUnreachableError, InputError, Interrupted, check_extra, quoted
from bert_jax.hub import DEFAULT_MODEL
from bert_jax.training import memory

if TYPE_CHECKING:
    from bert_jax.inference.pipelines import Pipeline
    from bert_jax.settings import Serving
    from bert_jax.tasks.base import Task

FALLBACK_MODEL = "bert-mini-cased"
KEY_VARIABLE = "BERT_JAX_API_KEY"

Model = Annotated[str, typer.Argument(help=f"A model folder, an id on the Hub, or {FALLBACK_MODEL}.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help=f"A model folder or an id on the Hub. Default: {DEFAULT_MODEL}, or {FALLBACK_MODEL} if the former is not "
        "cached and the Hub does not answer."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help=r"Regular expression of checkpoint tensors to leave out, such as 'crf\..*'. Repeatable."),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "int8"],
    typer.Option(
        help="bfloat16 and int8 take less memory and, on some processors, less time; results change slightly."
    ),
]
MeshOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Size of an axis of the device mesh, such as data=4 or fsdp=2. Repeatable. Default: all accelerators "
        "of this machine share the rows."
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change, as section.key=value.")]
Processes = Annotated[
    str | None,
    typer.Option(
        help="Train with other processes. On a TPU pod or under SLURM or Open MPI: auto. Elsewhere: i/n@host:port for "
        "process i of n, with the address of process 1."
    ),
]

app = typer.Typer(
    help="BERT on JAX: the published checkpoints, reproduced number for number.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Compiled programs are cached. {CACHE_VARIABLE}=DIR moves the cache; {CACHE_VARIABLE}=off turns it off.",
)


def main() -> None:
    """Runs the command line.

    An error that the user can fix is printed to stderr without a traceback, and the exit status is 2. If a signal
    stopped a run, the exit status is 128 plus the number of the signal.
    """
    try:
        app()
    except (BertJaxError, OSError, MemoryError) as error:
        # A path that is too long raises an OSError; a batch that is too large raises a MemoryError.
        print(f"bert-jax: {error}", file=sys.stderr)
        sys.exit(128 + error.signal if isinstance(error, Interrupted) else 2)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command("fill-mask")
def fill_mask(
    text: Annotated[list[str], typer.Argument(help="Texts with [MASK] in place of the missing words.")],
    model: ModelOption = None,
    revision: Revision = None,
    ignore: Ignore = None,
    dtype: DtypeOption = "float32",
    top_k: Annotated[int | None, typer.Option(help="Fillings per mask. Default: 5, or one per --target.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Score only this word. Repeatable.")] = None,
    joint: Annotated[bool, typer.Option("--joint", help="Fill all masks of a text jointly, not one by one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the model's name.")] = False,
) -> None:
    """Fill the [MASK]s of texts."""
    name, filler = _pipeline("fill-mask", model, revision, ignore, dtype)
    results = filler(text, top_k=top_k, targets=target, joint=joint)
    if as_json:
        print(json.dumps({"model": name, "inputs": text, "outputs": results}, ensure_ascii=False, indent=2))
        return
    for entry, result in zip(text, results, strict=True):
        masks = [result] if isinstance(result[0], dict) else result
        for n, fillings in enumerate(masks):
            title = entry if len(masks) == 1 else f"{entry}  (mask {n + 1} of {len(masks)})"
            _print_fillings(title, fillings)


@app.command()
def score(
    file: Annotated[Path | None, typer.Argument(help="A JSON file with the request. Default: stdin.")] = None,
    task: Annotated[str, typer.Option(help="Name of the task.")] = "fill-mask",
    model: ModelOption = None,
    revision: Revision = None,
    ignore: Ignore = None,
    dtype: DtypeOption = "float32",
) -> None:
    """Answer a request in the catalogue's JSON: {"inputs": {"input_string": ["…"]}, "parameters": {"top_k": 2}}."""
    try:
        request = json.loads(file.read_bytes() if file else sys.stdin.buffer.read())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file or 'stdin'} is not JSON: {error}") from None
    _, pipe = _pipeline(task, model, revision, ignore, dtype)
    from bert_jax.inference import catalogue

    print(json.dumps(catalogue.score(pipe, request), ensure_ascii=False))


@app.command()
def predict(
    model: Model,
    task: Annotated[str, typer.Option(help="Name of the task: fill-mask, text-classification, …")],
    text: Annotated[list[str] | None, typer.Argument(help="Texts to predict. Give either texts or --input.")] = None,
    revision: Revision = None,
    ignore: Ignore = None,
    dtype: DtypeOption = "float32",
    mesh: MeshOption = None,
    input: Annotated[
        list[str] | None,
        typer.Option(help="Input file: JSONL, CSV, TSV, Parquet or text, optionally gzipped. Repeatable."),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Output file: .jsonl(.gz), .csv(.gz) or .parquet.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="Name of the input column. Repeat it for pairs. Default: the task's usual names."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="Input format: jsonl, json, csv, tsv, parquet, text or text;label. Default: by file name."),
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="Character between the cells of csv or tsv files.")] = None,
    quoting: Annotated[
        Literal["minimal", "none"] | None,
        typer.Option(
            help="minimal: cells may be enclosed in double quotes. none: quotes are text. Default: minimal for csv, "
            "none for tsv."
        ),
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(help="Column name, for files without a header line. Repeat the option for each column, in order."),
    ] = None,
    shard: Annotated[str, typer.Option(help="i/n: predict only every n-th row, starting with the i-th.")] = "1/1",
    parameter: Annotated[list[str] | None, typer.Option(help="Task parameter, such as top_k=2. Repeatable.")] = None,
    processes: Annotated[
        str | None,
        typer.Option(
            help="Share the rows with other processes, as in finetune: auto, or i/n@host:port. Process i of n writes "
            "to the output's name with -i-of-n."
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="ray: predict on a Ray cluster. The output is then a folder, here or in an object store."),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="Address of the Ray cluster, such as ray://host:10001 or auto. Default: start one here."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of Ray workers. Default: one per GPU or TPU chip, or one per 4 CPUs."),
    ] = None,
) -> None:
    """Predict texts, or the rows of files. To resume a run that was killed, repeat the command."""
    from bert_jax.yaml_file import assignments

    if bool(text) == bool(input) or bool(input) != bool(output):
        raise InputError("Give either texts, or --input and --output.")
    unsupported: dict[str, dict[str, Any]] = {
        "local": {"--address": address, "--workers": workers},
        "ray": {
            "TEXT": text, "--mesh": mesh, "--delimiter": delimiter, "--quoting": quoting, "--header": header,
            "--processes": processes, "--shard": None if shard == "1/1" else shard,
        },
    }  # fmt: skip
    if given := [name for name, value in unsupported[engine].items() if value]:
        raise InputError(f"{given[0]} is given, which --engine {engine} does not have.")
    if engine == "ray":
        check_extra("ray", "ray", "pyarrow")
        from bert_jax.inference import ray

        ray.predict(
            task, model, input or (), output or "", revision=revision, ignore=ignore or (), dtype=dtype,
            columns=tuple(column or ()), parameters=assignments(parameter or ()), format=format, address=address,
            workers=workers,
        )  # fmt: skip
        print(f"{output} contains the predictions. Rows that could not be used have the reason in `error`.")
        return
    parameters = assignments(parameter or ())
    if input:
        memory.keep_freed(asynchronous=True)
    (part, parts), output = _part_of_rows(shard, processes, output)
    _, pipe = _pipeline(task, model, revision, ignore, dtype, mesh)
    from bert_jax.data.formats import Table
    from bert_jax.inference import catalogue, prediction

    if not input or not output:
        for result in pipe(text, **parameters):
            print(json.dumps(catalogue.jsonable(result), ensure_ascii=False))
        return
    console = Console()
    counts = prediction.predict_files(
        pipe, input, output, model=f"{model}@{revision}" if revision else model, columns=tuple(column or ()),
        format=format, table=Table(delimiter, quoting, tuple(header or ())),
        shard=(part, parts), parameters=parameters, console=console,
    )  # fmt: skip
    rejected = f"; {counts.rejected:,} rejected, see {output}.rejected.jsonl" if counts.rejected else ""
    line = f"{output}: {counts.predicted:,} rows{rejected} ({len(pipe.programs)} programs)"
    console.print(line, highlight=False, soft_wrap=True)


@app.command()
def finetune(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings, such as configs/finetune/emotion.yaml.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show settings, examples, shapes, memory and programs; do not train.")
    ] = False,
    processes: Processes = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Chips for --dry-run to compile for, such as v5e:2x4 or h100:8. This machine need not have such chips."
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Seeds, such as 1,2,3: one run per seed, in output.folder/seed-1, …, and a table of means."),
    ] = None,
) -> None:
    """Fine-tune a model. To resume a run that was stopped, repeat the command."""
    from bert_jax.settings import Settings

    settings = Settings.from_file(config, overrides or ())
    if seeds is not None and (dry_run or processes):
        raise InputError(f"--seeds is given, which {'--dry-run' if dry_run else '--processes'} does not support.")
    if target:
        if not dry_run:
            raise InputError(f"--target is {quoted(target)}, but a target can only compile; add --dry-run.")
        import jax

        jax.config.update("jax_platforms", "cpu")  # the program is only compiled, so the CPU suffices
        os.environ[CACHE_VARIABLE] = "off"  # programs for other chips cannot be cached
    with _training(processes) as console:
        from bert_jax import recipes

        if dry_run:
            text = recipes.dry_run(settings, target, console=console)
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif seeds is not None:
            recipes.finetune_seeds(settings, recipes.read_seeds(seeds), console=console)
        else:
            recipes.finetune(settings, console=console)


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings, such as configs/pretrain/continue.yaml.")],
    overrides: Overrides = None,
    processes: Processes = None,
) -> None:
    """Pretrain a model on texts. To resume a run that was stopped, repeat the command."""
    from bert_jax.settings import Pretraining

    settings = Pretraining.from_file(config, overrides or ())
    with _training(processes) as console:
        from bert_jax import recipes

        recipes.pretrain(settings, console=console)


@app.command()
def evaluate(
    model: Model,
    config: Annotated[Path, typer.Argument(help="A YAML file of settings with the task and the data.")],
    overrides: Overrides = None,
    beside: Annotated[list[str] | None, typer.Option(help="Pretrained model to compare with. Repeatable.")] = None,
    ignore: Ignore = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "int8"] | None,
        typer.Option(help="Dtype of the large weights. Default: float32, or the setting `dtype`."),
    ] = None,
    split: Annotated[
        Literal["validation", "test"] | None,
        typer.Option(help="Split to evaluate. Default: validation if there is one, otherwise test."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results as JSON, Markdown and PNG files.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Show a model's metrics on a data set."""
    from bert_jax.settings import HELD_OUT_TASKS, HeldOut, read

    settings = read(config, overrides or ())
    if dtype and isinstance(settings, HeldOut):
        settings = settings.model_copy(update={"dtype": dtype})
    split = split or ("validation" if settings.data.validation else "test")
    if (beside or output) and not isinstance(settings, HeldOut):
        raise InputError(f"The task is {settings.task}; --beside and --output require {' or '.join(HELD_OUT_TASKS)}.")
    memory.keep_freed(asynchronous=True)
    use_compilation_cache()
    from rich.markdown import Markdown

    from bert_jax import hub, recipes
    from bert_jax.evaluation import held_out
    from bert_jax.tools import report

    progress = Console(stderr=True)
    if isinstance(settings, HeldOut):
        if output:
            check_extra("train", "matplotlib")
            with hub.replacing(output):  # fails now, not after the evaluation, if the folder is not writable
                pass
        models = [model, *(beside or ())]
        metrics = recipes.evaluate_held_out(models, settings, split, ignore=ignore or (), console=progress)
        markdown = report.held_out_markdown(metrics)
    else:
        metrics = recipes.evaluate(model, settings, split, dtype=dtype, ignore=ignore or (), console=progress)
        markdown = report.markdown(metrics)
    if as_json:
        print(json.dumps(metrics, indent=2))
    else:
        Console().print(Markdown(markdown))
    if output:  # last, so that the metrics are printed even if writing fails
        held_out.leave(output, settings.to_yaml(), metrics)


@app.command()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Model folders or Hub ids, and optionally a YAML file of settings, such as configs/serve.yaml. "
            "Default: as for fill-mask."
        ),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="NAME=MODEL: the name by which clients ask for a model. Repeatable.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Task to serve. Repeatable; the first is at /score.")] = None,
    ignore: Ignore = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "int8"] | None,
        typer.Option(help="Dtype of the large weights. Default: float32."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. Default: 8000.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="The key that clients must send. Better: BERT_JAX_API_KEY in the environment.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file that contains the key.")] = None,
    truncate: Annotated[
        bool | None, typer.Option("--truncate", help="Truncate texts to embed or rank that are too long.")
    ] = None,
    accept_token_ids: Annotated[
        bool | None, typer.Option("--accept-token-ids", help="Accept token ids instead of texts to embed.")
    ] = None,
) -> None:
    """Serve models over HTTP, in the formats of Azure's model catalogue, OpenAI and text-embeddings-inference."""
    from bert_jax.settings import Serving

    files = [given for given in models or () if given.endswith((".yaml", ".yml"))]
    if len(files) > 1:
        raise InputError(f"there are two settings files, {files[0]} and {files[1]}; expected at most one.")
    given = {
        "models": [given for given in models or () if given not in files] or None, "names": _names(name or ()) or None,
        "ignore": ignore, "dtype": dtype, "tasks": task, "host": host, "port": port,
        "api_key": os.environ.get(KEY_VARIABLE) if api_key is None and api_key_file is None else api_key,
        "api_key_file": api_key_file, "truncate": truncate, "accept_token_ids": accept_token_ids,
    }  # fmt: skip
    tree = Serving.from_file(files[0]).model_dump(exclude_unset=True) if files else {}
    if given["api_key"] is not None or api_key_file is not None:
        tree = {name: value for name, value in tree.items() if name not in ("api_key", "api_key_file")}
    tree |= {name: value for name, value in given.items() if value is not None}
    settings = Serving.from_dict(tree, source=files[0] if files else "serve")
    check_extra("serve", "fastapi", "uvicorn", "prometheus_client", "orjson", "fastapi_offline")
    memory.keep_freed(asynchronous=True)
    use_compilation_cache()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the server tokenizes in a thread of its own
    from bert_jax import sharding
    from bert_jax.inference.server import app as server
    from bert_jax.inference.server import models as served
    from bert_jax.inference.server.limits import Limits

    loaded = [
        served.load(
            settings.names.get(name, name), folder, tasks=settings.tasks, ignore=settings.ignore,
            dtype=settings.dtype, mesh=sharding.local(settings.mesh.model_dump()) if settings.mesh else None,
        )
        for name, folder in (_model(model, settings.revision) for model in settings.models or [None])
    ]  # fmt: skip
    limits = Limits(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Limits)})
    access = server.Access(_key(settings), settings.allowed_hosts, settings.allow_origins)
    server.serve(loaded, host=settings.host, port=settings.port, limits=limits, access=access)


def _part_of_rows(shard: str, processes: str | None, output: str | None) -> tuple[tuple[int, int], str | None]:
    """The part of the rows that this process predicts, as (i, n), and the name of its output."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", shard)
    if not match or int(match[1]) > int(match[2]):
        raise InputError(f"--shard is {quoted(shard)}; expected i/n with i from 1 to n.")
    if processes is None:
        return (int(match[1]), int(match[2])), output
    if not output or shard != "1/1":
        raise InputError("--processes shares the rows of --input; give it with --output and without --shard.")
    from bert_jax import distributed

    part, parts = distributed.number_among(processes)
    name, dot, ending = Path(output).name.partition(".")
    return (part, parts), str(Path(output).with_name(f"{name}-{part}-of-{parts}{dot}{ending}"))


def _key(settings: "Serving") -> str:
    """The key that clients of a server must send; empty if there is none."""
    key, source = settings.api_key, "the API key"
    if settings.api_key_file is not None:
        try:
            key, source = settings.api_key_file.read_text().strip(), f"the API key in {settings.api_key_file}"
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {settings.api_key_file}: {error}.") from None
    if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
        raise InputError(f"{source} is empty or has other characters than ASCII letters, digits and signs.")
    return key or ""


def _names(given: Sequence[str]) -> dict[str, str]:
    """Maps models to their names, from arguments such as NAME=MODEL."""
    pairs = [entry.partition("=") for entry in given]
    for entry, (name, equals, model) in zip(given, pairs, strict=True):
        if not (name and equals and model):
            raise InputError(f"--name is {quoted(entry)}; expected NAME=MODEL.")
    return {model: name for name, _, model in pairs}


@app.command()
def info(model: Model, revision: Revision = None, ignore: Ignore = None) -> None:
    """Show a model's config, parameters and memory, and which of its weights load."""
    import bert_jax
    from bert_jax import hub, processor, tree, weights
    from bert_jax.quantization import DTYPES, hold

    folder = hub.download(model, revision=revision)
    config = bert_jax.BertConfig.from_file(hub.config_file(folder))
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
    """Convert Flax or PyTorch weights to safetensors, which this package loads."""
    from bert_jax.convert import convert as convert_folder

    print(f"{output} contains the weights of {convert_folder(model, output, ignore=ignore or ())}.")


@app.command()
def export(
    model: Model,
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    task: Annotated[str, typer.Option(help="Name of the task: fill-mask, text-classification, …")],
    revision: Revision = None,
    ignore: Ignore = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Dtype of the large weights.")] = "float32",
) -> None:
    """Export a model as a program that JAX runs without this package, on CPUs, NVIDIA GPUs and TPUs."""
    from bert_jax import hub
    from bert_jax.tools.export import check_folder
    from bert_jax.tools.export import export as export_model

    check_folder(folder)  # fails now, not after the model is loaded
    _, pipe = _pipeline(task, model, revision, ignore, dtype)
    embedding = None
    if task == "feature-extraction" and hub.find_modules(pipe.task.folder):
        embedding = pipe.task.declared(pipe.task.folder)
    export_model(pipe.model(pipe.params), folder, task=task, tokenizer=pipe.tokenizer, embedding=embedding)
    print(f"{folder} contains the program, its parameters and tokenizer, and run.py, which runs it with JAX alone.")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished run, or another folder with a model.")],
    repo_id: Annotated[str, typer.Argument(metavar="ID", help="The id of the model on the Hub, such as me/emotion.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Whether a new model is private. Default: the account's.")
    ] = None,
    commit_message: Annotated[
        str | None, typer.Option(help='First line of the commit. Default: "Upload model".')
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to; it is created. Default: main.")] = None,
) -> None:
    """Upload a model, its card and its metrics to the Hugging Face Hub. First run `hf auth login`, or set HF_TOKEN."""
    from bert_jax.upload import push_folder

    url = push_folder(folder, repo_id, private=private, commit_message=commit_message, revision=revision)
    print(f"The model in {folder} is uploaded: {url}")


@app.command()
def check(
    output: Annotated[Path | None, typer.Option(help="Folder for the report as check.json and check.md.")] = None,
) -> None:
    """Compare this machine's results with reference outputs, and measure speed. Exit status: 1 if a result is wrong."""
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
    models: Annotated[list[str] | None, typer.Argument(help="Models with published outputs. Default: all.")] = None,
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


def _pipeline(
    task: str, model: ModelOption, revision: Revision, ignore: Ignore, dtype: DtypeOption, mesh: MeshOption = None
) -> tuple[str, "Pipeline[Task]"]:
    use_compilation_cache()
    from bert_jax import sharding
    from bert_jax.inference import pipelines
    from bert_jax.settings import Serving
    from bert_jax.tasks import registry
    from bert_jax.yaml_file import assignments

    sizes = Serving.from_dict({"mesh": assignments(mesh)}, source="--mesh").mesh if mesh else None
    devices = sharding.local(sizes.model_dump()) if sizes else None
    name, folder = _model(model, revision)
    return name, pipelines.pipeline(registry.task_name(task), folder, ignore=ignore or (), dtype=dtype, mesh=devices)


def _model(model: str | None, revision: str | None) -> tuple[str, Path]:
    """The name and folder of `model`, or of `DEFAULT_MODEL` if `model` is not given.

    If `DEFAULT_MODEL` is neither cached nor reachable, `FALLBACK_MODEL` takes its place, unless a revision is given.
    """
    from bert_jax import hub

    name = model or DEFAULT_MODEL
    try:
        return name, hub.download(name, revision=revision, timeout=10.0 if model else 3.0)
    except HubUnreachableError:
        if model or revision:
            raise
    print(f"bert-jax: {name} is not cached and the Hub does not answer; using {FALLBACK_MODEL}.", file=sys.stderr)
    return FALLBACK_MODEL, hub.download(FALLBACK_MODEL)


def _print_fillings(title: str, fillings: list[dict[str, Any]]) -> None:
    """Prints a table of fillings, each with a bar in proportion to its score. The first filling has a full bar."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for filling in fillings:
        words, probability = filling["token_str"], filling["score"]
        table.add_row(
            Text(" · ".join(words) if isinstance(words, list) else words),
            Bar(size=fillings[0]["score"], begin=0, end=probability, width=30, color="cyan"),
            Text(f"{probability:.4f}" if probability >= 5e-5 else f"{probability:.1e}"),
            *([Text(f"rank {filling['rank']}", "dim")] if "rank" in filling else []),
        )
    Console().print(Text(title, "bold"), table, "", sep="\n")


@contextlib.contextmanager
def _training(processes: str | None) -> Iterator[Console]:
    """Prepares training: keeps freed memory for reuse, caches compiled programs, and joins the other processes.

    Args:
        processes: The value of --processes; None for a single process.

    Yields:
        A console, which prints only in the first process.
    """
    memory.keep_freed()
    use_compilation_cache()
    if processes is None:
        yield Console()
        return
    from bert_jax import distributed

    distributed.start(processes)
    try:
        with distributed.lost_ones_named():
            yield Console(quiet=not distributed.first())
    except Interrupted:
        raise
    except BertJaxError as error:
        print(f"bert-jax: {distributed.name()}: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # at once: JAX's normal exit waits for the other processes, which wait for this one


if __name__ == "__main__":
    main()
