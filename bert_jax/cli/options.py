"""Code shared by the commands: the app, the options, and model lookup."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bert_jax import __version__
from bert_jax.compilation import CACHE_VARIABLE, use_compilation_cache
from bert_jax.errors import BertJaxError, HubUnreachableError, InputError, Interrupted
from bert_jax.hub import DEFAULT_MODEL

if TYPE_CHECKING:
    from bert_jax.inference.pipelines import Pipeline
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
    typer.Option(help=r"Regular expression for checkpoint tensors to skip, such as 'crf\..*'. Repeatable."),
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
TaskOption = Annotated[
    str | None,
    typer.Option(help="Name of the task: fill-mask, text-classification, … Default: the model's task, if it has one."),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change, as section.key=value.")]
Processes = Annotated[
    str | None,
    typer.Option(
        help="Train together with other processes. On a TPU pod or under SLURM or Open MPI, use auto. Elsewhere, use "
        "i/n@host:port for process i of n, with the address of process 1."
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
    stopped a run, the exit status is 128 plus the signal number.
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


def load_pipeline(
    task: str | None,
    model: ModelOption,
    revision: Revision,
    ignore: Ignore,
    dtype: DtypeOption,
    mesh: MeshOption = None,
) -> tuple[str, "Pipeline[Task]"]:
    """Returns a model's name (see `find_model`) and its pipeline. The arguments are command-line option values."""
    use_compilation_cache()
    from bert_jax import sharding
    from bert_jax.inference import pipelines
    from bert_jax.server_settings import Serving
    from bert_jax.tasks import registry
    from bert_jax.yaml_file import assignments

    sizes = Serving.from_dict({"mesh": assignments(mesh)}, source="--mesh").mesh if mesh else None
    devices = sharding.local(sizes.model_dump()) if sizes else None
    name, folder = find_model(model, revision)
    task = registry.task_name(task or find_task(name, folder))
    return name, pipelines.pipeline(task, folder, ignore=ignore or (), dtype=dtype, mesh=devices)


def find_task(name: str, folder: Path) -> str:
    """Returns the task that a model's head supports. Raises `InputError` unless there is exactly one such task."""
    from bert_jax import hub
    from bert_jax.inference.pipelines import tasks_of
    from bert_jax.tasks.registry import TASKS

    fitting = tasks_of(hub.architectures(folder))
    if len(fitting) == 1:
        return fitting[0]
    known = f"is for {' and '.join(fitting)}" if fitting else "names no task"
    raise InputError(f"--task is missing, and {name} {known}; expected one of {', '.join(fitting or TASKS)}.")


def find_model(model: str | None, revision: str | None) -> tuple[str, Path]:
    """Returns the name and folder of `model`, or of `DEFAULT_MODEL` if `model` is None.

    If `DEFAULT_MODEL` is neither cached nor reachable, `FALLBACK_MODEL` is used instead, unless a revision is given.
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
