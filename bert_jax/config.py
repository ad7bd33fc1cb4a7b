"""`BertConfig`: the hyperparameters of `config.json`, by their names, and nothing that the network does not do."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from bert_jax.errors import ConfigError

# What else a config.json may ask for that would change the numbers: key -> the one value the network has.
_FIXED = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "pruned_heads": {},
    "quantization_config": None,
}

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
HIDDEN_ACTS = ("gelu", "gelu_new", "relu")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Hyperparameters of BERT (Devlin et al. 2018, section 3; field names of Hugging Face's `config.json`).

    Sizes are counts; `layer_norm_eps` is added to a variance; dropouts are probabilities.

    Raises:
        ConfigError: If a value is of the wrong kind or describes a network that is not BERT's.
    """

    vocab_size: int = 28996
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    """`gelu` is the exact one, by erf; `gelu_new` is the tanh approximation."""
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    """Standard deviation of the truncated normal that new weights are drawn from."""
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    """Dropout before a classifier; None takes `hidden_dropout_prob`."""
    num_labels: int = 2
    id2label: tuple[str, ...] | None = None
    """Names of the labels by id; None names them LABEL_0, LABEL_1, …"""
    problem_type: str | None = None

    def __post_init__(self) -> None:
        if self.id2label is not None:
            object.__setattr__(self, "id2label", tuple(self.id2label))  # hashable: a config is static under jit
        sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
        for name in [*sizes, "max_position_embeddings", "type_vocab_size", "num_labels"]:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1.")
        for name in ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]:
            value = getattr(self, name)
            if value is None and name == "classifier_dropout":
                continue
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ConfigError(f"{name} is {value!r}; expected a probability: 0 or more and below 1.")
        for name in ["initializer_range", "layer_norm_eps"]:
            value = getattr(self, name)
            if not isinstance(value, int | float) or value <= 0:
                raise ConfigError(f"{name} is {value!r}; expected a number above 0.")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}; "
                "every head takes an equal share."
            )
        if self.hidden_act not in HIDDEN_ACTS:
            raise ConfigError(f"hidden_act is {self.hidden_act!r}; this network has {', '.join(HIDDEN_ACTS)}.")
        if self.id2label is not None and len(self.id2label) != self.num_labels:
            raise ConfigError(f"id2label names {len(self.id2label)} labels where num_labels is {self.num_labels}.")
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ConfigError(f"problem_type is {self.problem_type!r}; expected one of {', '.join(PROBLEM_TYPES)}.")

    @classmethod
    def base_cased(cls) -> "BertConfig":
        """BERT-base, cased: 12 layers, 768 wide, 12 heads; 108,310,272 parameters with the pooler."""
        return cls()

    @classmethod
    def large_cased(cls) -> "BertConfig":
        """BERT-large, cased: 24 layers, 1024 wide, 16 heads; 333,579,264 parameters with the pooler."""
        return cls(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in the order of their ids."""
        return self.id2label or tuple(f"LABEL_{i}" for i in range(self.num_labels))

    def replace(self, **changes: Any) -> "BertConfig":
        """A copy with some fields changed; a new `num_labels` drops the names of the old labels.

        Raises:
            ConfigError: If there is no such field, or a value is none for it.
        """
        fields = [field.name for field in dataclasses.fields(self)]
        if unknown := [name for name in changes if name not in fields]:
            raise ConfigError(f"The config has no {', '.join(unknown)}; it has {', '.join(fields)}.")
        if "num_labels" in changes and changes["num_labels"] != self.num_labels:
            changes.setdefault("id2label", None)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "BertConfig":
        """The config that a parsed `config.json` describes.

        Keys that are not BERT's hyperparameters (`pooler_type`, `transformers_version`, …) are ignored.

        Args:
            config: A parsed `config.json`. One without `model_type` is taken if it has BERT's sizes.

        Raises:
            ConfigError: If the file is of another model, or a value asks for what the network does not do.
        """
        if config.get("model_type", "bert") != "bert":
            raise ConfigError(
                f"model_type is {config['model_type']!r}; this package holds BERT. "
                "Give a checkpoint whose config.json says model_type: bert."
            )
        required = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
        if missing := [name for name in required if name not in config]:
            raise ConfigError(f"config.json lacks {', '.join(missing)}; it is not the configuration of a BERT.")
        if refused := [f"{key}: {config[key]!r}" for key in _FIXED if config.get(key, _FIXED[key]) != _FIXED[key]]:
            raise ConfigError(
                f"config.json asks for {'; '.join(refused)}, which this network does not do "
                f"(it has {'; '.join(f'{key}: {value!r}' for key, value in _FIXED.items())})."
            )
        fields = {field.name for field in dataclasses.fields(cls)}
        known = {key: value for key, value in config.items() if key in fields}
        if (names := config.get("id2label")) is not None:
            known["id2label"] = _label_names(names)
            known["num_labels"] = len(known["id2label"])
        return cls(**known)

    @classmethod
    def from_file(cls, path: str | Path) -> "BertConfig":
        """`from_dict` of a JSON file; see there for what is refused."""
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not JSON: {error}.") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{path} holds a {type(config).__name__}; expected an object of hyperparameters.")
        try:
            return cls.from_dict(config)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that this class and PyTorch transformers read."""
        config = {"model_type": "bert", "position_embedding_type": "absolute", **dataclasses.asdict(self)}
        del config["num_labels"]
        config["id2label"] = {str(i): label for i, label in enumerate(self.labels)}
        config["label2id"] = {label: i for i, label in enumerate(self.labels)}
        return config


def _label_names(id2label: Any) -> tuple[str, ...]:
    """Names in the order of their ids, from `{"0": name, …}`."""
    try:
        by_id = {int(i): str(name) for i, name in id2label.items()}
    except (AttributeError, ValueError):
        raise ConfigError(f'id2label is {id2label!r}; expected {{"0": name, "1": name, …}}.') from None
    if sorted(by_id) != list(range(len(by_id))):
        raise ConfigError(f"id2label has the ids {sorted(by_id)}; expected 0 to {len(by_id) - 1} without gaps.")
    return tuple(by_id[i] for i in range(len(by_id)))
