"""Pooling and normalization settings of sentence-transformers models (Reimers & Gurevych 2019, arXiv:1908.10084).

Source: the file formats of the sentence-transformers library (`modules.json`, `1_Pooling/config.json`,
`sentence_bert_config.json` and `config_sentence_transformers.json`).
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, cast

from bert_jax import hub
from bert_jax.errors import CheckpointError, InputError, listed, quoted

# Maps each key of 1_Pooling/config.json that selects a pooling mode to the mode's name in newer versions of the file.
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

# The settings that each file may contain. ANY marks a setting that this module reads or that does not affect the
# vectors. For any other setting, only the given value is supported. A null value always means the default.
ANY = object()
_SETTINGS: dict[str, dict[str, Any]] = {
    "config_sentence_transformers.json": {
        "__version__": ANY, "prompts": ANY, "similarity_fn_name": ANY, "model_type": "SentenceTransformer",
    },
    "sentence_bert_config.json": {
        "max_seq_length": ANY,
        "do_lower_case": ANY,
        "transformer_task": "feature-extraction",
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "module_output_name": "token_embeddings",
        "processing_kwargs": {},
        "unpad_inputs": False,
    },
    "Pooling": dict.fromkeys(
        ["embedding_dimension", "word_embedding_dimension", "pooling_mode", "include_prompt", *_POOLINGS], ANY
    ),
    "Normalize": {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SentenceEmbedding:
    """The pooling, normalization and input settings of a sentence-transformers model.

    Raises:
        InputError: If a value is invalid.

    Attributes:
        pooling: "mean" takes the mean of all token vectors, including [CLS] and [SEP]; "cls" takes the vector of [CLS].
        size: The number of dimensions of a text's vector.
        normalize: Whether each text's vector is scaled to length 1.
        max_length: The maximum number of tokens per text, including special tokens; None for the tokenizer's maximum.
        lowercase: Whether texts are lowercased even if the tokenizer itself preserves case.
    """

    pooling: Literal["cls", "mean"]
    size: int
    normalize: bool = False
    max_length: int | None = None
    lowercase: bool = False

    def __post_init__(self) -> None:
        whole = [self.size] if self.max_length is None else [self.size, self.max_length]
        flags = [self.normalize, self.lowercase]
        if (
            self.pooling not in ("cls", "mean")
            or not all(type(number) is int and number > 0 for number in whole)
            or not all(type(flag) is bool for flag in flags)
        ):
            raise InputError(
                f"{quoted(vars(self))} is not a sentence embedding; expected the pooling 'cls' or 'mean', whole "
                "numbers above 0, and booleans."
            )

    @classmethod
    def from_pretrained(cls, model_id: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """Reads the settings of a model.

        Args:
            model_id: A folder or an id on the Hugging Face Hub.
            revision: Branch, tag or commit on the Hub.

        Raises:
            ModelNotFoundError: If the model does not exist.
            CheckpointError: If the model is not a sentence-transformers model, if a file is damaged, or if the model
                has a module, a pooling mode or a setting that this package does not support. The message names the
                unsupported item.
        """
        network = hub.download(model_id, revision=revision)
        if (found := hub.find_modules(network)) is None:
            raise CheckpointError(f"{network} is not a sentence-transformers model; expected {hub.MODULES_FILE}.")
        folder, modules = found
        kinds = [module.kind for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise CheckpointError(
                f"The modules of {folder} are {listed(kinds)}; expected Transformer, Pooling and optionally "
                "Normalize. Use sentence-transformers."
            )
        if not (network / hub.SENTENCE_FILES[1]).exists() and (others := [*network.glob("sentence_*_config.json")]):
            raise CheckpointError(f"{others[0]} is not supported; rename it to {hub.SENTENCE_FILES[1]}.")
        configs = {kind: _read(folder / path / hub.CONFIG_FILE, kind) for kind, path in modules[1:]}
        for place, name in zip((folder, network), hub.SENTENCE_FILES, strict=True):
            configs[name] = _read(place / name, name)
        config = configs["Pooling"]
        modes = config.get("pooling_mode") or [name for key, name in _POOLINGS.items() if config.get(key)] or "mean"
        modes = [modes] if isinstance(modes, str) else modes
        if modes not in (["cls"], ["mean"]):
            raise CheckpointError(
                f"{folder} has the pooling {quoted(modes)}; this package supports cls and mean. Use "
                "sentence-transformers."
            )
        size = config.get("embedding_dimension", config.get("word_embedding_dimension"))
        length = configs["sentence_bert_config.json"].get("max_seq_length")
        lowercase = configs["sentence_bert_config.json"].get("do_lower_case") or False
        try:
            return cls(cast(Any, modes[0]), cast(Any, size), "Normalize" in kinds, length, lowercase)
        except InputError as error:
            raise CheckpointError(f"{folder} is damaged: {error}") from None

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Adds sentence-transformers files to a folder that contains a saved model and its tokenizer.

        Raises:
            CheckpointError: If the folder cannot be written.
        """
        kinds = {"": "Transformer", "1_Pooling": "Pooling"} | ({"2_Normalize": "Normalize"} if self.normalize else {})
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds.items())
        ]
        pooling = {key: name == self.pooling for key, name in _POOLINGS.items()}
        contents = {
            hub.MODULES_FILE: modules,
            "1_Pooling/config.json": {"word_embedding_dimension": self.size, **pooling},
            "sentence_bert_config.json": {"max_seq_length": self.max_length, "do_lower_case": self.lowercase},
        }
        with hub.replacing(Path(folder)) as staging:
            (staging / "1_Pooling").mkdir()
            for name, content in contents.items():
                (staging / name).write_text(json.dumps(content, indent=2) + "\n")


def _read(path: Path, kind: str) -> Mapping[str, Any]:
    """Reads a settings file. The result is empty if the file does not exist.

    Raises:
        CheckpointError: If the file is damaged, or if a setting is unknown or has an unsupported value.
    """
    if not path.is_file():
        return {}
    config = hub.read_json(path)
    for key, value in config.items():
        supported = _SETTINGS[kind].get(key)
        if supported is not ANY and value not in (None, supported):
            expected = "no such setting" if supported is None else f"only {supported!r}"
            raise CheckpointError(f"{path}: {key} is {quoted(value)}; this package supports {expected}.")
    return config
