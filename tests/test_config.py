import json
from pathlib import Path

import pytest
import reference

from bert_jax import BertConfig
from bert_jax.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs" / "model"


@pytest.mark.parametrize(
    ("file", "expected"),
    [("bert_base_cased.json", BertConfig.base_cased()), ("bert_large_cased.json", BertConfig.large_cased())],
)
def test_shipped_configs(file, expected):
    assert BertConfig.from_file(CONFIGS / file) == expected


def test_base_and_large_are_the_published_ones():
    base, large = BertConfig.base_cased(), BertConfig.large_cased()
    assert (base.num_hidden_layers, base.hidden_size, base.num_attention_heads, base.intermediate_size) == (
        12, 768, 12, 3072,
    )  # fmt: skip
    assert (large.num_hidden_layers, large.hidden_size, large.num_attention_heads, large.intermediate_size) == (
        24, 1024, 16, 4096,
    )  # fmt: skip
    for config in (base, large):
        assert (config.vocab_size, config.max_position_embeddings, config.type_vocab_size) == (28996, 512, 2)
        assert (config.layer_norm_eps, config.hidden_act, config.initializer_range) == (1e-12, "gelu", 0.02)
        assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.pad_token_id) == (0.1, 0.1, 0)


def test_round_trip():
    config = BertConfig.from_dict(reference.CONFIG | {"problem_type": "regression", "classifier_dropout": 0.3})
    assert config.labels == ("A", "B", "C")
    assert BertConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(BertConfig.from_dict(config.to_dict()))


def test_keys_of_large_are_ignored():
    extra = {"directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12,
             "pooler_num_fc_layers": 3, "pooler_size_per_head": 128, "pooler_type": "first_token_transform",
             "transformers_version": "4.0", "gradient_checkpointing": False, "use_cache": True}  # fmt: skip
    assert BertConfig.from_dict(reference.CONFIG | extra) == BertConfig.from_dict(reference.CONFIG)


def test_without_model_type():
    config = {key: value for key, value in reference.CONFIG.items() if key != "model_type"}
    assert BertConfig.from_dict(config) == BertConfig.from_dict(reference.CONFIG)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "roberta"}, "roberta"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "swiglu"}, "swiglu"),
        ({"hidden_size": 9}, "num_attention_heads 2"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"hidden_dropout_prob": False}, "hidden_dropout_prob is False"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"hidden_size": 8.0}, r"hidden_size is 8\.0"),
        ({"max_position_embeddings": 10**15}, "max_position_embeddings"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"initializer_range": float("inf")}, "initializer_range is inf"),
        ({"attention_probs_dropout_prob": float("nan")}, "attention_probs_dropout_prob is nan"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x'"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"pad_token_id": 60}, "pad_token_id is 60"),
        ({"id2label": {"0": "A", "2": "B"}}, "without gaps"),
        ({"id2label": ["A", "B"]}, "expected a JSON object"),
        ({"id2label": {"0": "A", "1": None}}, "id2label"),
        ({"id2label": {}}, "id2label"),
        ({"id2label": "AB"}, "id2label"),
        ({"problem_type": "guessing"}, "guessing"),
    ],
)
def test_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        BertConfig.from_dict(reference.CONFIG | change)


def test_missing_sizes_are_all_named():
    with pytest.raises(ConfigError, match="hidden_size, num_hidden_layers"):
        BertConfig.from_dict({"vocab_size": 5, "num_attention_heads": 1, "intermediate_size": 1})


@pytest.mark.parametrize("content", ["{", "[]", "\xff", "[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}"])
def test_damaged_file(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config\.json"):
        BertConfig.from_file(tmp_path / "config.json")


@pytest.mark.parametrize(
    "names",
    [
        {"id2label": {1: "pos", 0: "neg"}},
        {"id2label": {"1": "pos", "0": "neg"}},
        {"id2label": ["neg", "pos"]},
        {"id2label": ("neg", "pos")},
        {"label2id": {"pos": 1, "neg": 0}},
        {"id2label": {0: "neg", 1: "pos"}, "label2id": {"pos": 1, "neg": 0}},
    ],
)
def test_names_of_labels(names):
    before = BertConfig.from_dict(reference.CONFIG)  # has three
    for config in (BertConfig(**names), before.replace(**names), before.replace(num_labels=2, **names)):
        assert config.labels == config.id2label == ("neg", "pos")
        assert config.label2id == {"neg": 0, "pos": 1}
        assert config.num_labels == 2
        assert config.to_dict()["id2label"] == {"0": "neg", "1": "pos"}
        assert config.to_dict()["label2id"] == {"neg": 0, "pos": 1}
    assert BertConfig(**names) == BertConfig(id2label=("neg", "pos"))
    assert hash(BertConfig(**names)) == hash(BertConfig(id2label=("neg", "pos")))


def test_the_number_of_labels_follows_from_their_names():
    assert BertConfig().labels == ("LABEL_0", "LABEL_1")
    assert BertConfig(id2label=list("abcdef")).num_labels == 6
    assert BertConfig.from_dict(reference.CONFIG).replace(id2label=dict(enumerate("abcdef"))).num_labels == 6


def test_names_that_contradict_each_other():
    with pytest.raises(ConfigError, match="expected that of label2id"):
        BertConfig(id2label={0: "neg", 1: "pos"}, label2id={"neg": 1, "pos": 0})
    with pytest.raises(ConfigError, match="label2id"):
        BertConfig(label2id={"neg": 0, "pos": 0})
    with pytest.raises(ConfigError, match="label2id"):
        BertConfig(label2id=["neg", "pos"])


def test_of_a_files_two_maps_the_names_by_id_count():
    """As in transformers: many published files have a `label2id` of another time."""
    found = BertConfig.from_dict(reference.CONFIG | {"label2id": {"C": 0, "B": 1, "A": 2}})
    assert found.labels == ("A", "B", "C")


def test_of_a_files_names_and_their_number_the_names_count(caplog):
    """A published classifier lists two names and fifty labels; `num_labels=50` loads it."""
    found = BertConfig.from_dict(reference.CONFIG | {"num_labels": 50})
    assert found.labels == ("A", "B", "C")
    assert "The 3 label names override num_labels 50" in caplog.text
    assert found.replace(num_labels=50).num_labels == 50


def test_messages_quote_little_of_what_was_given():
    for given in ("x" * 10**6, list(range(10**6)), {i: i for i in range(10**5)}, 10**5000):
        with pytest.raises(ConfigError) as error:
            BertConfig(hidden_act=given)
        assert len(str(error.value)) < 350


def test_replace_num_labels_drops_names():
    config = BertConfig.from_dict(reference.CONFIG)
    assert config.replace(num_labels=5).labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4")
    assert config.replace(num_labels=3).labels == ("A", "B", "C")
    with pytest.raises(ConfigError, match="num_labels is 2; expected 3"):
        BertConfig(num_labels=2, id2label=("A", "B", "C"))
