"""Reads low-rank adapters in the Hugging Face `peft` format and merges them into a model's weights."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from bert_jax import hub, tree, weights
from bert_jax.errors import CheckpointError, InputError, ModelNotFoundError, quoted

# The fields of `LoraConfig` in `peft` 0.19 that a config may set. This module reads some of these fields. The rest,
# such as those that describe how the adapters were trained, do not change the meaning of the stored adapters. Loading
# fails if a config sets an unlisted field, for example one from a later version, because that field might change the
# meaning.
_INERT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""The values of `init_lora_weights` that leave the base weights unchanged."""

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Adapters(NamedTuple):
    """The contents of an adapter folder.

    Attributes:
        base: The path or Hub id of the base model; None if the adapter config does not specify one.
        revision: The branch, tag or commit of the base model; None if the adapter config does not specify one.
        scale: The factor by which the matrix product B A is multiplied.
        params: The float32 arrays, keyed by path: `….lora_A` [rank, in], `….lora_B` [out, rank], and the parameters
            that were trained directly, without adapters.
    """

    base: str | None
    revision: str | None
    scale: float
    params: dict[str, jax.Array]


def read(folder: Path, specs: Mapping[str, jax.ShapeDtypeStruct]) -> Adapters:
    """Reads an adapter folder.

    Args:
        folder: A folder written by `lora.save_adapters` or by `peft`.
        specs: The shapes and dtypes of the model's parameters, keyed by path.

    Raises:
        CheckpointError: If the files are missing, damaged or unsupported, or if they do not fit the model.
    """
    try:
        config = hub.read_json(folder / ADAPTER_CONFIG)
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        scale = _scale(config)
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"Cannot load adapters from {folder}: {str(error).rstrip('.')}.") from None
    matrices = [path.removesuffix(".weight") for path in specs if path.endswith(".weight") and specs[path].ndim == 2]
    adapters = [f"{name}.lora_{side}" for name in matrices for side in "AB"]
    by_name = {name: path for path, name in published([*specs, *adapters]).items()}
    params = {}
    for name, tensor in tensors.items():
        path = by_name.get(name.removeprefix("base_model.model."))
        if path is None:
            raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} has {name}, which this model does not have.")
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} contains NaN or infinity, in {name}.")
        params[path] = jnp.asarray(tensor, jnp.float32)
    whole = {name.removeprefix("base_model.model.").rpartition(".")[0] for name in tensors}
    modules = {name.rpartition(".")[0] for name in weights.published_names(specs)}
    for saved in config.get("modules_to_save") or ():
        if absent := {module for module in modules if f".{module}".endswith(f".{saved}")} - whole:
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS} lacks {min(absent)}, which modules_to_save names; save the adapters again."
            )
    expected = {path: specs[path].shape for path in params if path in specs}
    for name in {path.rpartition(".")[0] for path in adapters if path in params}:
        out, into = specs[f"{name}.weight"].shape
        expected |= {f"{name}.lora_A": (config["r"], into), f"{name}.lora_B": (out, config["r"])}
    found = {path: leaf.shape for path, leaf in params.items()}
    if wrong := [path for path in expected if found.get(path) != expected[path]]:
        wrong = [f"{path} has the shape {found.get(path)}; expected {expected[path]}" for path in wrong]
        raise CheckpointError(f"The adapters in {folder} do not fit this model:\n  " + "\n  ".join(wrong))
    return Adapters(config.get("base_model_name_or_path"), config.get("revision"), scale, params)


def load(
    folder: Path,
    specs: Mapping[str, jax.ShapeDtypeStruct],
    *,
    new: Iterable[str] = (),
    ignore: Iterable[str] = (),
    places: Mapping[str, jax.sharding.Sharding] | None = None,
) -> tuple[dict[str, jax.Array], weights.Report]:
    """Loads the base model of an adapter folder and merges the adapters into it.

    The arguments and return values are the same as for `weights.load`.

    Raises:
        InputError: If the model is not loaded in float32.
        ModelNotFoundError: If the base model does not exist.
        CheckpointError: If the adapters or the base model's weights cannot be used.
    """
    if any(spec.dtype != np.float32 for spec in specs.values()):
        raise InputError(
            f"{folder} contains adapters, which are merged in float32; expected dtype='float32'. For another dtype, "
            "save the merged model with save_pretrained, and load that."
        )
    found = read(folder, specs)
    if not isinstance(found.base, str):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} names no base model. Load that model, then call bert_jax.lora.load_adapters."
        )
    try:
        base = hub.download(found.base, revision=found.revision)
    except ModelNotFoundError as error:
        raise type(error)(f"The base model of the adapters in {folder} is missing: {error}") from None
    fresh = set(tree.select(new, specs))
    whole = [path for path in found.params if path in specs and path not in fresh]
    arrays, report = weights.load(base, specs, new=[*new, *map(re.escape, whole)], ignore=ignore, places=places)
    report.new = [path for path in report.new if path in fresh]
    kept = {path: leaf for path, leaf in found.params.items() if re.sub(r"\.lora_[AB]$", ".weight", path) not in fresh}
    merged = merge(arrays | kept, found.scale)
    return {path: jax.device_put(leaf, places and places[path]) for path, leaf in merged.items()}, report


def merge(params: Mapping[str, jax.Array], scale: float) -> dict[str, jax.Array]:
    """Merges the adapters into the weights: each weight W that has an adapter becomes W + scale · B A.

    Returns:
        The parameters without the adapters, keyed by path.
    """
    merged = {path: leaf for path, leaf in params.items() if not path.endswith((".lora_A", ".lora_B"))}
    for path in params:
        if path.endswith(".lora_A"):
            name = path.removesuffix(".lora_A")
            product = jnp.matmul(params[f"{name}.lora_B"], params[path], precision=jax.lax.Precision.HIGHEST)
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + scale * product
    return merged


def published(paths: Iterable[str]) -> dict[str, str]:
    """Maps each parameter path to the parameter's name in `peft` files, without the `base_model.model.` prefix.

    For example, matrix A of the module `m` is named `m.lora_A.weight`.
    """
    owners = {path: re.sub(r"\.lora_[AB]$", ".weight", path) for path in paths}
    names = dict(zip(owners, weights.published_names(owners.values()), strict=True))
    return {
        path: name if path == owners[path] else f"{name.removesuffix('weight')}{path[-6:]}.weight"
        for path, name in names.items()
    }


def _scale(config: Mapping[str, Any]) -> float:
    """Checks the `peft` config and returns the factor by which the matrix product B A is multiplied.

    Raises:
        ValueError: If the config is not for LoRA, specifies an initialization that changes the base weights, sets an
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
