"""Answers requests in the JSON formats that the endpoints of Azure's model catalog accept."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bert_jax.errors import InputError, listed, quoted
from bert_jax.inference.pipelines import Pipeline
from bert_jax.tasks.base import Task

INPUTS = ("inputs", "input_data")
PARAMETERS = ("parameters", "params")
TEXTS = "input_string"
"""The model catalog's name for the text column."""


def score(pipe: Pipeline[Task], request: Any) -> Any:
    """Answers a request in the JSON format of Azure's model catalog.

    The `inputs` (or `input_data`) field is one of the following:

    - an input that is not a list, such as a text
    - a list of inputs, where an input that is a pair of texts or a sequence of words is itself a list
    - columns: `{"input_string": […]}` or, for question answering, `{"question": […], "context": […]}`
    - the "split" format of `pandas`: `{"columns": […], "index": […], "data": [[…]]}`

    The `parameters` (or `params`) field contains the task's parameters.

    Args:
        pipe: The pipeline that computes the results.
        request: The request, as returned by `json.loads`.

    Returns:
        A value for `json.dumps`: a list with one result per input, in order. For a single input that is not in a list,
        the value is the result itself.

    Raises:
        InputError: If the request is invalid. The message describes the problem and, if the inputs are in a list, gives
            the index of the invalid input.
    """
    inputs, parameters = read(request)
    return jsonable(pipe(inputs, **parameters))


def jsonable(result: Any) -> Any:
    """Returns a pipeline's result with all arrays converted to lists."""
    if isinstance(result, list):
        return [jsonable(entry) for entry in result]
    return result.tolist() if isinstance(result, np.ndarray) else result


def read(request: Any) -> tuple[Any, dict[str, Any]]:
    """Returns a request's inputs and parameters in the form that `Pipeline` expects.

    Raises:
        InputError: If the request is invalid.
    """
    if not isinstance(request, Mapping):
        raise InputError(f'expected an object like {{"inputs": {{"{TEXTS}": ["…"]}}}}, got {_kind(request)}.')
    if unknown := [key for key in request if key not in INPUTS + PARAMETERS]:
        raise InputError(f"{quoted(unknown[0])} is unknown; expected {', '.join(INPUTS + PARAMETERS)}.")
    inputs, parameters = (_one_of(request, names) for names in (INPUTS, PARAMETERS))
    if inputs is None:
        raise InputError(f"there are no inputs; expected {' or '.join(INPUTS)}.")
    if not isinstance(parameters or {}, Mapping):
        raise InputError(f"parameters is {_kind(parameters)}; expected an object.")
    if isinstance(inputs, Mapping):
        inputs = _rows(_columns(inputs) if "data" in inputs else inputs)
    if isinstance(inputs, list):
        inputs = [tuple(entry) if isinstance(entry, list) else entry for entry in inputs]
    elif not isinstance(inputs, str | dict):
        raise InputError(f"inputs is {_kind(inputs)}; expected a list.")
    return inputs, dict(parameters or {})


def _columns(split: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Converts the "split" format of `pandas` to columns."""
    names, data = split.get("columns", [TEXTS]), split["data"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"columns is {quoted(names)}; expected a list of names, such as [{TEXTS!r}].")
    if not isinstance(data, list):
        raise InputError(f"data is {_kind(data)}; expected a list of rows.")
    rows = [row if isinstance(row, list) else [row] for row in data]
    for i, row in enumerate(rows):
        if len(row) != len(names):
            raise InputError(f"data[{i}] has {len(row)} fields; there are {len(names)} columns.")
    return {name: [row[n] for row in rows] for n, name in enumerate(names)}


def _rows(columns: Mapping[str, Any]) -> Any:
    """Converts columns to a list with one dict per row.

    If the text column is the only column, its values are returned instead. If a column is not a list, the columns are
    the fields of a single input, which is returned as a dict.
    """
    if list(columns) == [TEXTS]:
        return columns[TEXTS]
    if not all(isinstance(values, list) for values in columns.values()):
        return dict(columns)
    if len({len(values) for values in columns.values()}) != 1:
        lengths = (f"{name} {len(values)}" for name, values in columns.items())
        raise InputError(f"the columns have different lengths: {listed(lengths)}.")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _one_of(request: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    given = [request[name] for name in names if name in request]
    if len(given) > 1:
        raise InputError(f"{' and '.join(names)} have the same meaning; give only one of them.")
    return given[0] if given else None


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
