"""Exceptions for problems that the user can fix, such as invalid input. They never indicate a bug in this package.

Each message states what was given, what was expected and what to do. The commands print it without a traceback.
"""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

QUOTED = 200
"""The maximum number of characters of a value that are shown in a message."""


class BertJaxError(Exception):
    """Base class for all errors that the user can fix."""


class InputError(BertJaxError, ValueError):
    """An invalid text, argument or setting."""


class UnknownArgumentError(InputError, TypeError):
    """An argument that another library's version of the function accepts but this package's version does not."""


class ConfigError(BertJaxError, ValueError):
    """A `config.json` that does not describe a supported network."""


class CheckpointError(BertJaxError, ValueError):
    """Model or run files that are damaged or incomplete, belong to another model, or cannot be written."""


class ModelNotFoundError(BertJaxError, OSError):
    """A folder, model id or revision that does not exist, or a model that cannot be downloaded."""


class HubUnreachableError(ModelNotFoundError):
    """The Hub does not respond, so models that are not cached cannot be downloaded, and no models can be uploaded."""


class TrainingError(BertJaxError, ArithmeticError):
    """A run that cannot continue, because a result is not finite or because one of its processes has ended."""


class OutOfMemoryError(BertJaxError, MemoryError):
    """A model or batch that does not fit in device memory."""


class Interrupted(BertJaxError):
    """A run that was stopped by a signal. If the run has a folder, the run's state was saved in it.

    Args:
        step: The number of completed steps.
        folder: The run's folder; None if the run has no folder.
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
    """Returns `repr(value)`, truncated to `QUOTED` characters. For a large value, only the beginning is formatted."""
    return _cut(_written(value))


def listed(values: Iterable[Any]) -> str:
    """Returns the values separated by commas, truncated to `QUOTED` characters."""
    return _cut(f"{', ' * (i > 0)}{str(value)[: QUOTED + 1]}" for i, value in enumerate(values))


def _cut(parts: Iterable[str]) -> str:
    text = ""
    for part in parts:
        if len(text) + len(part) > QUOTED:
            closing = part[-1] if part[-1] in "'\"" else ""  # a truncated string also ends with a quotation mark
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
    elif isinstance(value, int) and value.bit_length() > 10_000:  # repr fails for integers with more than 4,300 digits
        yield f"a whole number of {value.bit_length()} bits"
    else:
        yield repr(value)
