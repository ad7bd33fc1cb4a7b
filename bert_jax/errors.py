"""Errors that the user can fix, such as invalid input. None of these exceptions reports a bug in this package.

Each message says what was given, what was expected and what to do. The command line prints it without a traceback.
"""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

QUOTED = 200
"""A message shows at most this number of characters of a value."""


class BertJaxError(Exception):
    """Base of all errors that the user can fix."""


class InputError(BertJaxError, ValueError):
    """An invalid text, argument or setting."""


class UnknownArgumentError(InputError, TypeError):
    """An argument that a function has in another library, but not here."""


class ConfigError(BertJaxError, ValueError):
    """A `config.json` that does not describe a supported network."""


class CheckpointError(BertJaxError, ValueError):
    """Model or run files that are damaged, are incomplete, belong to another model, or cannot be written."""


class ModelNotFoundError(BertJaxError, OSError):
    """A folder, model id or revision that does not exist, or a model that cannot be downloaded."""


class HubUnreachableError(ModelNotFoundError):
    """The Hub does not answer, so a model that is not cached cannot be downloaded, or a model cannot be uploaded."""


class TrainingError(BertJaxError, ArithmeticError):
    """A run that cannot continue: a result is not finite, or one of its processes has ended."""


class OutOfMemoryError(BertJaxError, MemoryError):
    """A model or a batch that does not fit in the memory of the devices."""


class Interrupted(BertJaxError):
    """A run that was asked to stop. If it has a folder, it has saved its state there.

    Args:
        step: The number of steps done.
        folder: The folder of the run; None if it has none.
        signal: The number of the signal that stopped the run.
    """

    def __init__(self, step: int, folder: object, signal: int):
        saved = (
            f"saved in {folder}; to resume, run the same command again" if folder else "not saved: there is no folder"
        )
        super().__init__(f"stopped at step {step}, {saved}.")
        self.signal = signal


def check_extra(extra: str, *modules: str) -> None:
    """Raises `InputError` if one of `modules` is not installed. `pip install bert-jax[extra]` installs all of them."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise InputError(f"This requires {', '.join(missing)}: pip install 'bert-jax[{extra}]'.")


def quoted(value: Any) -> str:
    """`repr(value)`, cut after `QUOTED` characters. Of a large value, only the part before the cut is converted."""
    return _cut(_written(value))


def listed(values: Iterable[Any]) -> str:
    """The values separated by commas, cut after `QUOTED` characters."""
    return _cut(f"{', ' * (i > 0)}{str(value)[: QUOTED + 1]}" for i, value in enumerate(values))


def _cut(parts: Iterable[str]) -> str:
    text = ""
    for part in parts:
        if len(text) + len(part) > QUOTED:
            closing = part[-1] if part[-1] in "'\"" else ""  # a quotation ends with a quotation mark, even if it is cut
            return text + part[: QUOTED - len(text)] + "…" + closing
        text += part
    return text


def _written(value: Any) -> Iterator[str]:
    """Yields `repr(value)` in parts.

    An opening bracket is yielded before the first item is read, so `_cut` stops before deep nesting can exceed the
    recursion limit.
    """
    if isinstance(value, Mapping) or type(value) in (list, tuple):
        opening, closing = "{}" if isinstance(value, Mapping) else "[]" if type(value) is list else "()"
        yield opening
        for i, item in enumerate(value):
            yield ", " * (i > 0)
            yield from _written(item)
            if isinstance(value, Mapping):
                yield ": "
                yield from _written(value[item])
        yield "," * (type(value) is tuple and len(value) == 1) + closing
    elif isinstance(value, str | bytes):
        yield repr(value[: QUOTED + 1])
    elif isinstance(value, int) and value.bit_length() > 10_000:  # repr fails for integers of more than 4,300 digits
        yield f"a whole number of {value.bit_length()} bits"
    else:
        yield repr(value)
