"""The model catalog's requests, in every form, and the responses' shape."""

import json
import math

import numpy as np
import pytest
import reference
from flax import nnx

import bert_jax
from bert_jax.errors import InputError
from bert_jax.inference import catalog

TEXTS = ["Paris is the [MASK] of France.", "Today is a [MASK] day!"]
COLUMN = {"input_string": TEXTS}
FILLINGS = {case["text"]: case["fillings"] for case in reference.golden("embedded_fill_mask.json")}
SPLIT = {"columns": ["input_string"], "index": [0, 1], "data": [[text] for text in TEXTS]}


@pytest.mark.parametrize(
    "request_",
    [
        {"inputs": COLUMN, "parameters": {"top_k": 2}},
        {"inputs": TEXTS, "parameters": {"top_k": 2}},
        {"input_data": COLUMN, "params": {"top_k": 2}},
        {"input_data": TEXTS, "parameters": {"top_k": 2}},
        {"input_data": SPLIT, "parameters": {"top_k": 2}},
        {"input_data": {"data": TEXTS}, "params": {"top_k": 2}},
    ],
)
def test_all_forms_of_a_request_give_the_cards_response(fill_mask, request_):
    response = json.loads(json.dumps(catalog.score(fill_mask, request_)))
    for text, entries in zip(TEXTS, response, strict=True):
        assert len(entries) == 2
        for entry, expected in zip(entries, FILLINGS[text], strict=False):
            assert list(entry) == ["score", "token", "token_str", "sequence"]
            assert math.isclose(entry["score"], expected["score"], abs_tol=1e-5)
            assert entry | {"score": 0} == expected | {"score": 0}


def test_targets_and_joint(fill_mask):
    request = {"inputs": {"input_string": [TEXTS[0]]}, "parameters": {"targets": ["city", "king"]}}
    assert [entry["token_str"] for entry in catalog.score(fill_mask, request)[0]] == ["city", "king"]
    request = {"inputs": ["The [MASK] [MASK]."], "parameters": {"joint": True, "top_k": 1}}
    assert len(catalog.score(fill_mask, request)[0][0]["token_str"]) == 2


def test_a_text_alone_has_its_result_alone(fill_mask):
    for inputs in (TEXTS[0], {"input_string": TEXTS[0]}):
        assert catalog.score(fill_mask, {"inputs": inputs})[0]["token_str"] == "capital"
    assert catalog.score(fill_mask, {"inputs": []}) == []


def test_questions_pairs_and_vectors(checkpoint, tokenizer):
    config = bert_jax.BertConfig(vocab_size=28996, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=8)  # fmt: skip
    rngs = nnx.Rngs(0)
    qa = bert_jax.pipeline(
        "question-answering", bert_jax.BertForQuestionAnswering(config, rngs=rngs), tokenizer=tokenizer
    )
    columns = {"question": ["Who?", "Where?"], "context": ["Anna sings.", "In Paris."]}
    split = {"columns": ["question", "context"], "data": [["Who?", "Anna sings."], ["Where?", "In Paris."]]}
    one_by_one = [qa({"question": q, "context": c}) for q, c in zip(*columns.values(), strict=True)]
    assert catalog.score(qa, {"inputs": columns}) == one_by_one
    assert catalog.score(qa, {"input_data": split}) == one_by_one
    assert catalog.score(qa, {"inputs": {"question": "Who?", "context": "Anna sings."}}) == one_by_one[0]
    nsp = bert_jax.BertForNextSentencePrediction(config, rngs=rngs)
    nsp = bert_jax.pipeline("next-sentence-prediction", nsp, tokenizer=tokenizer)
    assert catalog.score(nsp, {"inputs": {"input_string": [["A b.", "C d."]]}}) == [nsp(("A b.", "C d."))]
    vectors = bert_jax.pipeline("feature-extraction", bert_jax.BertModel(config, rngs=rngs), tokenizer=tokenizer)
    (found,) = catalog.score(vectors, {"inputs": ["A b."], "parameters": {"pooling": "cls"}})
    np.testing.assert_array_equal(np.array(found, np.float32), vectors("A b.", pooling="cls"))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ([TEXTS], 'expected an object like {"inputs"'),
        (None, "got null"),
        ({}, "there are no inputs; expected inputs or input_data"),
        ({"inputs": TEXTS, "input_data": TEXTS}, "inputs and input_data have the same meaning"),
        ({"inputs": TEXTS, "top_k": 2}, "'top_k' is unknown; expected inputs"),
        ({"inputs": 3}, "inputs is a number; expected a list"),
        ({"inputs": TEXTS, "parameters": [2]}, "parameters is a list; expected an object"),
        ({"inputs": TEXTS, "parameters": {"topk": 2}}, "the parameter 'topk' is unknown; this task accepts top_k"),
        ({"inputs": TEXTS, "parameters": {"top_k": "2"}}, "top_k is '2'"),
        ({"inputs": TEXTS, "parameters": {"targets": 5}}, "targets is 5; expected a list of words"),
        ({"inputs": [TEXTS[0], 7]}, r"inputs[1]: expected a text, got 7"),
        ({"inputs": [TEXTS[0], "no mask"]}, r"inputs[1]: the text has no [MASK]"),
        ({"inputs": ["a lone \udc80 [MASK]"]}, "inputs[0]: a text contains lone surrogates"),
        ({"inputs": {"columns": "x", "data": []}}, "columns is 'x'"),
        ({"inputs": {"data": "x"}}, "data is a text; expected a list of rows"),
        ({"inputs": {"columns": ["a", "b"], "data": [["x"]]}}, "data[0] has 1 fields; there are 2 columns"),
        ({"inputs": {"question": ["a"], "context": []}}, "different lengths: question 1, context 0"),
    ],
)  # fmt: skip
def test_bad_requests(fill_mask, request_, message):
    with pytest.raises(InputError) as raised:
        catalog.score(fill_mask, request_)
    assert message in str(raised.value)


@pytest.mark.parametrize("request_", [{"x" * 10**6: 1}, {"inputs": {"data": [], "columns": ["x" * 10**6, 7]}}])
def test_messages_quote_little(request_):
    with pytest.raises(InputError) as error:
        catalog.read(request_)
    assert len(str(error.value)) < 400
