"""Models as nested dicts of arrays, and the dotted paths that name their parameters.

Users work with an `nnx.Module`. The code for `jax.jit`, Optax and checkpoints works with the model's parameters as a
plain nested dict. Only `params, skeleton = split(model)` and `model = merge(skeleton, params)` convert between the two.
A path is a parameter's location in the module, such as `bert.layers.11.attention.query.weight`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from bert_jax.errors import InputError, quoted

Params = dict[Any, Any]
"""A nested dict of arrays. The layers in a list have the integer keys 0, 1, 2, …"""


@dataclass(frozen=True)
class Skeleton:
    """A model without its arrays: its structure, and the shape and dtype of each parameter."""

    graphdef: nnx.GraphDef
    specs: Mapping[str, jax.ShapeDtypeStruct]
    """Maps the dotted path of each parameter to its shape and dtype, in the order of the module's parameters."""


def split(model: nnx.Module) -> tuple[Params, Skeleton]:
    """Splits a model into its parameters and its skeleton, which is the model without the parameters.

    Returns:
        The parameters as a nested dict, and the skeleton. `merge` rebuilds the model from both.
    """
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    return params, Skeleton(graphdef, {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in flatten(params).items()})


def merge(skeleton: Skeleton, params: Params) -> Any:
    """Rebuilds a model from its parameters and its skeleton, which is the model without the parameters.

    This is the inverse of `split`. Call this function instead of `nnx.merge`, which checks only the number of leaves.
    `nnx.merge` accepts wrong names and shapes and puts layers with string keys in the order 0, 1, 10, 11, 2 and so on.
    In contrast, this function first compares every path, shape and dtype with the skeleton.

    Args:
        skeleton: The skeleton that `split` returns.
        params: A nested dict of arrays. Layers may have the string keys "0", "1", …, which some checkpoints use.

    Raises:
        ValueError: If a path is missing or unexpected, or if a parameter has the wrong shape or dtype. The message
            lists every such path.
    """
    flat = flatten(params)
    wrong = [f"missing: {path}" for path in skeleton.specs if path not in flat]
    wrong += [f"unexpected: {path}" for path in flat if path not in skeleton.specs]
    for path, spec in skeleton.specs.items():
        if path in flat and (flat[path].shape, flat[path].dtype) != (spec.shape, spec.dtype):
            found = flat[path]
            wrong.append(f"{path}: {found.dtype}{list(found.shape)}; expected {spec.dtype}{list(spec.shape)}")
    if wrong:
        raise ValueError("The parameters do not fit the model:\n  " + "\n  ".join(wrong))
    return nnx.merge(skeleton.graphdef, unflatten(flat))


def flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Flattens a nested dict to a dict keyed by dotted path. For example, `{"a": {0: x}}` becomes `{"a.0": x}`.

    The order of the leaves does not change.
    """
    return {".".join(map(str, keys)): leaf for keys, leaf in nnx.traversals.flatten_mapping(tree).items()}


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Converts a dict keyed by dotted path to a nested dict: the inverse of `flatten`.

    Keys that consist of digits become integers.
    """
    keys = {path: tuple(int(key) if key.isdigit() else key for key in path.split(".")) for path in flat}
    tree: Params = nnx.traversals.unflatten_mapping({keys[path]: leaf for path, leaf in flat.items()})
    return tree


def select(patterns: Iterable[str], paths: Iterable[str]) -> list[str]:
    """Returns the paths that fully match at least one regular expression in `patterns`, in the order of `paths`.

    Raises:
        InputError: If a pattern is not a regular expression.
    """
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise InputError(f"{quoted(error.pattern)} is not a regular expression: {error.msg}.") from None
    return [path for path in paths if any(pattern.fullmatch(path) for pattern in compiled)]
