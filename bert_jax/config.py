"""`BertConfig`: the hyperparameters in `config.json` that the network supports, under the same names."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from bert_jax import hub
from bert_jax.errors import ConfigError, quoted

logger = logging.getLogger(__name__)

# Other keys of config.json that would change the numbers -> the only value that the network supports.
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
HIDDEN_ACTS = ("gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "relu")

# The largest accepted sizes, well above any published BERT. Larger sizes are refused before anything is built.
_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**16,
    "num_hidden_layers": 256,
    "num_attention_heads": 2**16,
    "intermediate_size": 2**20,
    "max_position_embeddings": 2**20,
    "type_vocab_size": 2**16,
    "num_labels": 2**20,
}


class ConfigChanges(TypedDict, total=False):
    """Fields of `BertConfig` to change."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    max_position_embeddings: int
    type_vocab_size: int
    initializer_range: float
    layer_norm_eps: float
    pad_token_id: int | None
    classifier_dropout: float | None
    num_labels: int
    id2label: Mapping[int | str, str] | Mapping[int, str] | Mapping[str, str] | Sequence[str] | None
    label2id: Mapping[str, int] | None
    problem_type: str | None


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Hyperparameters of BERT (Devlin et al. 2018, section 3), with the field names of Hugging Face's `config.json`.

    Sizes are counts, `layer_norm_eps` is added to a variance, and dropouts are probabilities.

    Raises:
        ConfigError: If a value is invalid or describes a network that is not a BERT.
    """

    vocab_size: int = 28996
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    """`gelu` is exact and uses erf; `gelu_new` is the tanh approximation."""
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    """The standard deviation of the truncated normal that new weights are drawn from."""
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    """Dropout before a classifier; None uses `hidden_dropout_prob`."""
    num_labels: int = -1
    """The number of labels of a classifier; by default that of the names in `id2label` or `label2id`, or 2."""
    id2label: Mapping[int | str, str] | Sequence[str] | None = None
    """The label names, as a dict by id or in the order of ids; stored as a tuple. None means LABEL_0, LABEL_1, …"""
    label2id: Mapping[str, int] | None = dataclasses.field(default=None, compare=False, repr=False)
    """The inverse of `id2label`; may be given instead of it."""
    problem_type: str | None = None

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if name == "num_labels" and value == -1:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise ConfigError(f"{name} is {quoted(value)}; expected a whole number from 1 to {limit}.")
        for name in ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]:
            value = getattr(self, name)
            if not (name == "classifier_dropout" and value is None) and not (_is_number(value) and 0 <= value < 1):
                raise ConfigError(f"{name} is {quoted(value)}; expected a probability: 0 or more and below 1.")
        for name, limit in [("initializer_range", 100), ("layer_norm_eps", 1)]:
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < limit:
                raise ConfigError(f"{name} is {quoted(value)}; expected a number above 0 and below {limit}.")
        pad = self.pad_token_id
        if pad is not None and (not isinstance(pad, int) or isinstance(pad, bool) or not 0 <= pad < self.vocab_size):
            raise ConfigError(f"pad_token_id is {quoted(pad)}; expected a token id below vocab_size, or None.")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}; "
                "every head has the same size."
            )
        if self.hidden_act not in HIDDEN_ACTS:
            raise ConfigError(f"hidden_act is {quoted(self.hidden_act)}; expected one of {', '.join(HIDDEN_ACTS)}.")
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ConfigError(
                f"problem_type is {quoted(self.problem_type)}; expected one of {', '.join(PROBLEM_TYPES)}."
            )
        names = _label_names(self.id2label, self.label2id)
        if names is not None and self.num_labels not in (-1, len(names)):
            raise ConfigError(f"There are names of {len(names)} labels, but num_labels is {self.num_labels}.")
        count = (2 if names is None else len(names)) if self.num_labels == -1 else self.num_labels
        # A config is static under jit, so the fields that are compared must be hashable.
        for name, value in [("num_labels", count), ("id2label", names)]:
            object.__setattr__(self, name, value)
        object.__setattr__(self, "label2id", {label: i for i, label in enumerate(self.labels)})

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
        """The label names in the order of their ids."""
        assert isinstance(self.id2label, tuple | None)  # set by __post_init__
        return self.id2label or tuple(f"LABEL_{i}" for i in range(self.num_labels))

    def replace(self, **changes: Unpack[ConfigChanges]) -> "BertConfig":
        """A copy with some fields changed. A new number of labels, or new names, replace the old names.

        Raises:
            ConfigError: If a field does not exist, or a value is invalid.
        """
        fields = [field.name for field in dataclasses.fields(self)]
        if unknown := [name for name in changes if name not in fields]:
            raise ConfigError(f"The config has no {', '.join(unknown)}; it has {', '.join(fields)}.")
        named = changes.get("id2label") is not None or changes.get("label2id") is not None
        values: dict[str, Any] = {"label2id": None, **changes}
        if named or changes.get("num_labels", self.num_labels) != self.num_labels:
            values = {"num_labels": -1, "id2label": None, **values}
        return dataclasses.replace(self, **values)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "BertConfig":
        """The config that a parsed `config.json` describes.

        Keys that are not BERT's hyperparameters (`pooler_type`, `transformers_version`, …) are ignored.

        Args:
            config: A parsed `config.json`. Without `model_type`, it is accepted if it has BERT's sizes.

        Raises:
            ConfigError: If the file belongs to another model, or a value asks for something that is not supported.
        """
        if config.get("model_type", "bert") != "bert":
            raise ConfigError(
                f"model_type is {quoted(config['model_type'])}; this package supports only BERT. "
                "Give a checkpoint whose config.json says model_type: bert."
            )
        required = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
        if missing := [name for name in required if name not in config]:
            raise ConfigError(f"config.json lacks {', '.join(missing)}; expected the config.json of a BERT model.")
        for key, value in _FIXED.items():
            if config.get(key, value) != value:
                raise ConfigError(
                    f"config.json sets {key}: {quoted(config[key])}; this package supports only {key}: {value!r}."
                )
        fields = {field.name for field in dataclasses.fields(cls)}
        known = {key: value for key, value in config.items() if key in fields}
        if known.get("id2label") is not None:
            if not isinstance(known["id2label"], Mapping):
                raise ConfigError(f"id2label is {quoted(known['id2label'])}; expected a JSON object of ids and names.")
            known.pop("label2id", None)  # as in transformers: id2label takes precedence over label2id
            if known.pop("num_labels", count := len(known["id2label"])) != count:
                logger.warning(
                    "config.json names %d labels, but num_labels is %s; the names take precedence.",
                    count,
                    quoted(config["num_labels"]),
                )
        return cls(**known)

    @classmethod
    def from_file(cls, path: str | Path) -> "BertConfig":
        """The config in a JSON file; `from_dict` describes what is refused."""
        config = hub.read_json(Path(path), ConfigError)
        try:
            return cls.from_dict(config)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that this class and PyTorch transformers read."""
        config = {"model_type": "bert", "position_embedding_type": "absolute", **dataclasses.asdict(self)}
        del config["num_labels"]
        return config | {"id2label": {str(i): label for i, label in enumerate(self.labels)}}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label_names(id2label: Any, label2id: Any) -> tuple[str, ...] | None:
    """The label names in the order of their ids, from one map or both; None if neither is given."""
    names = None if id2label is None else _in_order("id2label", id2label)
    if not label2id:
        return names
    expected = f"label2id is {quoted(label2id)}; expected {{name: 0, name: 1, …}}."
    if not isinstance(label2id, Mapping):
        raise ConfigError(expected)
    inverse = _in_order("label2id", {id: name for name, id in label2id.items()})
    if len(inverse) != len(label2id):
        raise ConfigError(expected)
    if names not in (None, inverse):
        raise ConfigError(f"id2label names {quoted(names)} and label2id {quoted(inverse)}; expected the same order.")
    return inverse


def _in_order(field: str, given: Any) -> tuple[str, ...]:
    """Names in the order of their ids, from `{0: name, …}`, `{"0": name, …}` or a list or tuple of names."""
    if not isinstance(given, Mapping):
        given = dict(enumerate(given)) if isinstance(given, list | tuple) else {None: given}
    try:
        by_id = {int(id): name for id, name in given.items() if not isinstance(id, float)}
        names = [by_id[i] for i in range(len(given))]
    except (TypeError, ValueError, KeyError):
        names = []
    if not names or not all(isinstance(name, str) or _is_number(name) for name in names):
        raise ConfigError(f"{field} is {quoted(given)}; expected a name for each id from 0 on, without gaps.")
    return tuple(map(str, names))
