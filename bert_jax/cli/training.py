"""Commands that train and evaluate models: `finetune`, `pretrain` and `evaluate`."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from bert_jax.cli.options import Ignore, Model, Overrides, Processes, app
from bert_jax.compilation import CACHE_VARIABLE, use_compilation_cache
from bert_jax.errors import BertJaxError, InputError, Interrupted, check_extra, quoted
from bert_jax.training import memory

if TYPE_CHECKING:
    pass


@app.command()
def finetune(
    config: Annotated[Path, typer.Argument(help="A YAML settings file, such as configs/finetune/emotion.yaml.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show settings, examples, shapes, memory and programs without training.")
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
        typer.Option(
            help="Seeds, such as 1,2,3. Trains once per seed, in subfolders of output.folder such as seed-1, and "
            "prints a table of means."
        ),
    ] = None,
) -> None:
    """Fine-tune a model. To resume an interrupted run, repeat the command."""
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
    config: Annotated[Path, typer.Argument(help="A YAML settings file, such as configs/pretrain/continue.yaml.")],
    overrides: Overrides = None,
    processes: Processes = None,
) -> None:
    """Pretrain a model on texts. To resume an interrupted run, repeat the command."""
    from bert_jax.settings import Pretraining

    settings = Pretraining.from_file(config, overrides or ())
    with _training(processes) as console:
        from bert_jax import recipes

        recipes.pretrain(settings, console=console)


@app.command()
def evaluate(
    model: Model,
    config: Annotated[Path, typer.Argument(help="A YAML settings file with the task and the data.")],
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
    """Compute a model's metrics on a data set."""
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


@contextlib.contextmanager
def _training(processes: str | None) -> Iterator[Console]:
    """Prepares training: keeps freed memory for reuse, caches compiled programs, and connects to other processes.

    Args:
        processes: The value of `--processes`; None for a single process.

    Yields:
        A console that prints only in the first process.
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
