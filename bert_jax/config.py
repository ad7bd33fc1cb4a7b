"""`BertConfig`: the hyperparameters of a BERT model. The fields have the same names as in `config.json`."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from bert_jax import hub
from bert_jax.errors import ConfigError, quoted

logger = logging.getLogger(__name__)

# Keys of config.json that affect a network's computation, each with the only value that this package supports.
# `BertConfig` has no fields for these keys.
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

# The largest accepted sizes, well above those of any published BERT model. A config with a larger size is rejected.
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

# Each pair consists of a field and a value outside the field's valid range. The field accepts this value, which means
# "not set".
_UNSET = [("num_labels", -1), ("pad_token_id", None), ("classifier_dropout", None), ("problem_type", None)]


class ConfigChanges(TypedDict, total=False):
    """The keyword arguments of `BertConfig.replace`: the fields to change, with their new values."""

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
    """The hyperparameters of a BERT model (Devlin et al. 2018, section 3).

    The fields have the same names as in Hugging Face's `config.json`.

    Raises:
        ConfigError: If a value is invalid or contradicts another value.
    """

    vocab_size: int = 28996
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    """The activation function. `gelu` is exact and uses erf; `gelu_new` is its tanh approximation."""
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    """The standard deviation of the normal distribution from which new weights are drawn.

    The distribution is truncated at twice this value.
    """
    layer_norm_eps: float = 1e-12
    """The number that LayerNorm adds to the variance."""
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    """The dropout rate before a classifier; None means that `hidden_dropout_prob` is used."""
    num_labels: int = -1
    """The number of labels.

    -1 means one label for each name in `id2label` or `label2id`, or 2 labels if there are no names.
    """
    id2label: Mapping[int | str, str] | Sequence[str] | None = None
    """The label names, given as a dict that maps ids to names or as a sequence of names in the order of their ids.

    The names are stored as a tuple. None means LABEL_0, LABEL_1, …
    """
    label2id: Mapping[str, int] | None = dataclasses.field(default=None, compare=False, repr=False)
    """The inverse of `id2label`. If one of the two is given, the other is derived from it."""
    problem_type: str | None = None

    def __post_init__(self) -> None:
        for name, valid, expected in self._checks():
            if not valid and (name, getattr(self, name)) not in _UNSET:
                raise ConfigError(f"{name} is {quoted(getattr(self, name))}; expected {expected}.")
        orders = [
            _in_order(field, value)
            for field, value in [("id2label", self.id2label), ("label2id", self.label2id or None)]
            if value is not None
        ]
        if len(set(orders)) > 1:
            raise ConfigError(
                f"id2label has the order {quoted(orders[0])}; expected that of label2id, {quoted(orders[1])}."
            )
        names = orders[0] if orders else None
        if self.num_labels == -1:
            object.__setattr__(self, "num_labels", len(names) if names else 2)
        elif names and self.num_labels != len(names):
            raise ConfigError(f"num_labels is {self.num_labels}; expected {len(names)}, the number of label names.")
        object.__setattr__(self, "id2label", names)  # `names` is a tuple, because jit hashes the config
        object.__setattr__(self, "label2id", {label: i for i, label in enumerate(self.labels)})

    def _checks(self) -> Iterator[tuple[str, bool, str]]:
        """Yields one tuple per check: a field name, whether the value is valid, and a description of valid values.

        Later checks rely on earlier ones, so the caller must raise an error at the first invalid value.
        """
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            yield name, _is_number(value, int) and 1 <= value <= limit, f"a whole number from 1 to {limit}"
        for name in ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]:
            value = getattr(self, name)
            yield name, _is_number(value) and 0 <= value < 1, "a probability of at least 0 and below 1"
        for name, limit in [("initializer_range", 100), ("layer_norm_eps", 1)]:
            value = getattr(self, name)
            yield name, _is_number(value) and 0 < value < limit, f"a number above 0 and below {limit}"
        pad, heads = self.pad_token_id, self.num_attention_heads
        yield "pad_token_id", _is_number(pad, int) and pad in range(self.vocab_size), "an id below vocab_size, or None"
        yield "hidden_size", self.hidden_size % heads == 0, f"a multiple of num_attention_heads {heads}"
        yield "hidden_act", self.hidden_act in HIDDEN_ACTS, f"one of {', '.join(HIDDEN_ACTS)}"
        yield "problem_type", self.problem_type in PROBLEM_TYPES, f"one of {', '.join(PROBLEM_TYPES)}"

    @classmethod
    def base_cased(cls) -> "BertConfig":
        """Returns the config of BERT-base, cased: 12 layers, hidden size 768, 12 heads.

        The model has 108,310,272 parameters, including the pooler.
        """
        return cls()

    @classmethod
    def large_cased(cls) -> "BertConfig":
        """Returns the config of BERT-large, cased: 24 layers, hidden size 1024, 16 heads.

        The model has 333,579,264 parameters, including the pooler.
        """
        return cls(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names in the order of their ids."""
        assert isinstance(self.id2label, tuple | None)  # __post_init__ has converted other types
        return self.id2label or tuple(f"LABEL_{i}" for i in range(self.num_labels))

    def replace(self, **changes: Unpack[ConfigChanges]) -> "BertConfig":
        """Returns a copy with some fields changed.

        Passing label names also updates `num_labels`. If `num_labels` changes and no names are given, the names become
        LABEL_0, LABEL_1, …

        Raises:
            ConfigError: If a field does not exist or a value is invalid.
        """
        fields = [field.name for field in dataclasses.fields(self)]
        if unknown := [name for name in changes if name not in fields]:
            raise ConfigError(f"The config has no {', '.join(unknown)}; it has {', '.join(fields)}.")
        values: dict[str, Any] = {"label2id": None, **changes}
        renamed = values.get("id2label") is not None or values["label2id"] is not None
        if renamed or values.get("num_labels", self.num_labels) != self.num_labels:
            values = {"num_labels": -1, "id2label": None, **values}
        return dataclasses.replace(self, **values)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "BertConfig":
        """Creates a config from a parsed `config.json`.

        Keys that are not BERT hyperparameters (`pooler_type`, `transformers_version`, …) are ignored.

        Args:
            config: A parsed `config.json`. It must contain `vocab_size`, `hidden_size`, `num_hidden_layers`,
                `num_attention_heads` and `intermediate_size`. All other keys are optional.

        Raises:
            ConfigError: If the config describes another kind of model, lacks a required key, or contains an unsupported
                value.
        """
        for key, value in _FIXED.items():
            if config.get(key, value) != value:
                raise ConfigError(
                    f"{key} is {quoted(config[key])}; this package supports only {value!r}. Give another checkpoint."
                )
        required = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
        if missing := [name for name in required if name not in config]:
            raise ConfigError(f"config.json lacks {', '.join(missing)}; expected the config.json of a BERT model.")
        known = {field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config}
        names = known.get("id2label")
        if names is not None:
            if not isinstance(names, Mapping):
                raise ConfigError(f"id2label is {quoted(names)}; expected a JSON object of ids and names.")
            # If the file contains both id2label and label2id, the former takes precedence, as in `transformers`.
            known.pop("label2id", None)
            if known.pop("num_labels", len(names)) != len(names):
                logger.warning("The %d label names override num_labels %s.", len(names), quoted(config["num_labels"]))
        return cls(**known)

    @classmethod
    def from_file(cls, path: str | Path) -> "BertConfig":
        """Reads a config from a JSON file.

        Raises:
            ConfigError: If the file cannot be read, or if `from_dict` rejects its contents.
        """
        config = hub.read_json(Path(path), ConfigError)
        try:
            return cls.from_dict(config)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents of a `config.json` that both this class and `transformers` can read."""
        config = {"model_type": "bert", "position_embedding_type": "absolute", **dataclasses.asdict(self)}
        del config["num_labels"]
        return config | {"id2label": {str(i): label for i, label in enumerate(self.labels)}}


def _is_number(value: Any, kind: Any = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _in_order(field: str, given: Any) -> tuple[str, ...]:
    """Returns the label names in the order of their ids.

    Args:
        field: "id2label" or "label2id".
        given: The field's value. For id2label: `{0: name, …}`, `{"0": name, …}`, or a list or tuple of names. For
            label2id: `{name: 0, …}`.

    Raises:
        ConfigError: If the value has another form, or if ids are missing or repeated.
    """
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        if field == "label2id":
            pairs = [(id, name) for name, id in given.items()]
        else:
            pairs = list(enumerate(given) if isinstance(given, list | tuple) else given.items())
        by_id = {int(id): name for id, name in pairs if not isinstance(id, float)}
        names = [by_id[i] for i in range(len(pairs))]
        if names and all(isinstance(name, str) or _is_number(name) for name in names):
            return tuple(map(str, names))
    raise ConfigError(f"{field} is {quoted(given)}; expected a name for each id from 0 on, without gaps.")
