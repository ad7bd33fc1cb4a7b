"""Commands that use models: `fill-mask`, `score`, `predict` and `serve`."""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bert_jax.cli.options import (
    KEY_VARIABLE,
    DtypeOption,
    Ignore,
    MeshOption,
    Model,
    ModelOption,
    Revision,
    TaskOption,
    app,
    find_model,
    find_task,
    load_pipeline,
)
from bert_jax.compilation import use_compilation_cache
from bert_jax.errors import InputError, check_extra, quoted
from bert_jax.training import memory

if TYPE_CHECKING:
    from bert_jax.server_settings import Serving


@app.command("fill-mask")
def fill_mask(
    text: Annotated[list[str], typer.Argument(help="Texts with [MASK] in place of the missing words.")],
    model: ModelOption = None,
    revision: Revision = None,
    ignore: Ignore = None,
    dtype: DtypeOption = "float32",
    top_k: Annotated[
        int | None, typer.Option(help="Number of predictions per mask. Default: 5, or one per --target.")
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="Score only this word. Repeatable.")] = None,
    joint: Annotated[bool, typer.Option("--joint", help="Predict all masks of a text jointly.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the model's name.")] = False,
) -> None:
    """Predict the masked words in texts."""
    name, filler = load_pipeline("fill-mask", model, revision, ignore, dtype)
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
    """Answer a request in the JSON format of Azure's model catalog.

    For example, a request can be {"inputs": {"input_string": ["…"]}, "parameters": {"top_k": 2}}.
    """
    try:
        request = json.loads(file.read_bytes() if file else sys.stdin.buffer.read())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file or 'stdin'} is not JSON: {error}") from None
    _, pipe = load_pipeline(task, model, revision, ignore, dtype)
    from bert_jax.inference import catalog

    print(json.dumps(catalog.score(pipe, request), ensure_ascii=False))


@app.command()
def predict(
    model: Model,
    task: TaskOption = None,
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts to make predictions for. Give either texts or --input.")
    ] = None,
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
        typer.Option(help="Name of the input column. Repeat the option for pairs. Default: the task's usual names."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="Input format: jsonl, json, csv, tsv, parquet, text or text;label. Default: inferred from the file "
            "name."
        ),
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="Character between the cells of CSV or TSV files.")] = None,
    quoting: Annotated[
        Literal["minimal", "none"] | None,
        typer.Option(
            help="minimal: cells may be enclosed in double quotes. none: quotes are ordinary characters. Default: "
            "minimal for CSV, none for TSV."
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
            help="Share the rows with other processes, as in finetune: auto, or i/n@host:port. Process i of n adds "
            "-i-of-n to the name of its output file."
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="ray: predict on a Ray cluster. The output is then a folder, on disk or in an object store."),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of the Ray cluster, such as ray://host:10001 or auto. Default: start a local cluster."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of Ray workers. Default: one per GPU or TPU chip, or one per 4 CPUs."),
    ] = None,
) -> None:
    """Make predictions for texts or for the rows of files. To resume an interrupted run, repeat the command."""
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
            task or find_task(*find_model(model, revision)), model, input or (), output or "", revision=revision,
            ignore=ignore or (), dtype=dtype, columns=tuple(column or ()), parameters=assignments(parameter or ()),
            format=format, address=address, workers=workers,
        )  # fmt: skip
        print(f"{output} contains the predictions. Rows that could not be used have the reason in `error`.")
        return
    parameters = assignments(parameter or ())
    if input:
        memory.keep_freed(asynchronous=True)
    (part, parts), output = _part_of_rows(shard, processes, output)
    _, pipe = load_pipeline(task, model, revision, ignore, dtype, mesh)
    from bert_jax.data.formats import Table
    from bert_jax.inference import catalog, prediction

    if not input or not output:
        for result in pipe(text, **parameters):
            print(json.dumps(catalog.jsonable(result), ensure_ascii=False))
        return
    console = Console()
    counts = prediction.predict_files(
        pipe, input, output, model=f"{model}@{revision}" if revision else model, columns=tuple(column or ()),
        format=format, table=Table(delimiter, quoting, tuple(header or ())),
        shard=(part, parts), parameters=parameters, console=console,
    )  # fmt: skip
    rejected = f"; {counts.rejected:,} rejected, see {output}.rejected.jsonl" if counts.rejected else ""
    console.print(f"{output}: {counts.predicted:,} rows{rejected}", highlight=False, soft_wrap=True)


@app.command()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Model folders or Hub ids, and optionally a YAML settings file, such as configs/serve.yaml. "
            "Default: the same model as for fill-mask."
        ),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="NAME=MODEL: the name under which clients request a model. Repeatable.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Task to serve. Repeatable; the first task is served at /score.")
    ] = None,
    ignore: Ignore = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "int8"] | None,
        typer.Option(help="Dtype of the large weights. Default: float32."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. Default: 8000.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="The API key that clients must send. Better: set BERT_JAX_API_KEY in the environment."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file that contains the API key.")] = None,
    truncate: Annotated[
        bool | None, typer.Option("--truncate", help="Truncate texts that are too long when embedding or ranking.")
    ] = None,
    accept_token_ids: Annotated[
        bool | None, typer.Option("--accept-token-ids", help="Accept token ids instead of texts for embedding.")
    ] = None,
) -> None:
    """Serve models over HTTP, in the formats of Azure's model catalog, OpenAI and text-embeddings-inference."""
    from bert_jax.server_settings import Serving

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
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the server tokenizes in a separate thread
    from bert_jax import sharding
    from bert_jax.inference.server import app as server
    from bert_jax.inference.server import models as served
    from bert_jax.inference.server.limits import Limits

    loaded = [
        served.load(
            settings.names.get(name, name), folder, tasks=settings.tasks, ignore=settings.ignore,
            dtype=settings.dtype, mesh=sharding.local(settings.mesh.model_dump()) if settings.mesh else None,
        )
        for name, folder in (find_model(model, settings.revision) for model in settings.models or [None])
    ]  # fmt: skip
    limits = Limits(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Limits)})
    access = server.Access(_key(settings), settings.allowed_hosts, settings.allow_origins)
    server.serve(loaded, host=settings.host, port=settings.port, limits=limits, access=access)


def _part_of_rows(shard: str, processes: str | None, output: str | None) -> tuple[tuple[int, int], str | None]:
    """Returns ((i, n), output): this process handles the i-th of n parts of the rows and writes the file `output`."""
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
    """Returns the API key that clients must send, or an empty string if no key is required."""
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
    """Parses arguments of the form NAME=MODEL. Returns a dict that maps each model to its name."""
    pairs = [entry.partition("=") for entry in given]
    for entry, (name, equals, model) in zip(given, pairs, strict=True):
        if not (name and equals and model):
            raise InputError(f"--name is {quoted(entry)}; expected NAME=MODEL.")
    return {model: name for name, _, model in pairs}


def _print_fillings(title: str, fillings: list[dict[str, Any]]) -> None:
    """Prints a table of predictions, each with a bar proportional to its score. The first bar spans the full width."""
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
