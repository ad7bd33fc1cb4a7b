"""OpenAI's routes, asked by OpenAI's own client."""

import base64
import json

import numpy as np
import openai
import pytest
from serving import KEY, ask

import bert_jax

TEXTS = ["paris is the capital of france", "she went home", "good day !"]


@pytest.fixture
def client(several):
    with openai.OpenAI(base_url=f"http://localhost:{several}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_embeddings(client, embedder):
    expected = bert_jax.pipeline("feature-extraction", embedder)(TEXTS, pooling="auto")
    for encoding in ("base64", "float", openai.omit):  # the client asks for base64 unless it is told otherwise
        answer = client.embeddings.create(model="embedder", input=TEXTS, encoding_format=encoding)
        vectors = [entry.embedding for entry in answer.data]
        if encoding == "base64":
            vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
        np.testing.assert_allclose(np.array(vectors), expected, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        assert [entry.index for entry in answer.data] == [0, 1, 2]
        assert (answer.object, answer.model) == ("list", "embedder")
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (8 + 5 + 5, 8 + 5 + 5)
    single = client.embeddings.create(model="embedder", input=TEXTS[0])
    np.testing.assert_allclose(single.data[0].embedding, expected[0], atol=1e-6)


def test_token_ids(client, embedder):
    """With or without [CLS] and [SEP], they give what the text gives."""
    tokenizer = bert_jax.Tokenizer.from_pretrained(embedder)
    expected = client.embeddings.create(model="embedder", input=TEXTS[1]).data[0].embedding
    ids = tokenizer.encode([TEXTS[1]])[0][0].ids
    for given in (ids, ids[1:-1], [ids, ids]):
        answer = client.embeddings.create(model="embedder", input=given)
        np.testing.assert_allclose(answer.data[-1].embedding, expected, atol=1e-6)


def test_models(client, reranker):
    assert [model.id for model in client.models.list()] == ["embedder", "classifier", str(reranker)]
    model = client.models.retrieve("embedder")
    assert (model.id, model.object, model.owned_by) == ("embedder", "model", "bert_jax")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"model": "another"}, 404, "expected one of: embedder, classifier, "),
        ({"model": "classifier"}, 424, "This model is not served for feature-extraction; it answers text-"),
        ({"encoding_format": "hex"}, 400, "encoding_format: Input should be 'float' or 'base64'"),
        ({"dimensions": 4}, 400, "dimensions is not supported"),
        ({"input": []}, 400, "input is empty"),
        ({"input": ""}, 400, "the text is empty"),
        ({"input": ["she", ""]}, 400, r"input[1]: the text is empty"),
        ({"input": "she " * 40}, 400, "the text has 42 tokens; at most 16 are allowed"),
        ({"input": [[5, 26]]}, 400, "the token id 26 is out of range; the model has ids from 0 to 25"),
        ({"input": [-1]}, 400, "the token id -1 is out of range"),
        ({"input": [[]]}, 400, "there are no token ids"),
        ({"input": ["she"] * 2049}, 400, "the list of inputs has 2049 entries; at most 2048"),
    ],
)
def test_refused(client, request_, status, words):
    with pytest.raises(openai.APIStatusError) as raised:
        client.embeddings.create(**{"model": "embedder", "input": "she"} | request_)
    assert raised.value.status_code == status
    assert words in raised.value.body["message"]
    assert raised.value.body.keys() == {"message", "type", "param", "code"}


def test_a_wrong_key(several):
    client = openai.OpenAI(base_url=f"http://localhost:{several}/v1", api_key="x", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError) as raised:
        client.embeddings.create(model="embedder", input="she")
    assert raised.value.body["message"] == "The API key is missing or wrong."


def test_token_ids_are_refused_unless_asked_for_and_pooling_must_be_declared(port):
    status, _, content = ask(port, "POST", "/v1/embeddings", {"model": "x", "input": "she"})
    assert status == 404
    (model,) = json.loads(ask(port, "GET", "/v1/models")[2])["data"]
    status, _, content = ask(port, "POST", "/v1/embeddings", {"model": model["id"], "input": "she"})
    assert (status, json.loads(content)["error"]["code"]) == (424, "other_task")
