"""What sentence-transformers folders declare, and `pooling="auto"`. Its numbers: parity/test_sentence_vectors.py."""

import json
import re
import shutil

import numpy as np
import pytest

import bert_jax
from bert_jax import hub
from bert_jax.errors import CheckpointError, InputError

SIZE = 384  # of bert-mini-cased


def modules(*kinds):
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], 1))]
    return [
        {"path": path, "type": kind if "." in kind else f"sentence_transformers.models.{kind}"}
        for path, kind in zip(paths, kinds, strict=True)
    ]


def write(folder, files):
    """Adds JSON files to a folder with the config of the embedded model."""
    files = {"modules.json": modules("Transformer", "Pooling"), "1_Pooling/config.json": MEAN} | files
    shutil.copytree(hub.EMBEDDED / "bert-mini-cased", folder)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


MEAN = {"word_embedding_dimension": SIZE, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
NORMALIZED = modules("Transformer", "Pooling", "Normalize")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ("mean", SIZE, False, None, False)),
        ({"modules.json": NORMALIZED}, ("mean", SIZE, True, None, False)),
        ({"1_Pooling/config.json": {"embedding_dimension": SIZE}}, ("mean", SIZE, False, None, False)),
        ({"1_Pooling/config.json": {"embedding_dimension": 8, "pooling_mode": "cls"}}, ("cls", 8, False, None, False)),
        (
            {"1_Pooling/config.json": MEAN | {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}},
            ("cls", SIZE, False, None, False),
        ),
        (
            {"sentence_bert_config.json": {"max_seq_length": 20, "do_lower_case": True}},
            ("mean", SIZE, False, 20, True),
        ),
        (
            {"config_sentence_transformers.json": {"prompts": {"q": "query: "}, "default_prompt_name": None}},
            ("mean", SIZE, False, None, False),
        ),
    ],
)
def test_what_is_read_is_saved(tmp_path, files, expected):
    folder = write(tmp_path / "model", files)
    embedding = bert_jax.SentenceEmbedding.from_pretrained(folder)
    assert embedding == bert_jax.SentenceEmbedding(*expected)
    shutil.copytree(hub.EMBEDDED / "bert-mini-cased", tmp_path / "saved")
    embedding.save_pretrained(tmp_path / "saved")
    assert bert_jax.SentenceEmbedding.from_pretrained(tmp_path / "saved") == embedding


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": "["}, "modules.json is damaged"),
        ({"modules.json": "[]"}, "modules.json is damaged"),
        ({"modules.json": [{"path": "../other", "type": "a.Transformer"}]}, "modules.json is damaged"),
        ({"modules.json": modules("Transformer")}, "are Transformer; expected Transformer, Pooling and optionally"),
        ({"modules.json": modules("Transformer", "Pooling", "Dense")}, "are Transformer, Pooling, Dense; expected"),
        ({"modules.json": modules("custom_st.Transformer", "Pooling")}, "are custom_st.Transformer, Pooling; expected"),
        ({"1_Pooling/config.json": MEAN | {"pooling_mode_max_tokens": True}}, "has the pooling ['mean', 'max']"),
        ({"1_Pooling/config.json": MEAN | {"pooling_mode": "max"}}, "has the pooling ['max']; this package"),
        ({"1_Pooling/config.json": MEAN | {"pooling_mode_new": True}}, "pooling_mode_new is True; this package"),
        ({"1_Pooling/config.json": MEAN | {"word_embedding_dimension": "8"}}, "'size': '8'"),
        ({"1_Pooling/config.json": "{"}, "is damaged"),
        ({"sentence_bert_config.json": {"max_seq_length": "x"}}, "is damaged: {"),
        ({"sentence_roberta_config.json": {}}, "sentence_roberta_config.json is not supported; rename it"),
        ({"sentence_bert_config.json": {"transformer_task": "fill-mask"}}, "supports only 'feature-extraction'"),
        ({"config_sentence_transformers.json": {"default_prompt_name": "q"}}, "default_prompt_name is 'q'; this"),
        ({"config_sentence_transformers.json": {"model_type": "SparseEncoder"}}, "only 'SentenceTransformer'"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, files, message):
    folder = write(tmp_path / "model", files)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        bert_jax.SentenceEmbedding.from_pretrained(folder)
    if "modules.json is damaged" not in message:
        pipe = bert_jax.pipeline("feature-extraction", folder)
        assert pipe("a text", pooling="mean").shape == (SIZE,)
        with pytest.raises(InputError, match=re.escape(message)):
            pipe("a text", pooling="auto")


def test_a_folder_of_no_such_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a sentence-transformers model; expected modules.json"):
        bert_jax.SentenceEmbedding.from_pretrained("bert-mini-cased")


@pytest.fixture(scope="module")
def plain():
    return bert_jax.pipeline("feature-extraction", "bert-mini-cased")


LONG = "word " * 40


def test_auto(tmp_path, plain):
    files = {"modules.json": NORMALIZED, "sentence_bert_config.json": {"max_seq_length": 20}}
    pipe = bert_jax.pipeline("feature-extraction", write(tmp_path / "model", files))
    short = bert_jax.Tokenizer.from_pretrained("bert-mini-cased").decode(plain.tokenizer(LONG)["input_ids"][0][1:19])
    for text, cut in [("a text", "a text"), (LONG, short)]:
        expected = plain(cut, pooling="mean", normalize=True)
        np.testing.assert_allclose(pipe(text, pooling="auto"), expected, atol=1e-6)
    assert pipe(LONG).shape == (42, SIZE)  # only "auto" takes the declared length
    with pytest.raises(InputError, match=r"layers is \[7\]; expected"):
        pipe.task.embed("a", layers=[7])


def test_normalize_on_top_of_a_model_that_does_not(tmp_path, plain):
    pipe = bert_jax.pipeline("feature-extraction", write(tmp_path / "model", {}))
    np.testing.assert_allclose(pipe("a", pooling="auto"), plain("a", pooling="mean"), atol=1e-6)
    expected = plain("a", pooling="mean", normalize=True)
    np.testing.assert_allclose(pipe("a", pooling="auto", normalize=True), expected, atol=1e-6)


def test_auto_without_a_declaration(plain, tmp_path):
    with pytest.raises(InputError, match="is not a sentence-transformers model"):
        plain("a", pooling="auto")
    model = bert_jax.BertModel.from_pretrained("bert-mini-cased", add_pooling_layer=False)
    loaded = bert_jax.pipeline("feature-extraction", model, tokenizer=plain.tokenizer)
    with pytest.raises(InputError, match="was not loaded from a folder; expected 'cls' or 'mean'"):
        loaded("a", pooling="auto")
    pipe = bert_jax.pipeline(
        "feature-extraction", write(tmp_path / "size", {"1_Pooling/config.json": {"embedding_dimension": 8}})
    )
    with pytest.raises(InputError, match="declares vectors of 8 dimensions; the model has 384"):
        pipe("a", pooling="auto")
    pipe = bert_jax.pipeline(
        "feature-extraction", write(tmp_path / "lower", {"sentence_bert_config.json": {"do_lower_case": True}})
    )
    with pytest.raises(InputError, match="declares do_lower_case, but its tokenizer keeps the case"):
        pipe("a", pooling="auto")
    settings = {"model_max_length": 64, "tokenizer_class": "BertTokenizer", "do_lower_case": False}
    files = {"sentence_bert_config.json": {"max_seq_length": 128}, "tokenizer_config.json": settings}
    pipe = bert_jax.pipeline("feature-extraction", write(tmp_path / "longer", files))
    with pytest.raises(InputError, match="max_seq_length 128, but its tokenizer has the model_max_length 64"):
        pipe("a", pooling="auto")


@pytest.mark.parametrize(
    "arguments", [("CLS", 8), ("max", 8), ("mean", "8"), ("mean", 0), ("mean", 8, 1), ("mean", 8, True, "x")]
)
def test_values_that_are_refused(arguments):
    with pytest.raises(InputError, match="is not a sentence embedding; expected the pooling 'cls' or 'mean'"):
        bert_jax.SentenceEmbedding(*arguments)


def test_a_network_beside_a_config_of_the_library(tmp_path):
    """The first versions of sentence-transformers wrote a config.json of their own."""
    folder = write(tmp_path / "model", {})
    (folder / "0_Transformer").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file() and path.name != "modules.json"]:
        path.rename(folder / "0_Transformer" / path.name)
    (folder / "config.json").write_text('{"__version__": "0.2.0"}')
    listed = modules("Transformer", "Pooling")
    listed[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(listed))
    assert bert_jax.pipeline("feature-extraction", folder)("a", pooling="auto").shape == (SIZE,)
    # A folder that happens to be in one with another modules.json is a model of its own.
    (tmp_path / "modules.json").write_text("[]")
    assert hub.find_modules(folder / "1_Pooling") is None
    assert hub.find_modules(tmp_path / "other") is None
