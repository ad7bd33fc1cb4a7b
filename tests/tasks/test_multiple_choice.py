import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bert_jax
from bert_jax import tree
from bert_jax.data.loader import one_a_row
from bert_jax.errors import InputError
from bert_jax.inference import prediction
from bert_jax.recipes import finetuning
from bert_jax.settings import Settings
from bert_jax.tasks.base import ReadOptions
from bert_jax.tasks.multiple_choice import UNKNOWN, MultipleChoice

SWAG = {"sent1": "She opened the fridge.", "sent2": "She", "label": "1"} | {
    f"ending{i}": text for i, text in enumerate(["flew away.", "took the milk.", "is a fridge.", "sang to the milk."])
}
RACE = {
    "article": "Tom went to the market and bought two apples.", "question": "Tom bought _ .", "answer": "B",
    "options": ["a car", "apples", "milk", "nothing"],
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    config = bert_jax.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return bert_jax.BertForMultipleChoice(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def task(tokenizer, model):
    return MultipleChoice(tokenizer, model.config, 32)


def cleaned(*rows, **options):
    return MultipleChoice.clean({"train": list(rows)}, ReadOptions(**options))[0]["train"]


def row(label=0, choices=("a cat", "the dog barked at night")):
    return {"context": "She saw", "answers": list(choices), "label": label}


# ── The model ──


@pytest.mark.slow
def test_each_choice_is_scored_alone(model):
    ids = np.random.RandomState(0).randint(5, 1000, (3, 4, 7))
    logits = model(ids).logits
    assert logits.shape == (3, 4)
    for row_, expected in zip(ids, logits, strict=True):
        for choice, score in zip(row_, expected, strict=True):
            np.testing.assert_allclose(model(choice[None, None]).logits[0, 0], score, atol=1e-5)
    vectors = model.bert.embeddings.word_embeddings(ids)
    np.testing.assert_allclose(model(inputs_embeds=vectors).logits, logits, atol=1e-5)
    with pytest.raises(InputError, match=r"input_ids has the shape \(3, 7\); expected \[batch, choices, tokens\]"):
        model(ids[:, 0])
    with pytest.raises(InputError, match=r"attention_mask has the shape \(4, 3, 7\); expected"):
        model(ids, np.ones((4, 3, 7)))
    np.testing.assert_allclose(model(ids.tolist()).logits, logits, atol=1e-5)
    with pytest.raises(InputError, match="Expected input_ids or inputs_embeds, got neither"):
        model()


# ── The pipeline ──


@pytest.mark.slow
def test_a_pipeline_chooses(model, tokenizer):
    pipe = bert_jax.pipeline("multiple-choice", model, tokenizer=tokenizer)
    inputs = [
        {"context": "She saw", "choices": ["a cat.", "the dog in the garden.", "it."]},
        {"context": RACE["article"], "question": RACE["question"], "choices": RACE["options"]},
    ]
    found = pipe(inputs)
    for given, result in zip(inputs, found, strict=True):
        texts = [given.get("question", "_").replace("_", choice) for choice in given["choices"]]
        contexts = [given["context"]] * len(texts)
        logits = model(**{name: ids[None] for name, ids in tokenizer(contexts, texts, length=32).items()}).logits[0]
        np.testing.assert_allclose(result["scores"], jax.nn.softmax(logits), atol=1e-6)
        assert result["choice"] == logits.argmax()
        assert result["answer"] == given["choices"][result["choice"]]
    # The same as tuples, as rows of tables give them.
    for given, expected in [
        (("She saw", ["a cat.", "the dog in the garden.", "it."]), found[0]),
        (("She saw", "", "a cat.", "the dog in the garden.", "it."), found[0]),
        ((RACE["article"], RACE["question"], json.dumps(RACE["options"])), found[1]),
    ]:
        result = pipe(given)
        np.testing.assert_allclose(result.pop("scores"), expected["scores"], atol=1e-6)
        assert result == {name: expected[name] for name in ("choice", "answer")}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("text", r"expected a context and choices, got 'text'"),
        ({"context": "a", "choices": ["b"]}, r"the choices are \['b'\]; expected a list of 2 to 32 texts"),
        ({"context": "a", "choices": ["b"] * 33}, "expected a list of 2 to 32 texts"),
        ({"context": "a"}, "the choices are None; expected a list of 2 to 32 texts"),
        ({"context": "a", "options": ["b", "c"]}, "'options' is unknown; expected context, choices and perhaps"),
        ({"context": " ", "choices": ["b", "c"]}, "the context is empty"),
        ({"context": "a", "choices": ["b", ""]}, "the choice is empty"),
        ({"context": "a", "choices": ["b", 3]}, "expected a text, got 3"),
        ({"context": "a", "question": 3, "choices": ["b", "c"]}, "the question is 3; expected a text"),
    ],
)
def test_bad_inputs(task, inputs, message):
    with pytest.raises(InputError, match=message):
        task.request(inputs)


# ── Training ──


def test_columns_of_swag_and_race():
    endings = {name: text for name, text in SWAG.items() if name.startswith("ending")}
    swag = {"context": SWAG["sent1"], "question": SWAG["sent2"], "label": SWAG["label"]} | endings
    assert cleaned(swag) == [
        {"context": "She opened the fridge.", "question": "She", "label": 1,
         "answers": ["flew away.", "took the milk.", "is a fridge.", "sang to the milk."]}
    ]  # fmt: skip
    race = {"context": RACE["article"], "question": RACE["question"], "label": "B", "answers": RACE["options"]}
    assert cleaned(race) == [race | {"label": 1}]
    labels = [None, "", -1, float("nan"), "A", 1.0, np.int64(1), "1"]
    assert [found["label"] for found in cleaned(*map(row, labels))] == [UNKNOWN] * 4 + [0, 1, 1, 1]
    # Of ten endings, the first two.
    endings = {f"ending{i}": f"word{i}" if i < 2 else None for i in range(10)}
    assert cleaned({"context": "a", "label": 0} | endings)[0]["answers"] == ["word0", "word1"]


@pytest.mark.parametrize("count", [2, 4, 5, 10])
def test_a_row_with_endings_has_all_of_them_as_choices(count):
    cells = {"sent1": "a", "sent2": "b"} | {f"ending{i}": f"word{i}" for i in range(count)}
    context, question, *choices = prediction.input_of(cells, MultipleChoice.columns_of_input)
    assert (context, question, choices) == ("a", "b", [f"word{i}" for i in range(count)])


def test_the_blank_of_a_question(task, tokenizer):
    for question, text in [
        ("Tom bought ____ .", "Tom bought milk ."),
        ("_ is good; _ is not", "milk is good; _ is not"),
        ("What is snake_case?", "What is snake_case? milk"),
        ("", "milk"),
    ]:
        (encoding, *_) = task._encode("He saw", question, ["milk", "x"])
        assert encoding.ids == tokenizer.encode(["He saw"], [text])[0][0].ids
    null = {"context": "She saw", "question": None, "choices": ["a", "b"]}
    assert task.request(null).tokens == task.request(("She saw", ["a", "b"])).tokens


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(), row(choices="abc")], r"data.train: row 2: there are 3 choices, and 2 in data.train: row 1"),
        ([row(2)], r"data.train: row 1: the label is 2; expected 0 to 1, or A to B"),
        ([row("C")], r"data.train: row 1: the label is 'C'; expected 0 to 1, or A to B"),
        ([row(0.5)], r"data.train: row 1: the label is 0.5; expected 0 to 1"),
        ([row(True)], r"data.train: row 1: the label is True; expected 0 to 1"),
        ([{"context": "a", "label": 0}], r"data.train: row 1: there are no choices. Set data.answers"),
        ([{"context": "a", "label": 0, "ending0": "b", "ending2": "c"}], "there is no ending1, but there is ending2"),
    ],
)
def test_bad_rows(rows, message):
    with pytest.raises(InputError, match=message):
        cleaned(*rows)


def test_labels_are_refused_and_training_needs_the_right_choice():
    with pytest.raises(InputError, match=r"multiple-choice has no labels. Remove it"):
        cleaned(row(), labels=("a", "b"))
    with pytest.raises(InputError, match=r"data.train: row 2 has no label"):
        MultipleChoice.config(cleaned(row(), row(None)), ReadOptions())


@pytest.mark.slow
def test_the_loss_is_that_of_each_choice_alone(task, model):
    rows = cleaned(*[row(i % 2, ("a " * (i + 1), "the dog")) for i in range(4)], row(None))
    examples = task.featurize(rows)
    alone = jax.jit(lambda ids, types: model(ids, token_type_ids=types).logits[0, 0])
    scores = jnp.stack([
        jnp.stack([
            alone(np.array([[encoding.ids]]), np.array([[encoding.type_ids]]))
            for encoding in task._encode(r["context"], r["question"], r["answers"])
        ])
        for r in rows
    ])  # fmt: skip
    expected = -jax.nn.log_softmax(scores)[np.arange(4), [0, 1, 0, 1]].mean()
    params, skeleton = tree.split(model)
    apart = examples.batch(one_a_row(np.arange(5), 6, 64))
    together = examples.batch(one_a_row(np.arange(5), 6, 64)._replace(
        rows=np.array([0, 0, 1, 1, 1]), shape=one_a_row(np.arange(5), 2, 64).shape._replace(length=96, examples=3)
    ))  # fmt: skip
    for batch in (apart, together):
        loss, count = jax.jit(lambda params, batch: task.loss(tree.merge(skeleton, params), batch, None))(params, batch)
        assert count == 4
        np.testing.assert_allclose(loss, expected, atol=1e-6)
        outputs = jax.jit(lambda batch: task.outputs(model, batch))(batch)["scores"]
        np.testing.assert_allclose(outputs[batch["weights"] > 0], jax.nn.softmax(scores), atol=1e-6)


def test_metrics_and_predictions(task):
    examples = task.featurize(cleaned(row(0), row(1), row(None)))
    outputs = {"scores": np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])}
    assert task.evaluate(outputs, examples) == {"accuracy": 0.5}
    assert [found["choice"] for found in task.predictions(outputs, examples)] == [0, 0, 1]
    assert task.evaluate(outputs, task.featurize(cleaned(row(None)))) == {}


@pytest.mark.slow
def test_finetuning_and_the_pipeline_that_reads_its_folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    random, lines = np.random.RandomState(0), []
    for _ in range(16):
        label = int(random.randint(4))
        endings = {f"ending{i}": "is here." if i == label else "is gone." for i in range(4)}
        lines.append({"sent1": "I see a cat.", "sent2": "The cat", "label": label} | endings)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    finetuning.finetune(Settings.from_dict({
        "task": "multiple-choice", "model": {"id": str(tmp_path / "base"), "hidden_dropout_prob": 0.0},
        "data": {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "train.jsonl"), "max_length": 32},
        "optimizer": {"learning_rate": 3e-3}, "training": {"epochs": 30, "batch_size": 16, "evaluate_every": 30},
        "output": {"folder": str(tmp_path / "run")},
    }))  # fmt: skip
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["validation"]["accuracy"] > 0.9
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    pipe = bert_jax.pipeline("multiple-choice", tmp_path / "run")
    found = pipe([(line["sent1"], line["sent2"], *(line[f"ending{i}"] for i in range(4))) for line in lines])
    for result, line in zip(found, predictions, strict=True):
        np.testing.assert_allclose(result["scores"], line["prediction"]["scores"], atol=1e-5)
