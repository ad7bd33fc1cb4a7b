"""Small models that are served, and a server of each kind."""

import json
import signal

import pytest
from flax import nnx
from serving import KEY, WORDS, start

import bert_jax

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


def save(model, path):
    """Saves a model with a tokenizer that knows a few words."""
    model.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(VOCABULARY))
    (path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 32}))
    return path


def config(**changes):
    return bert_jax.BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, initializer_range=0.5, **changes,
    )  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small model with both pretraining heads."""
    return save(bert_jax.BertForPreTraining(config(), rngs=nnx.Rngs(0)), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def pipes(folder):
    return {task: bert_jax.pipeline(task, folder) for task in ("fill-mask", "next-sentence-prediction")}


@pytest.fixture(scope="session")
def port(folder):
    process, port = start(folder)
    yield port
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


@pytest.fixture(scope="session")
def embedder(tmp_path_factory):
    """A sentence-transformers model that reads 16 tokens."""
    path = save(bert_jax.BertModel(config(), rngs=nnx.Rngs(1)), tmp_path_factory.mktemp("embedder"))
    bert_jax.SentenceEmbedding("mean", 8, normalize=True, max_length=16).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    labels = {"id2label": {0: "sad", 1: "glad", 2: "so so"}, "label2id": {"sad": 0, "glad": 1, "so so": 2}}
    model = bert_jax.BertForSequenceClassification(config(**labels), rngs=nnx.Rngs(2))
    return save(model, tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="session")
def reranker(tmp_path_factory):
    labels = {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    model = bert_jax.BertForSequenceClassification(config(**labels), rngs=nnx.Rngs(3))
    return save(model, tmp_path_factory.mktemp("reranker"))


@pytest.fixture(scope="session")
def several(embedder, classifier, reranker):
    """The port of a server of three models, which asks for `KEY` and accepts token ids."""
    names = [f"--name=embedder={embedder}", f"--name=classifier={classifier}"]
    process, port = start(embedder, classifier, reranker, *names, "--accept-token-ids", BERT_JAX_API_KEY=KEY)
    yield port
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
