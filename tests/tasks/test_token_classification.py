"""token-classification: requests fed with labels of our choice, and a small model called directly."""

import re

import numpy as np
import pytest
import reference

import bert_jax
from bert_jax import BertConfig, losses
from bert_jax.data.loader import one_a_row
from bert_jax.errors import InputError
from bert_jax.tasks.base import ReadOptions
from bert_jax.tasks.token_classification import TokenClassification

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")
ARCHITECTURE = "BertForTokenClassification"


@pytest.fixture
def task(tokenizer):
    def task(max_length=128):
        config = BertConfig.from_dict(reference.CONFIG | {"id2label": dict(enumerate(LABELS)), "label2id": {}})
        return TokenClassification(tokenizer, config, max_length)

    return task


def label(task, text, *labels, **options):
    """What becomes of a text of one window whose tokens have these labels, `NAME` or `NAME 0.8`."""
    request = task.request(text, **options).steps
    (row,) = next(request)
    assert len(row.input_ids) == len(labels) + 2, row.input_ids
    scores = np.full((len(row.input_ids) + 3, len(LABELS)), np.nan, np.float32)  # padded: what is there is not read
    for i, (name, _, score) in enumerate(label.partition(" ") for label in labels):
        top = float(score or 0.9)
        scores[i + 1] = (1 - top) / (len(LABELS) - 1)
        scores[i + 1, LABELS.index(name)] = top
    with pytest.raises(StopIteration) as stopped:
        request.send([{"scores": scores}])
    return stopped.value.value


def test_tokens(task):
    first, second = label(task(), "Paris, Texas", "B-LOC 0.75", "O", "I-LOC 0.5")
    assert first == {"entity": "B-LOC", "score": 0.75, "index": 1, "word": "Paris", "start": 0, "end": 5}
    assert second == {"entity": "I-LOC", "score": 0.5, "index": 3, "word": "Texas", "start": 7, "end": 12}
    assert type(first["score"]) is float


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        (["B-PER", "I-PER", "I-PER"], [("PER", "Paris Texas Rome")]),
        (["I-PER", "I-PER", "B-PER"], [("PER", "Paris Texas"), ("PER", "Rome")]),
        (["B-PER", "B-PER", "I-PER"], [("PER", "Paris"), ("PER", "Texas Rome")]),
        (["B-PER", "I-LOC", "I-PER"], [("PER", "Paris"), ("LOC", "Texas"), ("PER", "Rome")]),
        (["MISC", "MISC", "O"], [("MISC", "Paris Texas")]),
        (["I-PER", "O", "I-PER"], [("PER", "Paris"), ("PER", "Rome")]),
        (["O", "O", "O"], []),
    ],
)
def test_groups(task, labels, groups):
    entities = label(task(), "Paris Texas Rome", *labels, aggregation_strategy="simple")
    assert [(entity["entity_group"], entity["word"]) for entity in entities] == groups
    assert all("Paris Texas Rome"[entity["start"] : entity["end"]] == entity["word"] for entity in entities)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("none", [("B-LOC", 0.6), ("I-PER", 0.5), ("I-PER", 0.9)]),
        ("simple", [("LOC", 0.6), ("PER", 0.7)]),
        ("first", [("LOC", 0.6)]),
        ("max", [("PER", 0.9)]),
        ("average", [("PER", (0.08 + 0.5 + 0.9) / 3)]),
    ],
)
def test_strategies_on_a_word_of_three_pieces(task, tokenizer, strategy, expected):
    assert tokenizer.encode(["Huggingface"])[0][0].tokens[1:-1] == ["Hu", "##gging", "##face"]
    entities = label(task(), "Huggingface", "B-LOC 0.6", "I-PER 0.5", "I-PER 0.9", aggregation_strategy=strategy)
    found = [(entity.get("entity") or entity["entity_group"], entity["score"]) for entity in entities]
    assert found == [(name, pytest.approx(score, abs=1e-6)) for name, score in expected]
    if len(entities) == 1:
        assert {"word": "Huggingface", "start": 0, "end": 11}.items() <= entities[0].items()


@pytest.mark.parametrize("text", ["Zoë  saw\t東京 😀 in   Paris", "é e\u0301 ﬁ Paris"])
def test_characters_are_the_texts(task, tokenizer, text):
    encoding = tokenizer.encode([text])[0][0]
    entities = label(task(), text, *["MISC"] * (len(encoding) - 2))
    assert entities[-1] | {"score": 0} == {
        "entity": "MISC", "score": 0, "index": len(encoding) - 2, "word": "Paris", "start": len(text) - 5,
        "end": len(text),
    }  # fmt: skip
    shown = [text[entity["start"] : entity["end"]] for entity in entities]
    assert "".join(shown) == "".join(text.split())


def test_words_are_joined_by_a_space(task):
    # "New York" and "U.S." stay what they are given as; a piece's characters count in the joined text.
    entities = label(task(), ("in", "U.S.", "Paris"), "O", "B-LOC", "I-LOC", "I-LOC", "I-LOC", "B-LOC",
                     aggregation_strategy="simple")  # fmt: skip
    assert [(entity["start"], entity["end"]) for entity in entities] == [(3, 7), (8, 13)]


def test_ignored_labels(task):
    assert len(label(task(), "Paris Rome", "O", "MISC", ignore_labels=[])) == 2
    assert label(task(), "Paris Rome", "O", "MISC", ignore_labels=["O", "MISC"]) == []
    grouped = label(task(), "Paris Rome", "I-PER", "MISC", ignore_labels=["PER"], aggregation_strategy="simple")
    assert [entity["entity_group"] for entity in grouped] == ["MISC"]


def test_a_long_text_is_read_in_windows(task):
    text = " ".join(["Paris"] * 30)
    request = task(max_length=14).request(text).steps  # 12 tokens of text a window, of which 3 are the one before's
    rows = next(request)
    assert [len(row.input_ids) for row in rows] == [14, 14, 14]
    outputs = []
    for n, row in enumerate(rows):  # the label tells the window
        scores = np.zeros((len(row.input_ids), len(LABELS)), np.float32)
        scores[:, n + 1] = 1
        outputs.append({"scores": scores})
    with pytest.raises(StopIteration) as stopped:
        request.send(outputs)
    entities = stopped.value.value
    assert [entity["index"] for entity in entities] == list(range(1, 31))
    assert [entity["start"] for entity in entities] == [6 * i for i in range(30)]
    # Windows begin at the tokens 0, 9 and 18; of three that two share, the middle one is the earlier's.
    windows = [LABELS.index(entity["entity"]) - 1 for entity in entities]
    assert windows == [0] * 11 + [1] * 9 + [2] * 10


@pytest.mark.parametrize("words", [False, True])
def test_scores_are_the_models(checkpoint, tmp_path, words):
    config = reference.config(ARCHITECTURE)
    folder = reference.write(tmp_path, reference.tensors(ARCHITECTURE), config)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(config["vocab_size"] - 5))]
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in vocabulary))
    texts = ["w1 w2 w3", "w9", " ".join(f"w{i}" for i in range(12))]
    pipe = bert_jax.pipeline("token-classification", folder)
    given = [tuple(text.split()) for text in texts] if words else texts
    results = pipe(given, ignore_labels=[])
    model, tokenizer = bert_jax.BertForTokenClassification.from_pretrained(folder), pipe.tokenizer
    logits_of_all = np.asarray(model(**tokenizer(texts)).logits, np.float64)
    for text, result, row in zip(texts, results, logits_of_all, strict=True):
        logits = row[1 : 1 + len(text.split())]
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        assert [entity["score"] for entity in result] == pytest.approx(p.max(-1), abs=1e-5)
        assert [entity["word"] for entity in result] == text.split()
    if words:
        alone = pipe(given[0], ignore_labels=[])
        assert [entity["word"] for entity in alone] == [entity["word"] for entity in results[0]]
        assert [e["score"] for e in alone] == pytest.approx([e["score"] for e in results[0]], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the text is empty"),
        (" \n", {}, "the text is empty"),
        ([], {}, "the text is empty"),
        (7, {}, "expected a text or its words, got 7 (int)"),
        (["a", 1], {}, "expected a text or its words"),
        ("a", {"aggregation_strategy": "most"}, "aggregation_strategy is 'most'; expected one of none, simple, first"),
        ("a", {"ignore_labels": "O"}, "ignore_labels is 'O'; expected a list"),
    ],
)
def test_bad_input(task, text, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        task().request(text, **options)


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SENTENCE = {"tokens": ["Mrs", "Unbelievably", "\u200b", "lives", "here"], "tags": ["B-PER", "I-PER", "O", "O", "B-LOC"]}


def clean(rows, **data):
    """The note on rows, and the rows as they are learnt."""
    found, said = TokenClassification.clean({"train": rows}, ReadOptions(**data))
    return said, found["train"]


def tags_of(rows, **data):
    return [row["tags"] for row in clean(rows, **data)[1]]


def rows_of(*sentences):
    return [{"tokens": ["w"] * len(tags), "tags": tags} for tags in sentences]


def test_a_label_stands_at_a_words_first_piece(task):
    examples = task().featurize([SENTENCE])
    (ids,), (labels,) = examples.input_ids, examples.token_targets["labels"]
    pieces = [task().tokenizer.backend.id_to_token(int(i)) for i in ids]
    words = {"Mrs": "B-PER", "lives": "O", "here": "B-LOC"}
    assert len(labels) == len(ids)
    found = {piece: LABELS[label] for piece, label in zip(pieces, labels, strict=True) if label != losses.IGNORE}
    first = next(piece for piece in pieces if "Unbelievably".startswith(piece) and piece != "[CLS]")
    assert found == words | {first: "I-PER"}
    assert sum(labels == losses.IGNORE) == len(ids) - 4  # special tokens and further pieces; one word has no piece
    batch = examples.batch(one_a_row(np.array([0]), 2, 32))
    assert batch["targets"]["labels"].shape == (2, 32)
    assert (batch["targets"]["labels"][0, : len(ids)] == labels).all()
    assert (batch["targets"]["labels"][0, len(ids) :] == losses.IGNORE).all()
    assert (batch["targets"]["labels"][1] == losses.IGNORE).all()


@pytest.mark.parametrize("length", [8, 11, 16, 40])
def test_windows_label_and_predict_every_word_once(task, length):
    source = np.random.RandomState(0)
    words = ["Paris", "Unbelievably", "went", "jumping", "kangaroos", "to"]
    rows = []
    for n in (1, 3, 20, 57):
        tokens = [words[i] for i in source.randint(0, len(words), n)]
        rows.append({"tokens": tokens, "tags": [LABELS[i] for i in source.randint(0, 5, n)]})
    windows = task(length)
    examples = windows.featurize(rows)
    assert max(map(len, examples.input_ids)) <= length
    counts = [0] * len(rows)
    for labels, (n, _, _) in zip(examples.token_targets["labels"], examples.origins, strict=True):
        counts[n] += sum(labels != losses.IGNORE)
    assert counts == [len(row["tokens"]) for row in rows]
    # Scores that say what the labels are give the tags back.
    scores = []
    for labels in examples.token_targets["labels"]:
        scores.append(np.full((len(labels), len(LABELS)), 0.0))
        scores[-1][np.arange(len(labels)), np.where(labels == losses.IGNORE, 5, labels)] = 1.0
    assert [p["tags"] for p in windows.predictions({"scores": scores}, examples)] == [row["tags"] for row in rows]
    metrics = windows.evaluate({"scores": scores}, examples)
    assert (metrics["f1"], metrics["accuracy"]) == (1.0, 1.0)
    alone = task().featurize(rows[:1])
    assert windows.featurize(rows[:1]).token_targets["labels"][0].tolist() == alone.token_targets["labels"][0].tolist()


def test_a_word_of_no_token_is_o(task):
    examples = task().featurize([SENTENCE])
    scores = [np.eye(len(LABELS))[np.where(examples.token_targets["labels"][0] == losses.IGNORE, 1, 2)]]
    (prediction,) = task().predictions({"scores": scores}, examples)
    assert prediction["tags"] == ["I-PER", "I-PER", "O", "I-PER", "I-PER"]


@pytest.mark.parametrize(
    ("said", "given", "expected"),
    [
        ("tags: IOB2", ["B-A", "I-A", "O", "B-A", "B-A"], ["B-A", "I-A", "O", "B-A", "B-A"]),
        ("tags: IOB1, read as IOB2", ["I-A", "I-A", "B-A", "O", "I-B"], ["B-A", "I-A", "B-A", "O", "B-B"]),
        ("tags: BIOES, read as IOB2", ["B-A", "I-A", "E-A", "S-B", "O"], ["B-A", "I-A", "I-A", "B-B", "O"]),
        ("tags: none", ["NN", "VB", "."], ["NN", "VB", "."]),
        ("tags: IOB2", ["B", "I", "O", "B"], ["B", "I", "O", "B"]),
        ("tags: IOB1, read as IOB2", ["I", "I", "O", "I", "B"], ["B", "I", "O", "B", "B"]),
        ("tags: BIOES, read as IOB2", ["B", "I", "E", "S", "O"], ["B", "I", "I", "B", "O"]),
        ("tags: IOB2", ["PER-B", "PER-I", "O", "LOC-x-B"], ["B-PER", "I-PER", "O", "B-LOC-x"]),
        ("tags: BIOES, read as IOB2", ["PER-B", "PER-E", "O", "LOC-S"], ["B-PER", "I-PER", "O", "B-LOC"]),
        ("tags: none", ["S", "NN", "B"], ["S", "NN", "B"]),  # letters among other tags are tags
        ("tags: none", ["O", "O", "O"], ["O", "O", "O"]),
    ],
)
def test_schemes(said, given, expected):
    found, rows = clean(rows_of(given))
    assert (found, [row["tags"] for row in rows]) == (said, [expected])


def test_tags_by_number_as_text_and_missing():
    assert tags_of(rows_of([0, 1, 2]), labels=("O", "B-A", "I-A")) == [["O", "B-A", "I-A"]]
    rows = [{"tokens": ["a", "b"], "tags": "['O', 'B-creative-work']"}, {"tokens": ["a"], "tags": None}]
    assert tags_of(rows) == [["O", "B-creative-work"], None]
    config = TokenClassification.config(clean(rows)[1], ReadOptions())
    assert config == {"id2label": ("O", "B-creative-work", "I-creative-work"), "num_labels": 3}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_of(["O"], ["B-A", "X"]), "the tag 'X' follows no scheme; expected O, B-"),
        (
            [{"tokens": ["a", "b"], "tags": ["O"]}],
            "data.train: row 1: 2 tokens and 1 tags; expected one tag for each token",
        ),
        ([{"tokens": "a b", "tags": ["O", "O"]}], "row 1: 'a b' is not a list or object"),
        ([{"tokens": "7", "tags": ["O", "O"]}], "row 1: tokens is 7; expected a list of one or more words"),
        ([{"tokens": [], "tags": []}], "row 1: tokens is []; expected a list of one or more words"),
        (rows_of([0, 1]), "the tag 0 is outside data.labels (0 names); list the names of all tags"),
        (rows_of(["O", None]), "row 1: a tag is None; expected a text, or a number"),
        (rows_of([0.0, float("nan")]), "row 1: a tag is 0.0; expected a text, or a number"),
        (rows_of(["O", "B-A", "B"]), "the tag 'B' follows no scheme; expected O, B-"),
        (rows_of(["O", "PER-B", "X"]), "the tag 'PER-B' follows no scheme"),
        (rows_of(["O", "PER-B", "B-PER"]), "the tag 'PER-B' follows no scheme"),
        (rows_of(["O", "B_PER", "I_PER"]), "the tag 'B_PER' follows no scheme"),
        (
            [{"tokens": "['a', 'b' 'c']", "tags": "['O', 'O', 'O']"}],
            "row 1: \"['a', 'b' 'c']\" is not a list",
        ),
    ],
)
def test_bad_rows(rows, message):
    with pytest.raises(InputError, match=re.escape(message)):
        clean(rows)


def test_each_split_has_a_scheme_of_its_own():
    rows = {
        "train": rows_of(["I-A", "O"], ["I-A", "B-A"]),
        "validation": rows_of(["B-A", "O"], ["B-A", "I-A"]),
        "test": [{"tokens": ["a"]}],
    }
    found, said = TokenClassification.clean(rows, ReadOptions())
    assert said == "tags of train: IOB1, read as IOB2; tags of validation: IOB2"
    assert [row["tags"] for row in found["train"]] == [["B-A", "O"], ["B-A", "B-A"]]
    assert rows["train"][0]["tags"] == ["I-A", "O"]  # what was given stays as it is
    rows["validation"][1]["tags"][1] = "X"
    with pytest.raises(InputError, match=r"^data\.validation: the tag 'X' follows no scheme"):
        TokenClassification.clean(rows, ReadOptions())


def test_prefixes_of_no_scheme():
    for tag in ("U-PER", "b-per"):
        with pytest.raises(InputError, match=f"the tag '{tag}' follows no scheme"):
            clean(rows_of(["O", tag]))
    assert clean(rows_of(["X-Y", "NN"]))[0] == "tags: none"  # without an O they may be anything


def test_words_of_a_table():
    said, rows = clean([{"tokens": '["Anna", "runs"]', "tags": "['B-PER', 'O']"}])
    assert (said, rows[0]["tags"]) == ("tags: IOB2", ["B-PER", "O"])


@pytest.mark.parametrize("tags", ["['B-PER' 'O' 'O']", "['B-PER'\n 'O' 'O']", "[1 0 0]", '["B-PER", "O", "O"]'])
def test_lists_as_numpy_writes_them(tags):
    rows = [{"tokens": "['Anna'\n \"isn't\" 'here']", "tags": tags}]
    expected = [{"tokens": ["Anna", "isn't", "here"], "tags": ["B-PER", "O", "O"]}]
    assert clean(rows, labels=("O", "B-PER")) == ("tags: IOB2", expected)


def test_entities_without_a_type(tokenizer):
    rows = rows_of(["I", "I", "O", "I", "B"])
    said, rows = clean(rows)
    assert said == "tags: IOB1, read as IOB2"
    fields = TokenClassification.config(rows, ReadOptions())
    assert fields["id2label"] == ("O", "B", "I")
    task = TokenClassification(tokenizer, BertConfig.from_dict(reference.CONFIG).replace(**fields), 32)
    assert task.metrics[0] == "f1"
    examples = task.featurize(rows)
    # Two of three entities are found, and one that is none: tags B I O B I.
    tags = ["B", "I", "O", "B", "I"]
    scores = np.zeros((len(examples.input_ids[0]), 3))
    for (place, _), tag in zip(examples.origins[0][2], tags, strict=True):
        scores[place, task.labels.index(tag)] = 1
    found = task.evaluate({"scores": [scores]}, examples)
    assert (found["precision"], found["recall"], found["f1"]) == (1 / 2, 1 / 3, pytest.approx(2 / 5))
    assert found["per_class"] == {"_": found["per_class"]["_"]}


def test_the_order_of_the_data_set():
    rows = [{"tokens": ["a", "b"], "tags": ["O", "B-A"]}]
    classes = ("O", "B-Z", "I-Z", "B-A", "I-A")
    assert TokenClassification.config(rows, ReadOptions(), classes)["id2label"] == classes
    assert TokenClassification.config(rows, ReadOptions(labels=("B-A", "O")), classes)["id2label"] == ("B-A", "O")
    for other in (("O", "I-A"), ("O", "B-A", "I-A", "E-A", "S-A")):  # of tags that have become IOB2's
        assert TokenClassification.config(rows, ReadOptions(), other)["id2label"] == ("O", "B-A", "I-A")


def test_names_of_labels_in_the_settings():
    rows = [{"tokens": ["a", "b"], "tags": ["O", "B-A"]}]
    assert TokenClassification.config(rows, ReadOptions(labels=("B-A", "O")))["id2label"] == ("B-A", "O")
    with pytest.raises(InputError, match=r"data\.labels lacks the tag 'B-A' of data.train; it has O, B-B"):
        TokenClassification.config(rows, ReadOptions(labels=("O", "B-B")))
    with pytest.raises(InputError, match=r"the tag 7 is outside data\.labels \(2 names\)"):
        clean(rows_of([7]), labels=("O", "B-B"))


def test_parts_of_speech_have_no_entities(tokenizer):
    config = BertConfig.from_dict(reference.CONFIG | {"id2label": {0: "NN", 1: "VB"}, "label2id": {}})
    task = TokenClassification(tokenizer, config, 32)
    assert task.metrics == ("accuracy",)
    examples = task.featurize([{"tokens": ["dogs", "bark"], "tags": ["NN", "VB"]}])
    scores = [np.tile([1.0, 0.0], (len(examples.input_ids[0]), 1))]
    assert task.evaluate({"scores": scores}, examples) == {"accuracy": 0.5}


def test_an_unknown_tag_and_no_tags(task):
    with pytest.raises(InputError, match="row 1: the tag 'B-X' is unknown; the labels are O, B-PER"):
        task().featurize([{"tokens": ["a"], "tags": ["B-X"]}])
    with pytest.raises(InputError, match="no row has tags"):
        TokenClassification.config([{"tokens": ["a"], "tags": None}], ReadOptions())
