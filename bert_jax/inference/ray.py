"""Makes predictions on a Ray cluster (`ray` extra), for data sets that are too large for one machine.

Ray Data reads and writes the files and keeps the workers busy. If a worker fails, another worker computes its rows.

    dataset = ray.data.read_parquet("s3://bucket/reviews/").map_batches(
        Predictor, fn_constructor_kwargs={"task": "text-classification", "model": "/shared/model"},
        batch_format="pyarrow", batch_size=1024, num_gpus=1, compute=ray.data.ActorPoolStrategy(size=8),
    )
"""

import contextlib
import copy
import csv
import json
import logging
import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import PurePath
from typing import Any

import jax
import pyarrow
import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig

import bert_jax
from bert_jax.compilation import use_compilation_cache
from bert_jax.errors import BertJaxError, InputError, listed, quoted
from bert_jax.inference.catalog import jsonable
from bert_jax.inference.pipelines import READ_AHEAD, pipeline
from bert_jax.inference.prediction import PREDICTION, check_request, flat, input_of
from bert_jax.inference.ray_files import LINE, ROW, FileSink, Journal, RowSource, content_of, first_line
from bert_jax.quantization import Dtype
from bert_jax.tasks.registry import TASKS, task_name

ERROR = "error"
"""Name of the column that contains the reason why a row could not be used."""
FORMATS = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""Maps file name extensions to formats."""
TYPES = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}
"""Maps the Python types of predictions to column types. Predictions of all other types become strings."""
FILE_CPUS = 0.1
"""The share of a CPU that Ray reserves for a task that reads or writes files."""
CPUS_PER_WORKER = 4
BLOCK = 2**18
"""Total size, in bytes, of the rows that a worker computes at a time. These rows are recomputed if the worker fails."""


def versions() -> dict[str, str]:
    """Returns the package versions that must be the same in all workers."""
    others = {name: metadata.version(name) for name in ("jax", "jaxlib", "tokenizers")}
    return {"bert-jax": bert_jax.__version__} | others


class Predictor:
    """An actor class for `ray.data.Dataset.map_batches`.

    Each actor runs one model on one device or on a share of a machine's CPUs. An actor is called with a `pyarrow.Table`
    and adds columns to it. A prediction that is an object becomes one column per field; for example, `{label, score}`
    becomes `prediction_label` and `prediction_score`. Any other prediction becomes the `prediction` column, in which
    lists are stored as JSON strings. The `error` column contains the reason why a row could not be used. Texts are
    sorted and packed within each table, so `map_batches` is efficient with a `batch_size` of about 1,024 rows.

    Args:
        task: The name of the task.
        model: A folder that all workers can read, an id on the Hub, or the embedded model (`bert-mini-cased`).
        revision: The branch, tag or commit on the Hub.
        ignore: Regular expressions for the names of tensors to skip.
        dtype: "float32", "bfloat16" or "int8".
        columns: The names of the columns that form an input. The default is the task's usual column names.
        parameters: The task's parameters.
        threads: The number of threads that XLA uses on CPUs. The default is the number of CPUs that Ray assigned.
        expected: The versions of the driver's packages, as returned by `versions`. If None, versions are not compared.

    Raises:
        InputError: If an argument is invalid, if the worker's package versions differ from the driver's, or if JAX
            cannot use the device that Ray assigned.
        ModelNotFoundError: If the worker cannot read the model.
        CheckpointError: If the model does not fit the task.
    """

    def __init__(
        self,
        task: str,
        model: str,
        *,
        revision: str | None = None,
        ignore: Sequence[str] = (),
        dtype: Dtype = "float32",
        columns: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
        threads: int | None = None,
        expected: Mapping[str, str] | None = None,
    ):
        if expected is not None and (found := versions()) != expected:
            raise InputError(f"A worker has {found}; the driver has {dict(expected)}. Install the same versions.")
        if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
            use_compilation_cache()
        context = ray.get_runtime_context()
        threads = threads or math.ceil(context.get_assigned_resources().get("CPU", 1.0))
        os.environ.setdefault("NPROC", str(threads))  # XLA reads this variable
        assigned = [name for name, ids in context.get_accelerator_ids().items() if ids]
        if assigned and jax.default_backend() == "cpu":
            extra = "tpu" if assigned == ["TPU"] else "cuda"
            raise InputError(f"A worker has a {assigned[0]} that JAX does not see: pip install 'bert-jax[{extra}]'.")
        self.pipe = pipeline(task_name(task), model, revision=revision, ignore=ignore, dtype=dtype)
        self.candidates = [tuple(columns)] if columns else self.pipe.task.columns_of_input
        self.parameters = dict(parameters or {})
        example = check_request(self.pipe, tuple(columns), self.parameters)
        (result,) = self.pipe.run([example])
        fields = flat({PREDICTION: jsonable(result)})
        self.types = {name: TYPES.get(type(value), pyarrow.string()) for name, value in fields.items()}

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """Adds the prediction columns and the `error` column."""
        results, errors = self.predict(table.to_pylist())
        rows = [
            flat({PREDICTION: result}) if error is None else {} for result, error in zip(results, errors, strict=True)
        ]
        for name, kind in self.types.items():
            table = table.append_column(name, pyarrow.array([row.get(name) for row in rows], kind))
        return table.append_column(ERROR, pyarrow.array(errors, pyarrow.string()))

    def predict(self, rows: Sequence[dict[str, Any]]) -> tuple[list[Any], list[str | None]]:
        """Returns the predictions, and the errors for unusable rows.

        For each row, either the prediction or the error is None.
        """
        requests: list[Any] = []
        errors: list[str | None] = []
        for row in rows:
            try:
                requests.append(self.pipe.request(input_of(row, self.candidates), self.parameters))
                errors.append(None)
            except InputError as error:
                errors.append(str(error))
        results = iter(self.pipe.run(requests))
        return [jsonable(next(results)) if error is None else None for error in errors], errors


class _LinePredictor(Predictor):
    """A `Predictor` for rows that are JSON lines. It adds the prediction and the error to each line."""

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        lines = table[LINE].to_pylist()
        rows = [_parsed(line) for line in lines]
        results, errors = self.predict(rows)
        for i, row in enumerate(rows):
            if taken := [name for name in (ROW, PREDICTION, ERROR) if name in row]:
                rows[i], results[i] = {LINE: lines[i]}, None
                errors[i] = f"there is already a column {quoted(taken[0])}; rename it."
        made = [
            _dumped({ROW: name, **row, PREDICTION: result, ERROR: error})
            for name, row, result, error in zip(table[ROW].to_pylist(), rows, results, errors, strict=True)
        ]
        return pyarrow.table({ROW: table[ROW], LINE: pyarrow.array(made, pyarrow.string())})


def _parsed(line: str) -> dict[str, Any]:
    """Parses a line into a row. A line that is not a JSON object becomes a row with a single column, `line`."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(row := json.loads(line), dict):
            return row
    return {LINE: line}


def _dumped(row: Mapping[str, Any]) -> str:
    """Returns a row as JSON. If the row contains lone surrogates, which UTF-8 cannot encode, the JSON is ASCII only."""
    line = json.dumps(row, ensure_ascii=False)
    return json.dumps(row) if re.search("[\ud800-\udfff]", line) else line


def predict(
    task: str,
    model: str,
    inputs: Sequence[str],
    output: str,
    *,
    revision: str | None = None,
    ignore: Sequence[str] = (),
    dtype: Dtype = "float32",
    columns: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    format: str | None = None,
    address: str | None = None,
    workers: int | None = None,
) -> None:
    """Makes a prediction for each row of the input files and writes the rows with their predictions to a folder.

    If a run is interrupted, repeating the call with the same arguments resumes it. Rows that have been written are not
    computed again. The order of the rows is not preserved. The `row` column contains the file name and the row number
    of each row.

    Args:
        task: See `Predictor`.
        model: See `Predictor`.
        inputs: Files or folders, on disks that all workers share or in an object store (for example,
            `s3://bucket/folder`).
        output: A new folder, on a disk that all workers share or in an object store. The run writes several files to
            the folder. The files have the format of the inputs, except that JSONL is used for text inputs. JSONL files
            contain the prediction and the error for each row. Files in other formats contain the columns that
            `Predictor` adds.
        revision: See `Predictor`.
        ignore: See `Predictor`.
        dtype: See `Predictor`.
        columns: See `Predictor`.
        parameters: See `Predictor`.
        format: The format of the inputs: "jsonl", "csv", "parquet" or "text". By default, the format is inferred from
            the names in `inputs`.
        address: The address of the cluster (for example, `ray://host:10001`), or `auto`. By default, a cluster is
            started on this machine for the duration of the call.
        workers: The number of workers. The default is one worker per GPU or TPU chip, or one per 4 CPUs if the cluster
            has neither GPUs nor TPUs.

    Raises:
        InputError: If there is no cluster at the address, if an argument is invalid, if none of the first 100 rows can
            be used, if a worker cannot load the model, or if the output belongs to another run.
    """
    files = [name if "://" in name else os.path.abspath(name) for name in inputs]
    kinds = {format or FORMATS.get(PurePath(name).suffix, "") for name in files}
    (kind,) = kinds if len(kinds) == 1 else ("",)
    if kind not in FORMATS.values():
        raise InputError(f"{listed(files)}: expected files of one format; give --format {', '.join(FORMATS.values())}.")
    options = {
        "task": task_name(task), "model": os.path.abspath(model) if os.path.isdir(model) else model,
        "revision": revision, "ignore": list(ignore), "dtype": dtype, "columns": list(columns),
        "parameters": dict(parameters or {}),
    }  # fmt: skip
    output = output if "://" in output else os.path.abspath(output)
    weights = content_of(os.path.abspath(model)) if os.path.isdir(model) else None
    identity = {"inputs": [content_of(name) for name in files], "format": kind, "weights": weights, **options}
    journal = Journal(output, identity)
    if journal.complete:
        return
    if ray.is_initialized():
        raise InputError("This process is connected to a Ray cluster already; use Predictor with map_batches instead.")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    cpus = None if address else max(2, os.cpu_count() or 2)
    try:
        if match := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address or ""):  # Ray itself would retry for two minutes
            socket.create_connection((match[1], int(match[2])), timeout=10).close()
        ray.init(address or "local", num_cpus=cpus, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # RuntimeError: the Ray versions differ
        reason = first_line(error.__cause__ or error)
        raise InputError(f"Cannot connect to a Ray cluster at {quoted(address)}: {reason}") from None
    context = copy.deepcopy(ray.data.DataContext.get_current())
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK
    context.checkpoint_config = CheckpointConfig(ROW, journal.checkpoint, delete_checkpoint_on_success=False)
    try:
        with ray.data.DataContext.current(context):
            dataset = _opened(files, kind, options)
            share, count, threads = _worker(workers)
            predicted = dataset.map_batches(
                Predictor if kind in ("csv", "parquet") else _LinePredictor,
                fn_constructor_kwargs=options | {"threads": threads, "expected": versions()}, batch_format="pyarrow",
                batch_size=READ_AHEAD, compute=ray.data.ActorPoolStrategy(size=count), **share,
            )  # fmt: skip
            journal.begin()
            target = FileSink(output, {"text": "jsonl"}.get(kind, kind))
            predicted.write_datasink(target, ray_remote_args={"num_cpus": FILE_CPUS})
    except ray.exceptions.RayError as error:
        journal.abandon()
        raise InputError(_reason(error)) from None
    finally:
        ray.shutdown()
    journal.end()


def _opened(files: list[str], kind: str, options: Mapping[str, Any]) -> Any:
    """Opens the files as a Ray data set. Raises `InputError` if none of the first 100 rows contains an input."""
    try:
        source = RowSource(files, kind)
        rows = source.head(100)
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise InputError(f"Cannot read {listed(files)}: {first_line(error)}") from None
    if kind in ("jsonl", "text"):
        rows = [_parsed(row[LINE]) for row in rows]
    else:
        for row in rows:
            del row[ROW]
    if not rows:
        raise InputError(f"{listed(files)}: there are no rows.")
    for name in rows[0]:
        fields = kind in ("csv", "parquet") and name.startswith(f"{PREDICTION}_")
        if name in (ROW, ERROR, PREDICTION) or fields:
            raise InputError(f"there is already a column {quoted(name)}; rename it.")
    candidates = [tuple(options["columns"])] if options["columns"] else TASKS[options["task"]].columns_of_input
    reasons = []
    for row in rows:
        try:
            input_of(row, candidates)
            return ray.data.read_datasource(source, num_cpus=FILE_CPUS)
        except InputError as error:
            reasons.append(str(error))
    raise InputError(reasons[0])


def _worker(workers: int | None) -> tuple[dict[str, Any], int, int]:
    """Returns the resources to reserve per worker, the number of workers, and the number of threads per worker."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for device in ("GPU", "TPU"):
        if chips := int(sum(node.get(device, 0) for node in nodes)):
            one = {"num_gpus": 1} if device == "GPU" else {"resources": {"TPU": 1}}
            return {"num_cpus": FILE_CPUS, **one}, _fitting(workers or chips, chips, f"{device}s"), 1
    cpus = [node["CPU"] for node in nodes if node.get("CPU")]
    if not cpus:
        raise InputError("The Ray cluster has neither CPUs nor GPUs nor TPU chips; add a node.")
    count = _fitting(workers or sum(max(1, int(n) // CPUS_PER_WORKER) for n in cpus), int(sum(cpus)), "CPUs")
    on_machine = -(-count // len(cpus))
    # A machine's remaining CPUs are for reading, writing, and the actor that skips rows that have been written already.
    share = (min(cpus) - 1.2) / on_machine
    threads = max(1, int(min(cpus)) // on_machine)
    return {"num_cpus": max(FILE_CPUS, min(0.8 * CPUS_PER_WORKER, share))}, count, threads


def _fitting(workers: int, most: int, what: str) -> int:
    if workers > most:
        raise InputError(f"There are {workers} workers; the cluster has {most} {what}. Lower --workers.")
    return workers


def _reason(error: BaseException) -> str:
    """Returns the message of the `BertJaxError` that caused a worker to fail.

    If there is no such error, the last line of `error` is returned.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BertJaxError):
            return str(cause)
        cause = getattr(cause, "cause", None) or cause.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    own = [line for line in lines if "bert_jax.errors." in line]
    return (own or lines)[-1].strip().rpartition("Error: ")[2]
