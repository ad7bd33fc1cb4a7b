"""What can go wrong at the door: errors for whoever gave the input, never for a fault of ours.

Each message names what was given, what was expected and what to do. The command line prints it without a traceback.
"""

import importlib.util
import reprlib
from typing import Any


class BertJaxError(Exception):
    """Base of all errors that the user can mend."""


class InputError(BertJaxError, ValueError):
    """A text, an argument or a setting that cannot be used."""


class ConfigError(BertJaxError, ValueError):
    """A `config.json` that describes no network of ours."""


class CheckpointError(BertJaxError, ValueError):
    """Weights or tokenizer files that are damaged, incomplete, or of another model."""


class ModelNotFoundError(BertJaxError, OSError):
    """A model id, folder or revision that is not there."""


class HubUnreachableError(ModelNotFoundError):
    """A model that is neither cached nor to be had, because the Hub does not answer."""


class TrainingError(BertJaxError, ArithmeticError):
    """A run that cannot go on: a loss that is not finite, a metric that is not there."""


class Interrupted(BertJaxError):
    """A run that was asked to stop and has saved where it stands.

    Args:
        step: Steps done.
        folder: Of the run.
        signal: The number that asked.
    """

    def __init__(self, step: int, folder: object, signal: int):
        super().__init__(f"stopped at step {step}, which is saved in {folder}; the same command goes on from there.")
        self.signal = signal


def check_extra(extra: str, *modules: str) -> None:
    """Raises `InputError` where modules of an extra are not installed."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise InputError(f"This needs {', '.join(missing)}: pip install 'bert-jax[{extra}]'.")


def quoted(value: Any) -> str:
    """What was given, as a message quotes it: its `repr`, of 200 characters at most.

    Large values are cut before they are written out.
    """
    try:
        text = _REPR.repr(value)
    except Exception:  # an object's own fault, or an integer of more digits than Python writes
        text = f"a {type(value).__name__} that cannot be written out"
    return text if len(text) <= _QUOTED else text[: _QUOTED - 1] + "…"


_QUOTED = 200
_REPR = reprlib.Repr()
_REPR.maxlevel = 4
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxfrozenset = 20
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = _QUOTED
