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
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: 'relative_key'"),
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
        ({"id2label": {"0": "A", "2": "B"}}, r"\[0, 2\]"),
        ({"id2label": ["A", "B"]}, "id2label"),
        ({"problem_type": "guessing"}, "guessing"),
    ],
)
def test_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        BertConfig.from_dict(reference.CONFIG | change)


def test_missing_sizes_are_all_named():
    with pytest.raises(ConfigError, match="hidden_size, num_hidden_layers"):
        BertConfig.from_dict({"vocab_size": 5, "num_attention_heads": 1, "intermediate_size": 1})


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_damaged_file(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config\.json"):
        BertConfig.from_file(tmp_path / "config.json")


def test_replace_num_labels_drops_names():
    config = BertConfig.from_dict(reference.CONFIG)
    assert config.replace(num_labels=5).labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4")
    assert config.replace(num_labels=3).labels == ("A", "B", "C")
    with pytest.raises(ConfigError, match="names 3 labels"):
        BertConfig(num_labels=2, id2label=("A", "B", "C"))
