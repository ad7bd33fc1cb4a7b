"""LoRA (Hu et al. 2021, arXiv:2106.09685): low-rank adapters for frozen weights, stored as plain arrays keyed by path.

The model itself contains no adapters. Before parameters are put into the model, each weight W that has an adapter is
replaced with W + alpha / rank · B A, and gradients flow through this sum to A and B. Adapters are saved separately in
the Hugging Face `peft` format.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from bert_jax import tree
from bert_jax.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, published, read
from bert_jax.adapters import merge as merge
from bert_jax.errors import InputError
from bert_jax.hub import MERGED_CONFIG_FILE, replacing
from bert_jax.pretrained import BertPreTrainedModel


@dataclass(frozen=True)
class LoRA:
    """The size and scale of adapters, and the weights that receive them.

    Attributes:
        rank: Number of rows in A and number of columns in B.
        alpha: The matrix product B A is multiplied by alpha / rank.
        targets: A regular expression that matches the paths of the weights that receive adapters.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = r"bert\.layers\.\d+\.attention\.(query|value)\.weight"

    @property
    def scale(self) -> float:
        """The factor by which the matrix product B A is multiplied."""
        return self.alpha / self.rank


def init(lora: LoRA, specs: Mapping[str, jax.ShapeDtypeStruct], key: jax.Array) -> dict[str, jax.Array]:
    """Creates adapters.

    The entries of A are uniformly distributed between -1/√in and 1/√in, as in `peft`. B is initialized to zero, so the
    adapters do not change the model initially.

    Args:
        lora: Specifies the rank of the adapters and which weights receive them.
        specs: The shapes and dtypes of the model's parameters, keyed by path.
        key: PRNG key.

    Returns:
        Two adapters for each matched `….weight` [out, in]: `….lora_A`, float32 [rank, in], and `….lora_B`, float32
        [out, rank].

    Raises:
        InputError: If `lora.targets` matches no parameter, or if it matches a parameter that is not the weight of a
            linear layer.
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


def save_adapters(
    folder: Path,
    params: Mapping[str, Any],
    lora: LoRA,
    base: str,
    task_type: str,
    *,
    revision: str | None = None,
    model: BertPreTrainedModel | None = None,
) -> None:
    """Writes the adapters, and any parameters that were trained without adapters, in the `peft` format.

    Args:
        folder: The folder; it is created if it does not exist.
        params: All trained parameters, including adapters, keyed by path.
        lora: Specifies the rank and alpha of the adapters.
        base: Name or path of the base model.
        task_type: The `peft` name of the task type: "SEQ_CLS", "TOKEN_CLS" or "QUESTION_ANS".
        revision: Branch, tag or commit of the base model on the Hub.
        model: The trained model. If it is given, its config is written to `merged_config.json`, so that
            `from_pretrained` can load the folder.

    Raises:
        CheckpointError: If the folder cannot be written.
    """
    names = published(params)
    tensors = {f"base_model.model.{name}": np.asarray(params[path]) for path, name in names.items()}
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        # Full module names are listed, because `peft` would apply a shorter name to all modules whose names end with
        # it.
        "target_modules": sorted({name.partition(".lora_")[0] for name in names.values() if ".lora_" in name}),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in names.values() if ".lora_" not in name}),
    }
    with replacing(folder) as staging:
        save_file(tensors, staging / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (staging / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if model is not None:
            (staging / MERGED_CONFIG_FILE).write_text(json.dumps(model.config_json(), indent=2) + "\n")


def load_adapters(folder: Path, model: BertPreTrainedModel) -> BertPreTrainedModel:
    """Returns a model with adapters from a folder merged into its weights.

    If the folder also contains parameters that were trained without adapters, they replace those of the model.

    Args:
        folder: A folder written by `save_adapters` or `peft`.
        model: The base model of the adapters.

    Raises:
        InputError: If the model is not loaded in float32.
        CheckpointError: If the files are missing, damaged or unsupported, or if they do not fit the model.
    """
    model.check_float32("load_adapters")
    params, skeleton = tree.split(model)
    found = read(folder, skeleton.specs)
    merged = merge(tree.flatten(params) | found.params, found.scale)
    loaded: BertPreTrainedModel = tree.merge(skeleton, tree.unflatten(merged))
    return loaded
