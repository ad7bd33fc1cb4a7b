"""The routes of text-embeddings-inference, with the requests of its documentation."""

import json

import numpy as np
import pytest
from serving import KEY, ask, same

import bert_jax
from bert_jax.inference.server import tei

HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
TEXTS = ["paris is the capital of france", "she went home"]


@pytest.fixture
def post(several):
    def post(path, body):
        status, _, content = ask(several, "POST", path, body, headers=HEADERS)
        return status, json.loads(content)

    return post


def test_embed(post, embedder):
    pipe = bert_jax.pipeline("feature-extraction", embedder)
    status, vectors = post("/embed", {"inputs": TEXTS})
    assert status == 200
    np.testing.assert_allclose(vectors, pipe(TEXTS, pooling="auto"), atol=1e-6)
    np.testing.assert_allclose(post("/embed", {"inputs": TEXTS[0]})[1], vectors[:1], atol=1e-6)
    _, longer = post("/embed", {"inputs": TEXTS, "normalize": False})
    np.testing.assert_allclose(longer, pipe(TEXTS, pooling="mean"), atol=1e-6)
    _, truncated = post("/embed", {"inputs": "she " * 40, "truncate": True, "truncation_direction": "Right"})
    np.testing.assert_allclose(truncated, pipe(["she " * 40], pooling="auto"), atol=1e-6)
    _, tokens = post("/embed_all", {"inputs": TEXTS})
    for given, expected in zip(tokens, pipe(TEXTS), strict=True):
        np.testing.assert_allclose(given, expected, atol=1e-5)


def test_truncated_texts_count_as_what_is_left_of_them(post):
    """2,000 texts of 60 words have 120,000 words, and 16 tokens each after truncation: 32,000 of 32,768."""
    assert post("/embed", {"inputs": ["a " * 60] * 2000, "truncate": True})[0] == 200


def test_predict(post, classifier):
    pipe = bert_jax.pipeline("text-classification", classifier)
    assert same(post("/predict", {"inputs": TEXTS[0]})[1], pipe(TEXTS[0], top_k=None))
    assert same(post("/predict", {"inputs": TEXTS})[1], pipe(tuple(TEXTS), top_k=None))  # a pair
    assert same(post("/predict", {"inputs": [[TEXTS[0]], TEXTS]})[1], pipe([TEXTS[0], tuple(TEXTS)], top_k=None))
    _, raw = post("/predict", {"inputs": TEXTS[0], "raw_scores": True})
    logits = np.array([entry["score"] for entry in raw])
    scores = [entry["score"] for entry in pipe(TEXTS[0], top_k=None)]
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(), scores, atol=1e-6)


def test_rerank(post, reranker):
    model = bert_jax.BertForSequenceClassification.from_pretrained(reranker)
    tokenizer = bert_jax.Tokenizer.from_pretrained(reranker)
    texts = ["she went home", "paris", "a good day", "the capital of france"]
    logits = np.array(model(**tokenizer(["paris is"] * 4, texts)).logits[:, 0])
    status, ranks = post("/rerank", {"query": "paris is", "texts": texts, "raw_scores": True})
    assert status == 200
    assert [rank["index"] for rank in ranks] == np.argsort(-logits).tolist()
    np.testing.assert_allclose([rank["score"] for rank in ranks], np.sort(logits)[::-1], atol=1e-5)
    _, ranks = post("/rerank", {"query": "paris is", "texts": texts, "return_text": True})
    assert [rank["text"] for rank in ranks] == [texts[rank["index"]] for rank in ranks]
    np.testing.assert_allclose([rank["score"] for rank in ranks], 1 / (1 + np.exp(-np.sort(logits)[::-1])), atol=1e-6)


def test_tokenize(post):
    _, (tokens,) = post("/tokenize", {"inputs": "She went?"})
    assert tokens == [
        {"id": 2, "text": "[CLS]", "special": True, "start": None, "stop": None},
        {"id": 20, "text": "She", "special": False, "start": 0, "stop": 3},
        {"id": 22, "text": "went", "special": False, "start": 4, "stop": 8},
        {"id": 19, "text": "?", "special": False, "start": 8, "stop": 9},
        {"id": 3, "text": "[SEP]", "special": True, "start": None, "stop": None},
    ]
    assert len(post("/tokenize", {"inputs": ["she", "he"], "add_special_tokens": False})[1][1]) == 1


def test_info(several):
    info = json.loads(ask(several, "GET", "/info", headers=HEADERS)[2])
    assert info["model_id"] == "embedder"
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert info["max_input_length"] == 16
    assert tei.Info.model_validate(info).model_dump() == info


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "words"),
    [
        ("/embed", {"inputs": ["she", "she " * 40]}, 422, "Tokenizer", "inputs[1]: the text has 42 tokens; at most 16"),
        ("/embed", {"inputs": "she", "prompt_name": "query"}, 422, "Tokenizer", "prompt_name"),
        ("/embed", {"inputs": "she", "truncation_direction": "left"}, 422, "Tokenizer", "truncation_direction"),
        ("/embed", {"inputs": ""}, 422, "Tokenizer", "the text is empty"),
        ("/embed", {"inputs": []}, 422, "Tokenizer", "inputs is empty"),
        ("/predict", {"inputs": "she " * 40}, 422, "Tokenizer", "the text has 42 tokens; at most 32"),
        ("/predict", {"inputs": [["a", "b", "c"]]}, 422, "Tokenizer", "inputs"),
        ("/predict", {"inputs": []}, 422, "Tokenizer", "inputs"),
        ("/rerank", {"query": "she", "texts": []}, 422, "Tokenizer", "texts is empty"),
        ("/rerank", {"query": "she " * 40, "texts": ["he"]}, 422, "Tokenizer", "texts[0]: the text has 44 tokens"),
        ("/tokenize", {"inputs": ["she " * 5000] * 9}, 413, "Validation", "needs 45018 tokens or more; at most 32768"),
    ],
)
def test_refused(post, path, body, status, kind, words):
    given, answer = post(path, body)
    assert (given, answer["error_type"]) == (status, kind)
    assert words in answer["error"]


def test_routes_that_no_model_answers(port):
    for path, body in [("/embed", {"inputs": "a"}), ("/rerank", {"query": "a", "texts": ["b"]})]:
        status, _, content = ask(port, "POST", path, body)
        assert (status, json.loads(content)["error_type"]) == (424, "Backend")
