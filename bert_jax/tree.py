"""Models as nested dicts of arrays, and the dotted paths that name their parameters.

People hold an `nnx.Module`; everything hot (jit, optax, checkpoints) holds its parameters as a plain nested dict:
`params, skeleton = split(model)` and `model = merge(skeleton, params)` are the only doors between the two.
A path is a parameter's place in the module, `bert.layers.11.attention.query.weight`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

Params = dict[Any, Any]
"""A nested dict of arrays; the layers of a list are under the integers 0, 1, 2, …"""


@dataclass(frozen=True)
class Skeleton:
    """What is left of a model when its arrays are taken away: its structure, and each parameter's shape and dtype."""

    graphdef: nnx.GraphDef
    specs: Mapping[str, jax.ShapeDtypeStruct]
    """By dotted path, in the order of the module."""


def split(model: nnx.Module) -> tuple[Params, Skeleton]:
    """Takes a model apart.

    Returns:
        Its parameters as a nested dict, and the skeleton that `merge` puts them back on.
    """
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    return params, Skeleton(graphdef, {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in flatten(params).items()})


def merge(skeleton: Skeleton, params: Params) -> Any:
    """The model of a skeleton with these parameters: the inverse of `split`, and the sole caller of `nnx.merge`.

    `nnx.merge` compares only the number of leaves: other names and shapes pass it, and layers under string keys come
    out in the order 0, 1, 10, 11, 2 … So every path, shape and dtype is compared here first.

    Args:
        skeleton: From `split`.
        params: Nested dict of arrays; layers may be under the strings "0", "1", … as some checkpoints have them.

    Raises:
        ValueError: Lists each path that is missing, unexpected, or of another shape or dtype.
    """
    flat = flatten(params)
    wrong = [f"missing: {path}" for path in skeleton.specs if path not in flat]
    wrong += [f"unexpected: {path}" for path in flat if path not in skeleton.specs]
    for path, spec in skeleton.specs.items():
        if path in flat and (flat[path].shape, flat[path].dtype) != (spec.shape, spec.dtype):
            found = flat[path]
            wrong.append(f"{path}: {found.dtype}{list(found.shape)} where {spec.dtype}{list(spec.shape)} is expected")
    if wrong:
        raise ValueError("These parameters are not this model's:\n  " + "\n  ".join(wrong))
    return nnx.merge(skeleton.graphdef, unflatten(flat))


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> leaf, in the tree's own order: `{"a": {0: x}}` is `{"a.0": x}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`; digits become integers."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, name = (int(key) if key.isdigit() else key for key in path.split("."))
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def select(patterns: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The paths that one of the regular expressions matches whole, in the order of `paths`."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return [path for path in paths if any(pattern.fullmatch(path) for pattern in compiled)]
