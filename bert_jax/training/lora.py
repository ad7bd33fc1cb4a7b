"""LoRA (Hu et al. 2021, arXiv:2106.09685): low-rank adapters for frozen weights, as plain arrays by path.

The model itself has no adapters. Before parameters are put into the model, each weight W that has an adapter becomes
W + alpha / rank · B A, and gradients flow through this sum to A and B. Adapters are saved separately, in the format of
Hugging Face's `peft`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from bert_jax import tree, weights
from bert_jax.errors import CheckpointError, InputError, quoted
from bert_jax.hub import read_json, replacing
from bert_jax.model import BertPreTrainedModel

# The fields of peft's LoraConfig (0.19) that may be set. This module reads some of them. The others, such as those that
# tell how the adapters were trained, do not change the meaning of stored adapters. If a field outside this list is set,
# such as one of a later version, loading fails, because the field might change that meaning.
_INERT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights unchanged."""

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class LoRA:
    """Which weights get adapters, and the size of the adapters.

    Attributes:
        rank: Number of rows of A and of columns of B.
        alpha: The product B A is scaled by alpha / rank.
        targets: Regular expression that matches the paths of the weights that get adapters.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = r"bert\.layers\.\d+\.attention\.(query|value)\.weight"

    @property
    def scale(self) -> float:
        """The factor that scales the product B A."""
        return self.alpha / self.rank


def init(lora: LoRA, specs: Mapping[str, jax.ShapeDtypeStruct], key: jax.Array) -> dict[str, jax.Array]:
    """Creates adapters.

    The entries of A are uniformly distributed between -1/√in and 1/√in, as in `peft`. B is zero, so that the adapters
    do not change the model at first.

    Args:
        lora: The rank, and the weights that get adapters.
        specs: The shapes and dtypes of the model's parameters by path.
        key: PRNG key.

    Returns:
        `….lora_A` float32 [rank, in] and `….lora_B` float32 [out, rank] for each `….weight` [out, in].

    Raises:
        InputError: If `lora.targets` matches no parameter, or one that is not the weight of a linear layer.
    """
    targets = tree.select([lora.targets], specs)
    if not targets:
        raise InputError(
            f"lora.targets {lora.targets!r} matches no parameter; expected paths such as {next(iter(specs))}."
        )
    adapters: dict[str, jax.Array] = {}
    for i, path in enumerate(targets):
        if specs[path].ndim != 2 or "embeddings" in path:
            raise InputError(f"lora.targets matches {path}, which is not the weight of a linear layer.")
        out, into = specs[path].shape
        name, bound = path.removesuffix(".weight"), into**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, i), (lora.rank, into), jnp.float32, -bound, bound)
        adapters |= {f"{name}.lora_A": a, f"{name}.lora_B": jnp.zeros((out, lora.rank), jnp.float32)}
    return adapters


def merge(params: Mapping[str, jax.Array], scale: float) -> dict[str, jax.Array]:
    """Returns the parameters by path, without adapters. Each weight W that has an adapter becomes W + scale · B A."""
    merged = {path: leaf for path, leaf in params.items() if not path.endswith((".lora_A", ".lora_B"))}
    for path in params:
        if path.endswith(".lora_A"):
            name = path.removesuffix(".lora_A")
            product = jnp.matmul(params[f"{name}.lora_B"], params[path], precision=jax.lax.Precision.HIGHEST)
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + scale * product
    return merged


def save_adapters(folder: Path, params: Mapping[str, Any], lora: LoRA, base: str, task_type: str) -> None:
    """Writes adapters, and the parameters that were trained in full, in peft's format.

    Args:
        folder: The folder; it is created if it does not exist.
        params: All trained parameters by path, adapters included.
        lora: Rank and alpha of the adapters.
        base: Name or path of the base model.
        task_type: The task type as peft names it: SEQ_CLS, TOKEN_CLS or QUESTION_ANS.

    Raises:
        CheckpointError: If the folder cannot be written.
    """
    names = _published(params)
    tensors = {f"base_model.model.{name}": np.asarray(params[path]) for path, name in names.items()}
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        # The names are full, because peft would apply a shorter name to all modules whose names end with it.
        "target_modules": sorted({name.partition(".lora_")[0] for name in names.values() if ".lora_" in name}),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in names.values() if ".lora_" not in name}),
    }
    with replacing(folder) as staging:
        save_file(tensors, staging / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (staging / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_adapters(folder: Path, model: BertPreTrainedModel) -> BertPreTrainedModel:
    """Returns a model with the adapters in a folder merged into its weights.

    Parameters in the folder that were trained in full replace those of the model.

    Args:
        folder: A folder that `save_adapters` or `peft` has written.
        model: The base model of the adapters.

    Raises:
        InputError: If the model is not loaded in float32.
        CheckpointError: If the files are missing, damaged or not supported, or if they do not fit the model.
    """
    model.check_float32("load_adapters")
    try:
        config = read_json(folder / ADAPTER_CONFIG)
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        scale = _scale(config)
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"Cannot load adapters from {folder}: {str(error).rstrip('.')}.") from None
    params, skeleton = tree.split(model)
    flat = tree.flatten(params)
    matrices = [path.removesuffix(".weight") for path in flat if path.endswith(".weight") and flat[path].ndim == 2]
    adapters = [f"{name}.lora_{side}" for name in matrices for side in "AB"]
    by_name = {name: path for path, name in _published([*flat, *adapters]).items()}
    for name, tensor in tensors.items():
        path = by_name.get(name.removeprefix("base_model.model."))
        if path is None:
            raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} has {name}, which this model does not have.")
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} contains NaN or infinity, in {name}.")
        flat[path] = jnp.asarray(tensor, jnp.float32)
    whole = {name.removeprefix("base_model.model.").rpartition(".")[0] for name in tensors}
    published = {name.rpartition(".")[0] for name in weights.published_names(skeleton.specs)}
    for saved in config.get("modules_to_save") or ():
        if absent := {module for module in published if f".{module}".endswith(f".{saved}")} - whole:
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS} lacks {min(absent)}, which modules_to_save names; save the adapters again."
            )
    expected = {path: spec.shape for path, spec in skeleton.specs.items()}
    for name in {path.rpartition(".")[0] for path in adapters if path in flat}:
        out, into = expected[f"{name}.weight"]
        expected |= {f"{name}.lora_A": (config["r"], into), f"{name}.lora_B": (out, config["r"])}
    found = {path: leaf.shape for path, leaf in flat.items()}
    if wrong := [path for path in expected if found.get(path) != expected[path]]:
        wrong = [f"{path} has the shape {found.get(path)}; expected {expected[path]}" for path in wrong]
        raise CheckpointError(f"The adapters in {folder} do not fit this model:\n  " + "\n  ".join(wrong))
    merged: BertPreTrainedModel = tree.merge(skeleton, tree.unflatten(merge(flat, scale)))
    return merged


def _published(paths: Iterable[str]) -> dict[str, str]:
    """Maps each path to the name in peft's files, without the prefix `base_model.model.`.

    For example, the matrix A of a module `m` is named `m.lora_A.weight`.
    """
    owners = {path: re.sub(r"\.lora_[AB]$", ".weight", path) for path in paths}
    names = dict(zip(owners, weights.published_names(owners.values()), strict=True))
    return {
        path: name if path == owners[path] else f"{name.removesuffix('weight')}{path[-6:]}.weight"
        for path, name in names.items()
    }


def _scale(config: Mapping[str, Any]) -> float:
    """Checks peft's config, and returns the factor that scales the product B A.

    Raises:
        ValueError: If the config is not for LoRA, has an initialisation that changes the base weights, sets an
            unsupported field, or has an invalid `r` or `lora_alpha`.
        KeyError: If `r` or `lora_alpha` is missing.
    """
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{ADAPTER_CONFIG} has peft_type {quoted(config['peft_type'])}; expected LORA")
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        raise ValueError(
            f"{ADAPTER_CONFIG} has init_lora_weights {quoted(init)}, which changes the base weights; to convert the "
            "adapters to plain LoRA, save them with peft's path_initial_model_for_weight_conversion"
        )
    bias = [] if config.get("bias", "none") == "none" else ["bias"]
    if others := bias + [key for key, value in config.items() if key not in {*_INERT, "bias"} and value]:
        raise ValueError(f"{ADAPTER_CONFIG} sets {', '.join(map(quoted, others[:9]))}, which is not supported")
    rank, alpha = config["r"], config["lora_alpha"]
    if type(rank) is not int or rank < 1:
        raise ValueError(f"r is {quoted(rank)}; expected a whole number of at least 1")
    if type(alpha) not in (int, float) or not 0 < alpha < 1e9:
        raise ValueError(f"lora_alpha is {quoted(alpha)}; expected a number above 0 and below 1e9")
    return float(alpha / rank)
