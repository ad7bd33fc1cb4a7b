import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bert_jax
from bert_jax import losses, tree
from bert_jax.data.labels import MULTI, REGRESSION, SINGLE, UNKNOWN, label_set
from bert_jax.data.loader import Examples, one_a_row
from bert_jax.errors import InputError
from bert_jax.tasks.base import ReadOptions
from bert_jax.tasks.sequence_classification import DecisionOptions, SequenceClassification

NAMES = ("anger", "joy", "love")
LONG = "word " * 100
TEXTS = ["I love it.", "Paris is the capital of France, is it not?", "No", LONG]


def config(**changes):
    return bert_jax.BertConfig(
        **{
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 32,
            "num_labels": 3,
            "id2label": NAMES,
        }
        | changes
    )


ONE = {"num_labels": 1, "id2label": None}


@pytest.fixture(scope="module")
def models():
    """Models by the changes of their config; their encoders are the same."""
    made = {}

    def model(**changes):
        key = str(sorted(changes.items()))
        if key not in made:
            # Initialised by numpy: that is faster than to compile an initialization for each.
            abstract = nnx.eval_shape(
                lambda: bert_jax.BertForSequenceClassification(config(**changes), rngs=nnx.Rngs(0))
            )
            skeleton, random = tree.split(abstract)[1], np.random.RandomState(0)
            params = {
                path: random.normal(path.endswith("norm.weight"), 0.7, spec.shape).astype(np.float32)
                for path, spec in skeleton.specs.items()
            }
            made[key] = tree.merge(skeleton, tree.unflatten({path: jnp.asarray(leaf) for path, leaf in params.items()}))
        return made[key]

    return model


@pytest.fixture(scope="module")
def pipe(models, tokenizer):
    made = {}

    def pipe(**changes):
        key = str(sorted(changes.items()))
        if key not in made:
            made[key] = bert_jax.pipeline("text-classification", models(**changes), tokenizer=tokenizer)
        return made[key]

    return pipe


@pytest.fixture(scope="module")
def logits(models, tokenizer):
    """The model called directly, and its classifier by numpy: float64 [C]."""
    encode = jax.jit(lambda encoder, inputs: encoder(**inputs).pooler_output)

    def logits(text, pair=None, **changes):
        inputs = tokenizer(text, pair, truncation=True, max_length=32, length=32)
        classifier = models(**changes).classifier
        pooled = np.asarray(encode(models().bert, inputs)[0], np.float64)
        return np.asarray(classifier.weight[...], np.float64) @ pooled + np.asarray(classifier.bias[...])

    return logits


@pytest.fixture
def task(tokenizer):
    return lambda max_length=32, **changes: SequenceClassification(tokenizer, config(**changes), max_length)


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ── The pipeline ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", TEXTS)
def test_label_and_score_are_the_models(pipe, logits, text):
    p = softmax(logits(text))
    result = pipe()(text)
    assert result == {"label": NAMES[p.argmax()], "score": pytest.approx(p.max(), abs=1e-5)}
    assert type(result["score"]) is float


def test_top_k(pipe, logits):
    p = softmax(logits(TEXTS[0]))
    every = pipe()(TEXTS[0], top_k=None)
    assert [entry["label"] for entry in every] == [NAMES[i] for i in np.argsort(-p)]
    assert [entry["score"] for entry in every] == pytest.approx(sorted(p, reverse=True), abs=1e-5)
    assert sum(entry["score"] for entry in every) == pytest.approx(1)
    assert pipe()(TEXTS[0], top_k=2) == every[:2]
    assert pipe()(TEXTS[0], top_k=9) == every
    assert pipe()(TEXTS[0], top_k=1) == pipe()(TEXTS[0]) == every[0]


def test_pairs(pipe, logits):
    pair = ("I love it.", "Nobody does.")
    p = softmax(logits(*pair))
    result = pipe()(pair)
    assert result == {"label": NAMES[p.argmax()], "score": pytest.approx(p.max(), abs=1e-5)}
    # The second text is seen, and as the second.
    for other in ("I love it.", "I love it. Nobody does.", pair[::-1]):
        assert abs(pipe()(other, top_k=None)[0]["score"] - result["score"]) > 1e-4


def test_a_list_of_texts_and_pairs(pipe):
    inputs = [*TEXTS, ("I", "you"), ["I", "you"]]
    results = pipe()(inputs)
    alone = [pipe()(entry) for entry in [*TEXTS, ("I", "you"), ("I", "you")]]
    assert results == [entry | {"score": pytest.approx(entry["score"], abs=1e-5)} for entry in alone]
    assert pipe()([]) == []


def test_independent_labels(pipe, logits):
    p = sigmoid(logits(TEXTS[0], problem_type=MULTI))
    every = pipe(problem_type=MULTI)(TEXTS[0], top_k=None)
    assert {entry["label"]: entry["score"] for entry in every} == {
        name: pytest.approx(score, abs=1e-5) for name, score in zip(NAMES, p, strict=True)
    }
    assert abs(sum(entry["score"] for entry in every) - 1) > 1e-3


def test_a_regression_gives_the_number(pipe, logits):
    (number,) = logits(TEXTS[0], problem_type=REGRESSION, **ONE)
    assert abs(number - sigmoid(number)) > 0.05
    result = pipe(problem_type=REGRESSION, **ONE)(TEXTS[0])
    assert result == {"label": "LABEL_0", "score": pytest.approx(number, abs=1e-5)}


def test_one_label_of_no_problem_type_is_independent(pipe, logits):
    # As transformers' pipeline has it; a softmax of one label is 1 whatever the text.
    (number,) = logits(TEXTS[0], **ONE)
    assert pipe(**ONE)(TEXTS[0])["score"] == pytest.approx(sigmoid(number), abs=1e-5)


def test_long_texts_are_cut(pipe):
    assert pipe()(LONG) == pipe()(LONG + LONG)
    kept, cut = "word " * 30, "word " * 30 + "and more"  # 30 tokens and two special ones
    assert pipe()(cut) == pipe()(kept)
    assert pipe()("word " * 29 + "more") != pipe()(kept)
    # Of a pair the longer text gives way.
    assert pipe()((LONG, "you")) == pipe()(("word " * 28, "you")) != pipe()((LONG, "I"))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (3, {}, "expected a text, got 3 (int)."),
        (("a",) * 3, {}, "expected a text or a pair of texts, got ('a', 'a', 'a')."),
        (("a", 3), {}, "expected a text, got 3 (int)."),
        ((), {}, "expected a text or a pair of texts, got ()."),
        (None, {}, "expected a text, got None (NoneType)."),
        (" \n", {}, "the text is empty."),
        (("a", ""), {}, "the text is empty."),
        ("a", {"top_k": 0}, "top_k is 0; expected a whole number of at least 1, or None."),
        ("a", {"top_k": True}, "top_k is True; "),
        ("a", {"top_k": 1.5}, "top_k is 1.5; "),
    ],
)
def test_bad_input(pipe, text, options, message):
    if isinstance(text, str | tuple):
        with pytest.raises(InputError, match=f"^{re.escape(message)}"):
            pipe()(text, **options)
    place = 0 if options else 1  # of a bad option the first input is told
    with pytest.raises(InputError, match=f"^{re.escape(f'inputs[{place}]: {message}')}"):
        pipe()(["b", text], **options)


# ── Examples ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_single_labels(task):
    rows = [{"text": "a", "label": "love"}, {"text": "b", "label": "anger"}, {"text": "c"}, {"text": "d", "label": -1}]
    labels = task().featurize(rows).targets["labels"]
    np.testing.assert_array_equal(labels, np.array([2, 0, UNKNOWN, UNKNOWN], np.int32), strict=True)


def test_single_labels_that_are_numbers(task):
    rows = [{"text": "a", "label": label} for label in (1, "0", True)]
    found = task(num_labels=3, id2label=("0", "1", "True")).featurize(rows)
    assert found.targets["labels"].tolist() == [1, 0, 2]


def test_minus_one_may_be_a_label(task):
    _, names = label_set([-1, 0, 1, -1], None)
    labels = task(id2label=names).featurize([{"text": "a", "label": label} for label in (-1, 0, 1)]).targets["labels"]
    assert [names[label] for label in labels] == ["-1", "0", "1"]
    assert UNKNOWN not in labels


def test_several_labels(task):
    given = [["joy", "anger"], "love, joy", [], None, ["love"]]
    labels = task(problem_type=MULTI).featurize([{"text": "a", "label": label} for label in given]).targets["labels"]
    unknown = [np.nan] * 3
    expected = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0], unknown, [0, 0, 1]], np.float32)
    np.testing.assert_array_equal(labels, expected, strict=True)


@pytest.mark.parametrize("problem_type", [REGRESSION, None])
def test_numbers(task, problem_type):
    rows = [{"text": "a", "label": label} for label in (1.5, "2", -1)]
    labels = task(problem_type=problem_type, **ONE).featurize(rows).targets["labels"]
    np.testing.assert_array_equal(labels, np.array([[1.5], [2], [-1]], np.float32), strict=True)


def test_texts_are_the_tokenizers(task, tokenizer):
    found = task().featurize([{"text": "Paris is here."}, {"text": LONG}])
    expected = tokenizer(["Paris is here.", LONG], truncation=True, max_length=32)
    for i, n in enumerate(expected["attention_mask"].sum(-1)):
        np.testing.assert_array_equal(found.input_ids[i], expected["input_ids"][i, :n], strict=True)
        assert not found.token_type_ids[i].any()
    assert found.lengths[1] == 32
    assert found.pad_token_id == tokenizer.pad_token_id


def test_pairs_have_token_types(task, tokenizer):
    found = task(max_length=10).featurize([
        {"text": "I love it.", "text_pair": "No."},
        {"text": "word " * 20, "text_pair": "not this one"},
    ])  # fmt: skip
    assert found.token_type_ids[0].tolist() == [0] * 6 + [1] * 3
    tokens = [tokenizer.backend.id_to_token(int(token)) for token in found.input_ids[1]]
    assert tokens == ["[CLS]", *["word"] * 4, "[SEP]", "not", "this", "one", "[SEP]"]
    assert found.token_type_ids[1].tolist() == [0] * 6 + [1] * 4


@pytest.mark.parametrize(
    ("changes", "row", "message"),
    [
        ({}, {"text": "a", "label": "hate"}, "row 2: the label 'hate' is unknown; the labels are anger, joy, love."),
        ({}, {"text": "a", "label": 1}, "row 2: the label '1' is unknown; the labels are anger, joy, love."),
        ({"problem_type": MULTI}, {"text": "a", "label": ["joy", "hate"]}, "row 2: the label 'hate' is unknown; "),
        (ONE, {"text": "a", "label": "much"}, "row 2: the label is 'much'; regression expects a number."),
        (ONE, {"text": "a", "label": "nan"}, "row 2: the label is 'nan'; regression expects a number."),
        ({}, {"text": 3, "label": "joy"}, "row 2: text is 3; expected a text."),
        ({}, {"text": None, "label": "joy"}, "row 2: text is None; expected a text."),
        ({}, {"text": "a", "text_pair": None, "label": "joy"}, "row 2: text_pair is None; expected a text."),
    ],
)
def test_rows_that_cannot_be_used(task, changes, row, message):
    good = {"text": "a", "label": 1.0 if changes is ONE else "joy"}
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        task(**changes).featurize([good, row])


def test_many_labels_are_not_all_named(task):
    names = tuple(f"L{i}" for i in range(100))
    with pytest.raises(InputError, match=r"the labels are L0, .*, L41, …\.$"):
        task(num_labels=100, id2label=names).featurize([{"text": "a", "label": "x"}])


@pytest.mark.parametrize(
    ("labels", "problem_type", "expected"),
    [
        (["joy", "anger", "joy"], None, (SINGLE, ("anger", "joy"))),
        ([10, 9, 1], None, (SINGLE, ("1", "9", "10"))),
        (["10", "9"], None, (SINGLE, ("9", "10"))),
        (["10", "9", "b"], None, (SINGLE, ("10", "9", "b"))),
        ([True, False], None, (SINGLE, ("False", "True"))),
        ([["b", "a"], [], ["c"]], None, (MULTI, ("a", "b", "c"))),
        (["b,a", "", " c"], MULTI, (MULTI, ("a", "b", "c"))),
        (["b,a", "c"], None, (SINGLE, ("b,a", "c"))),
        ([0.5, 1.0], None, (REGRESSION, ("LABEL_0",))),
        ([0.0, 1.0], REGRESSION, (REGRESSION, ("LABEL_0",))),
        ([0, 5], REGRESSION, (REGRESSION, ("LABEL_0",))),
        (["0.5", "1", "-2.0"], None, (REGRESSION, ("LABEL_0",))),  # cells of a table
        (["1.0", "2.0"], None, (SINGLE, ("1.0", "2.0"))),
        (["0.5", "none"], None, (SINGLE, ("0.5", "none"))),
        (["²", "1"], None, (SINGLE, ("1", "²"))),  # str.isdigit says yes, and int no
        (["٣", "10", "9"], None, (SINGLE, ("10", "9", "٣"))),
        ([10**400, 9, 10], None, (SINGLE, ("9", "10", str(10**400)))),
        (["1" * 5000, "07", "8"], None, (SINGLE, ("07", "8", "1" * 5000))),  # longer than int reads
        ([0.5, 10**400], None, (REGRESSION, ("LABEL_0",))),
        ([[1, 0, 1], [0, 0, 0]], None, (MULTI, ("LABEL_0", "LABEL_1", "LABEL_2"))),
    ],
)
def test_label_set(labels, problem_type, expected):
    assert label_set(labels, problem_type) == expected


def clean(*column, labels=None, **data):
    """What becomes of a column of labels, and of the config."""
    rows = [{"text": "a", "label": label} for label in column]
    options = ReadOptions(None if labels is None else tuple(labels), **data)
    found = SequenceClassification.clean({"train": rows}, options)[0]["train"]
    fields = SequenceClassification.config(found, options)
    return [row["label"] for row in found], (fields["problem_type"], fields["id2label"])


THREE, ABC = ("LABEL_0", "LABEL_1", "LABEL_2"), ("a", "b", "c")


@pytest.mark.parametrize(
    ("labels", "data", "expected", "names"),
    [
        # 0/1 vectors
        ([[1, 0, 1], [0, 1, 0]], {}, [[1, 0, 1], [0, 1, 0]], THREE),
        ([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], {}, [[1, 0, 1], [0, 0, 0]], THREE),
        ([[True, False, True], [False] * 3], {}, [[1, 0, 1], [0, 0, 0]], THREE),
        ([(1, 0, 1), (1, 1, 1)], {}, [[1, 0, 1], [1, 1, 1]], THREE),
        ([["1", "0", "1"], ["0", "0", "0"]], {}, [[1, 0, 1], [0, 0, 0]], THREE),
        (["1,0,1", "0,0,1"], {"problem_type": MULTI}, [[1, 0, 1], [0, 0, 1]], THREE),
        (["[1, 0, 1]", "[0, 0, 0]"], {}, [[1, 0, 1], [0, 0, 0]], THREE),
        (["[1 0 1]", "[0 0\n 1]"], {}, [[1, 0, 1], [0, 0, 1]], THREE),
        (["[1. 0. 1.]", "[0. 0. 1.]"], {}, [[1, 0, 1], [0, 0, 1]], THREE),
        ([[1, 0, 1], [0, 0, 0]], {"labels": ABC}, [["a", "c"], []], ABC),
        ([[1], [0]], {"labels": ["a"]}, [["a"], []], ("a",)),
        (["[1 0 1]", "[0 1 0]"], {"labels": ["c", "b", "a"]}, [["c", "a"], ["b"]], ("c", "b", "a")),
        # Class ids
        ([[2], [0, 1], []], {"labels": ABC}, [["c"], ["a", "b"], []], ABC),
        ([[0], [1]], {"labels": ABC}, [["a"], ["b"]], ABC),
        (["[2]", "[0 1]"], {"labels": ABC}, [["c"], ["a", "b"]], ABC),
        ([[2], [0, 5]], {}, [["2"], ["0", "5"]], ("0", "2", "5")),
        # Names
        (["['joy', 'love']", "[]", '["joy"]'], {}, [["joy", "love"], [], ["joy"]], ("joy", "love")),
        (["['joy' 'love']", "", "['joy']"], {}, [["joy", "love"], [], ["joy"]], ("joy", "love")),
        (["['a, b']", "['c']"], {}, [["a, b"], ["c"]], ("a, b", "c")),
        (["a, b", "", "c"], {"problem_type": MULTI}, [["a", "b"], [], ["c"]], ABC),
        (["['a' 'b']", "c"], {"problem_type": MULTI}, [["a", "b"], ["c"]], ABC),
        ([["0"], ["0", "1"]], {"labels": ["0", "1"]}, [["0"], ["0", "1"]], ("0", "1")),
        ([["nan"], ["b"]], {"labels": ["b", "nan"]}, [["nan"], ["b"]], ("b", "nan")),
    ],
)
def test_several_labels_of_a_row(labels, data, expected, names):
    assert clean(*labels, **data) == (expected, (MULTI, names))


@pytest.mark.parametrize("labels", [[1, 0, 2], ["1", "0", "2"], ["1", 0, "02"]])
def test_class_ids_of_labels_that_are_named(labels):
    assert clean(*labels, labels=("c", "a", "b")) == (["a", "c", "b"], (SINGLE, ("c", "a", "b")))
    rows = {"test": [{"label": label} for label in (0, -1, "", None)]}
    found, said = SequenceClassification.clean(rows, ReadOptions(labels=ABC))
    assert said == "labels: class ids"
    assert [row["label"] for row in found["test"]] == ["a", None, None, None]
    assert clean("1", "2", labels=("2", "1"))[0] == ["1", "2"]  # names
    with pytest.raises(InputError, match=r"^data\.train: row 2: the class id is 3; data\.labels has 3 names"):
        clean(1, 3, labels=ABC)


def test_texts_that_look_like_lists_may_be_names():
    assert clean("[/s]", "s") == (["[/s]", "s"], (SINGLE, ("[/s]", "s")))
    assert clean("[UNK]", "[SEP]") == (["[UNK]", "[SEP]"], (SINGLE, ("[SEP]", "[UNK]")))
    single = {"problem_type": SINGLE}
    assert clean("['a', 'b']", "c", **single) == (["['a', 'b']", "c"], (SINGLE, ("['a', 'b']", "c")))


@pytest.mark.parametrize(
    ("labels", "data", "message"),
    [
        ([[1, 0, 1], [0, 1]], {}, "row 2: the label is [0, 1], and that of data.train: row 1 is [1, 0, 1]; "),
        ([[1, 0, 1], []], {}, "row 2: the label is [], and that of data.train: row 1 is [1, 0, 1]; "),
        ([[1, 0, 1], [0, 2]], {}, "row 2: the label is [0, 2], and that"),
        ([[0, 2], [1, 0, 1]], {"labels": ABC}, "row 2: the label is [1, 0, 1], and that"),
        ([[1, 0, 1]], {"labels": ["a", "b"]}, "expected names, 0/1 vectors of length 2, or class ids of data.labels."),
        ([[0, 1], [1]], {"labels": ["a", "b"]}, "row 2: the label is [1], and that of data.train: row 1 is [0, 1]; "),
        # Two classes, or a vector of one label?
        ([[0], [1]], {}, "row 2: the label is [1], and that of data.train: row 1 is [0]; "),
        ([[3], [0]], {"labels": ABC}, "row 2: the label is [0], and that of data.train: row 1 is [3]; "),
        ([[-1], [2]], {"labels": ABC}, "row 2: the label is [2], and that of data.train: row 1 is [-1]; "),
        ([[0.5, 1.0], [1.0, 0.0]], {}, "row 2: the label is [1.0, 0.0], and that of data.train: row 1 is [0.5, 1.0]; "),
        ([["joy"], [1]], {}, "row 2: the label is [1], and that of data.train: row 1 is ['joy']; "),
        ([["joy"], 1], {}, "row 2: the label is 1; expected a list of labels."),
        ([["joy", None]], {}, "row 1: a label is None; expected a name, a finite number, or an empty cell."),
        ([[[1, 0]], [[0, 1]]], {}, "row 1: a label is [1, 0]; expected a name"),
        ([{"joy": 1}, {"joy": 0}], {}, "row 1: a label is {'joy': 1}; expected a name, a finite number, or"),
        (["[{1, 2}]"], {}, "row 1: a label is {1, 2}; expected a name"),
        ([{"joy": 1}], {"problem_type": MULTI}, "row 1: a label is {'joy': 1}; expected"),
        ([[1, 0], [0, 1]], {"problem_type": SINGLE}, "label is [1, 0]; single_label_classification expects one label."),
        ([[0.5]], {"problem_type": REGRESSION}, "row 1: the label is [0.5]; regression expects one label."),
        (["['joy']", "love"], {}, "row 2: the label is 'love'; expected a list, as in other rows. If"),
        (["['joy']", "['joy', 'love' 'hate']"], {}, "; expected a list, as in other rows. If"),
        (["joy", "[love"], {"problem_type": SINGLE, "labels": ["joy"]}, "the label '[love' is unknown; the labels are"),
        (["['joy'", "[love]"], {"problem_type": MULTI}, "row 2: the label '[love]' is not a list or object"),
        ([[], []], {}, "The labels of data.train are []; expected at least 1."),
        ([["x" * 10**6], 1], {}, "row 2: the label is 1; expected a list"),
        ([["x" * 10**6, None]], {}, "row 1: a label is None"),
        ([0.5, 1.5], {"labels": ABC}, "data.labels has 3 names; regression expects one."),
        (["1 0 1", "1,0,1", ""], {}, "row 3 has no label"),
        (["[1 0 1]", ""], {}, "row 2 has no label"),
        # No numbers
        ([0.5, float("nan")], {}, "row 2: a label is nan; expected a name, a finite number, or an empty cell. "),
        ([1, float("inf"), 0], {}, "row 2: a label is inf; "),
        (["0.5", "nan"], {}, "row 2: a label is 'nan'; "),
        (["joy", "NaN "], {}, "row 2: a label is 'NaN '; "),
        (["1", "-Infinity"], {}, "row 2: a label is '-Infinity'; "),
        (["1.5", "1e999"], {}, "row 2: a label is '1e999'; "),
        ([[1, float("nan")], [0, 1]], {}, "row 1: a label is nan; "),
        ([["a", "nan"]], {}, "row 1: a label is 'nan'; "),
        (["a, nan"], {"problem_type": MULTI}, "row 1: a label is 'nan'; "),
        ([0.5, "nan"], {"problem_type": REGRESSION}, "row 2: a label is 'nan'; "),
        ([0.5, 1e39], {"problem_type": REGRESSION}, "label is 1e+39; regression expects a number."),  # of float32
        ([0.5, 10**400], {"problem_type": REGRESSION}, f"label is 1{'0' * 199}…; regression expects a"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_read(task, labels, data, message):
    rows = [{"text": "a", "label": label} for label in labels]

    def read():
        found = SequenceClassification.clean({"train": rows}, ReadOptions(**data))[0]["train"]
        task(**SequenceClassification.config(found, ReadOptions(**data))).featurize(found)

    with pytest.raises(InputError, match=re.escape(message)) as raised:
        read()
    assert len(str(raised.value)) < 700


def test_lists_are_read_over_all_splits(task):
    rows = {name: [{"text": "a", "label": label}] for name, label in (("train", [1, 0, 1]), ("validation", [2]))}
    with pytest.raises(
        InputError, match=r"^data\.validation: row 1: the label is \[2\], and that of data\.train: row 1"
    ):
        SequenceClassification.clean(rows, ReadOptions())
    rows = {"train": [{"text": "a", "label": [1, 0, 1]}], "test": [{"text": "a", "label": None}, {"text": "a"}]}
    rows, said = SequenceClassification.clean(rows, ReadOptions())
    assert said == "labels: 0/1 vectors over LABEL_0, LABEL_1, LABEL_2"
    examples = task(problem_type=MULTI).featurize([*rows["train"], *rows["test"]])
    expected = np.array([[1, 0, 1], [np.nan] * 3, [np.nan] * 3], np.float32)
    np.testing.assert_array_equal(examples.targets["labels"], expected, strict=True)
    with pytest.raises(InputError, match=r"row 1: the label has 2 numbers; the labels are anger, joy, love\.$"):
        task(problem_type=MULTI).featurize([{"text": "a", "label": [1, 0]}])


def test_an_order_that_is_given_wins():
    rows = [{"label": "equivalent"}, {"label": "not_equivalent"}]
    classes = ("not_equivalent", "equivalent", "unsure")

    def order(classes=None, **data):
        return SequenceClassification.config(rows, ReadOptions(**data), classes)["id2label"]

    assert order() == ("equivalent", "not_equivalent")
    assert order(classes) == classes
    assert order(classes, labels=("not_equivalent", "equivalent")) == ("not_equivalent", "equivalent")
    assert order(("equivalent",)) == ("equivalent", "not_equivalent")


def test_labels_without_names(task):
    with pytest.raises(
        InputError, match=r"'joy' is unknown; the model has LABEL_0, LABEL_1, LABEL_2; set data\.labels"
    ):
        task(id2label=None).featurize([{"text": "a", "label": "joy"}])


# ── Loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

LABELS = {
    SINGLE: ["joy", None, "anger", "love"],
    MULTI: [["joy"], [], None, ["anger", "joy"]],
    REGRESSION: [1, 2, None, 4],
}


def expected_loss(problem_type, z, y):
    if problem_type == SINGLE:
        return -np.log(softmax(z)[y])
    if problem_type == MULTI:
        return -(y * np.log(sigmoid(z)) + (1 - y) * np.log(1 - sigmoid(z))).mean()
    return ((z - y) ** 2).mean()


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, REGRESSION])
def test_loss_is_the_mean_over_examples_that_count(task, models, logits, problem_type):
    changes = {"problem_type": problem_type} | (ONE if problem_type == REGRESSION else {})
    texts = ["I love it.", "No", "Paris", "We do."]
    rows = [{"text": text, "label": label} for text, label in zip(texts, LABELS[problem_type], strict=True)]
    found = task(**changes).featurize(rows)
    y = found.targets["labels"]
    each = [
        expected_loss(problem_type, logits(text, **changes), y[i])
        for i, text in enumerate(texts)
        if LABELS[problem_type][i] is not None
    ]
    batch = found.batch(one_a_row(np.arange(4), 6, 16))
    run = jax.jit(lambda model, batch: task(**changes).loss(model, batch, None))
    loss, count = run(models(**changes), batch)
    assert (float(loss), float(count)) == (pytest.approx(np.mean(each), rel=1e-4), len(each))
    assert loss.dtype == count.dtype == np.float32

    # What stands in rows of padding is not seen.
    batch["targets"]["labels"][4:] = 1
    batch["inputs"]["input_ids"][4:] = 1000
    batch["inputs"]["attention_mask"][4:] = 1
    again, count = run(models(**changes), batch)
    assert (float(again), float(count)) == (pytest.approx(float(loss), rel=1e-6), len(each))

    batch["weights"][:] = 0
    nothing, count = run(models(**changes), batch)
    assert (float(nothing), float(count)) == (0, 0)


OPTIONS = {"class_weights": np.array([0.5, 2, 1], np.float32), "label_smoothing": 0.1, "focal_gamma": 2.0}


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_a_loss_with_options(task, models, problem_type):
    made, model = task(problem_type=problem_type), models(problem_type=problem_type)
    labels = [label for label in LABELS[problem_type] if label is not None]
    examples = made.featurize([{"text": "I love it.", "label": label} for label in labels])
    batch = examples.batch(one_a_row(np.arange(len(labels)), len(labels), 16))
    logits = model(**batch["inputs"], positions=batch["starts"]).logits[:, 0]
    targets = batch["targets"]["labels"][:, 0]
    compute = losses.cross_entropy if problem_type == SINGLE else losses.binary_cross_entropy
    for options in ({}, OPTIONS):
        loss, divisor = made.loss(model, batch, None, **options)
        np.testing.assert_allclose(loss, compute(logits, targets, **options), rtol=1e-6)
    expected = OPTIONS["class_weights"][targets].sum() if problem_type == SINGLE else len(labels)
    np.testing.assert_allclose(divisor, expected, rtol=1e-6)


def test_a_regression_has_no_options_of_classification(task, models):
    changes = {"problem_type": REGRESSION} | ONE
    batch = task(**changes).featurize([{"text": "a", "label": 1}]).batch(one_a_row(np.arange(1), 1, 16))
    with pytest.raises(InputError, match="regression has none of them"):
        task(**changes).loss(models(**changes), batch, None, label_smoothing=0.1)


def test_dropout_reaches_the_model(task, models):
    found = task().featurize([{"text": "I love it.", "label": "joy"}])
    batch = found.batch(one_a_row(np.arange(1), 1, 16))
    run = jax.jit(lambda key: task().loss(models(), batch, key)[0])
    assert len({float(run(jax.random.key(seed))) for seed in range(3)}) == 3


# ── Evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────────


def examples(targets):
    return Examples([], [], targets)


def test_a_threshold_is_found_and_adopted(task, tokenizer):
    scores = np.array([[0.3, 0.1, 0.4], [0.2, 0.35, 0.9], [0.3, 0.05, 0.1]], np.float32)
    labels = np.array([[1, 0, 1], [0, 1, 1], [0, 0, 0]], np.float32)
    tunes = SequenceClassification(
        tokenizer, config(problem_type=MULTI), 16, decision=DecisionOptions(threshold=0.8, tune=True)
    )
    assert tunes.metrics[0] == "best_f1_micro"
    found = tunes.evaluate({"scores": scores}, examples({"labels": labels}))
    assert found["f1_micro"] == pytest.approx(2 / 5)
    # The four highest scores would be the right ones, but the fourth and the fifth are equal.
    assert (found["threshold"], found["best_f1_micro"]) == (pytest.approx(0.25), pytest.approx(8 / 9))
    tuned = tunes.tuned(found)
    again = tuned.evaluate({"scores": scores}, examples({"labels": labels}))
    assert again["f1_micro"] == pytest.approx(8 / 9)
    assert "threshold" not in again
    assert [p["labels"] for p in tuned.predictions({"scores": scores}, examples({}))] == [
        ["anger", "love"], ["joy", "love"], ["anger"],
    ]  # fmt: skip
    fixed = SequenceClassification(tokenizer, config(problem_type=MULTI), 16)
    assert fixed.tuned(found).decision.threshold == 0.5
    assert "threshold" not in fixed.evaluate({"scores": scores}, examples({"labels": labels}))


def test_a_threshold_is_for_several_labels(tokenizer):
    with pytest.raises(InputError, match="decision is for multi_label_classification"):
        SequenceClassification(tokenizer, config(), 16, decision=DecisionOptions(threshold=0.3))


def test_evaluate_passes_over_what_has_no_label(task):
    scores = np.array([[0.1, 0.8, 0.1], [0.9, 0.1, 0], [0.2, 0.3, 0.5], [0.6, 0.2, 0.2]])
    labels = np.array([1, UNKNOWN, 0, 0], np.int32)
    result = task().evaluate({"scores": scores}, examples({"labels": labels}))
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert list(result["per_class"]) == list(NAMES)
    assert result["confusion"] == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert task().evaluate({"scores": scores}, examples({"labels": np.full(4, UNKNOWN, np.int32)})) == {}
    for changes, labels in (({"problem_type": MULTI}, [[0, 1, 0], [np.nan] * 3]), (ONE, [[0.5], [np.nan]])):
        labels, scores = np.float32(labels), np.float32(labels[:1] * 2)
        result = task(**changes).evaluate({"scores": scores}, examples({"labels": labels}))
        assert result.get("accuracy", 1 - result.get("mse", 0)) == 1
        assert not task(**changes).labeled(examples({"labels": labels[1:]}))


def test_evaluate_several_labels(task):
    scores = np.array([[0.6, 0.9, 0.1], [0.4, 0.2, 0.7]])
    result = task(problem_type=MULTI).evaluate(
        {"scores": scores}, examples({"labels": np.float32([[1, 1, 0], [1, 0, 1]])})
    )
    assert result["accuracy"] == 1 / 2
    assert result["f1_micro"] == pytest.approx(2 * 3 / (3 + 4))


def test_a_model_of_one_label_is_evaluated_by_its_numbers_as_it_is_trained(task, models, tokenizer, logits):
    trained = task(**ONE)
    made = trained.featurize([{"text": text, "label": 0.5} for text in TEXTS])
    batch = made.batch(one_a_row(np.arange(len(TEXTS)), len(TEXTS), 32))
    scores = trained.outputs(models(**ONE), batch)["scores"]
    for found, text in zip(np.asarray(scores).ravel(), TEXTS, strict=True):
        assert found == pytest.approx(logits(text, **ONE)[0], abs=1e-5)


def test_evaluate_numbers(task):
    scores, labels = np.float32([[1], [2], [4]]), np.float32([[1], [2], [3]])
    result = task(problem_type=REGRESSION, **ONE).evaluate({"scores": scores}, examples({"labels": labels}))
    assert result["mse"] == pytest.approx(1 / 3)
    assert result["spearman"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "metric"), [({}, "accuracy"), ({"problem_type": MULTI}, "f1_micro"), (ONE, "pearson")]
)
def test_the_metric_is_one_that_evaluate_gives(task, changes, metric):
    made = task(**changes)
    assert made.metrics[0] == metric
    scores = np.float32([[0.9], [0.2]]) if changes is ONE else np.eye(3, dtype=np.float32)
    labels = scores if changes else np.arange(3, dtype=np.int32)
    assert made.evaluate({"scores": scores}, examples({"labels": labels}))[metric] == pytest.approx(1)


def test_predictions(task):
    scores = np.float32([[0.25, 0.625, 0.125], [0.5, 0.25, 0.25]])
    assert task().predictions({"scores": scores}, examples({})) == [
        {"label": "joy", "score": 0.625},
        {"label": "anger", "score": 0.5},
    ]
    several = np.float32([[0.75, 0.625, 0.125], [0.25, 0.5, 0.25]])
    assert task(problem_type=MULTI).predictions({"scores": several}, examples({})) == [
        {"labels": ["anger", "joy"], "scores": {"anger": 0.75, "joy": 0.625, "love": 0.125}},
        {"labels": [], "scores": {"anger": 0.25, "joy": 0.5, "love": 0.25}},
    ]
    assert task(problem_type=REGRESSION, **ONE).predictions({"scores": np.float32([[-2.5]])}, examples({})) == [
        {"label": "LABEL_0", "score": -2.5}
    ]
