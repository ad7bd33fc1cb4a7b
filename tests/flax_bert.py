"""FlaxBert's parameters made from the tensors of `reference`, and what `make_golden_flax_bert.py` kept of its outputs.

The names and layouts are written out here once more, on purpose: this is what `bert_jax.convert` is tested against.
"""

import functools
from typing import Any

import numpy as np
import reference

BASE = reference.CONFIG | {
    "vocab_size": 28996,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
SHAPES = {"small": reference.CONFIG, "base": BASE}


def config(architecture: str, shape: str) -> dict[str, Any]:
    """The config beside a class's weights."""
    return SHAPES[shape] | {
        key: value for key, value in reference.config(architecture).items() if value != reference.CONFIG.get(key)
    }


@functools.cache
def _drawn(shape: str) -> dict[str, np.ndarray]:
    return reference.tensors(config=SHAPES[shape])


def tensors(architecture: str, shape: str) -> dict[str, np.ndarray]:
    """The tensors of a class; those of the base shape are drawn once, which takes 5 s."""
    kept = reference.HEADS[architecture]
    scale = 0.1 if shape == "base" else 1.0  # as wide a network with weights as large would be chaotic
    return {
        name: tensor if tensor.ndim == 1 else tensor * np.float32(scale)
        for name, tensor in _drawn(shape).items()
        if name.startswith(kept) or (name.startswith(reference.ENCODER) and not name.startswith(reference.POOLER))
    }


def parameters(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """FlaxBert's nested parameters. The bare model lacks the level `bert`."""
    bare = all(name.startswith("bert.") for name in tensors)
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *parents, module, last = (name.removeprefix("bert.") if bare else name).split(".")
        if last == "weight":
            last = "scale" if module == "LayerNorm" else "embedding" if "embeddings" in module else "kernel"
        place = tree
        for parent in [*parents, module]:
            place = place.setdefault(parent, {})
        place[last] = np.ascontiguousarray(tensor.T) if last == "kernel" else tensor
    return tree


def sample(array: np.ndarray) -> list[float]:
    """Up to 200 evenly spread numbers of an array."""
    flat = array.ravel()
    return [float(x) for x in flat[np.linspace(0, flat.size - 1, min(200, flat.size)).astype(int)]]
