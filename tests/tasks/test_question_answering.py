"""question-answering against the answers of transformers 4.57.6, and requests fed with logits of our choice."""

import json
import random
import re

import jax
import numpy as np
import pytest
import questions
import reference
from flax import nnx

import bert_jax
from bert_jax import BertConfig
from bert_jax.data.loader import one_a_row
from bert_jax.errors import InputError
from bert_jax.tasks.base import ReadOptions
from bert_jax.tasks.question_answering import AnswerOptions, QuestionAnswering

CONTEXT = "Norman castles stand in Paris, Rome and Huggingface today."
PIECES = ["Norman", "castles", "stand", "in", "Paris", ",", "Rome", "and", "Hu", "##gging", "##face", "today", "."]


def clean(rows, split="train"):
    """The rows of a split as they are learnt, and the note on them."""
    found, said = QuestionAnswering.clean({split: rows}, ReadOptions())
    return found[split], said


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return bert_jax.pipeline("question-answering", questions.write_model(tmp_path_factory.mktemp("qa")))


@pytest.fixture
def task(tokenizer):
    return QuestionAnswering(tokenizer, BertConfig.from_dict(reference.CONFIG), 512)


def test_golden_answers(pipe):
    cases, golden = questions.cases(), reference.golden("question_answering.json")
    assert len(cases) == len(golden) == 500
    assert sum(len(answers) for answers in golden) > 1000
    assert sum([0, 0] in [answer[1:] for answer in answers] for answers in golden) > 20  # no answer, among the answers
    apart = 0.0
    requests = [pipe.task.request(case, **case["parameters"]) for case in cases]  # batched over all their windows
    for case, answers, found in zip(cases, golden, pipe.run(requests), strict=True):
        found = found if isinstance(found, list) else [found]
        assert [[entry["start"], entry["end"]] for entry in found] == [answer[1:] for answer in answers]
        assert all(entry["answer"] == case["context"][entry["start"] : entry["end"]] for entry in found)
        apart = max([apart, *(abs(entry["score"] - a[0]) for entry, a in zip(found, answers, strict=True))])
    assert apart <= 1e-5


def test_forms_of_input(pipe):
    question, context = "Where is Paris?", CONTEXT
    expected = pipe((question, context))
    assert set(expected) == {"score", "start", "end", "answer"}
    assert type(expected["score"]) is float
    assert pipe({"question": question, "context": context}) == expected
    row = {"id": 7, "question": question, "context": context, "answers": []}  # of a data set
    close = expected | {"score": pytest.approx(expected["score"], abs=1e-6)}  # of another program
    assert pipe([row, (question, context)]) == [close, close]
    assert next(pipe(iter([row]))) == expected


def answer(task, logits, *, windows=1, **options):
    """The answers where a window's pieces have these logits, `piece: (start, end)`, and -9 elsewhere."""
    request = task.request(("Where?", CONTEXT), **options).steps
    rows = next(request)
    assert len(rows) == windows
    outputs = []
    for row, given in zip(rows, logits if isinstance(logits, list) else [logits], strict=True):
        tokens = [task.tokenizer.backend.id_to_token(token) for token in row.input_ids]
        output = np.full((2, len(tokens) + 2), -9, np.float32)
        output[:, len(tokens) :] = 99  # padding
        output[:, tokens.index("?")] = 99  # the question
        for piece, values in given.items():
            output[:, tokens.index(piece)] = values
        outputs.append({"start": output[0], "end": output[1]})
    with pytest.raises(StopIteration) as stopped:
        request.send(outputs)
    return stopped.value.value


def test_the_context_is_these_pieces(tokenizer):
    assert tokenizer.encode([CONTEXT])[0][0].tokens[1:-1] == PIECES


def test_best_spans(task):
    best, second, *_ = answer(task, {"Paris": (9, 5), "Rome": (4, 9)}, top_k=2)
    assert (best["answer"], second["answer"]) == ("Paris, Rome", "Paris")
    p = [np.exp(values) / (np.exp(values).sum() + 12 * np.exp(-9)) for values in ([9, 4], [5, 9])]
    assert best["score"] == pytest.approx(p[0][0] * p[1][1], abs=1e-6)
    assert second["score"] == pytest.approx(p[0][0] * p[1][0], abs=1e-6)
    assert CONTEXT[best["start"] : best["end"]] == "Paris, Rome"


def test_an_end_is_no_sooner_and_not_too_late(task):
    assert answer(task, {"Rome": (9, -9), "Paris": (-9, 9)})["answer"] not in ("Paris, Rome", "Rome, Paris")
    assert (
        answer(task, {"Paris": (9, -9), "Rome": (-9, 9), "stand": (5, 5)}, max_answer_len=3)["answer"] == "Paris, Rome"
    )
    assert answer(task, {"Paris": (9, -9), "Rome": (-9, 9), "stand": (5, 5)}, max_answer_len=2)["answer"] == "stand"


def test_answers_are_whole_words(task):
    first, second = answer(task, {"##gging": (9, 9), "##face": (3, 8)}, top_k=2)
    assert (first["answer"], first["start"], first["end"]) == ("Huggingface", 40, 51)
    assert first["score"] > 0.99  # both spans are that word: one answer
    assert second["answer"] != "Huggingface"


def test_windows_answer_together(task):
    options = {"max_seq_len": 13, "doc_stride": 3, "windows": 2}  # of the context: 8 pieces, of which 3 are shared
    alone = answer(task, [{"Paris": (9, 9)}, {"today": (4, 4)}], **options)
    assert alone["answer"] == "Paris"
    both = answer(task, [{"Rome": (9, 9)}, {"Rome": (9, 9)}], **options)
    assert both["answer"] == "Rome"
    assert both["score"] > 1.9


@pytest.mark.parametrize(
    ("null", "threshold", "answers"),
    [
        (5, None, ["Paris", ""]),
        (8, None, ["", "Paris"]),
        (5, 0.0, ["Paris", ""]),
        (8, 0.0, ["", "Paris"]),
        (8, 5.0, ["Paris", ""]),
        (5, -5.0, ["", "Paris"]),
    ],
)
def test_no_answer(task, null, threshold, answers):
    options = {"null_threshold": threshold} if threshold is not None else {"handle_impossible_answer": True}
    found = answer(task, {"[CLS]": (null, null), "Paris": (7, 7)}, top_k=100, **options)
    names = [entry["answer"] for entry in found]
    assert names[0] == answers[0]
    assert [name for name in names if name in answers] == answers or threshold is not None
    nothing = next(entry for entry in found if not entry["answer"])
    share = np.exp(null) / (np.exp(null) + np.exp(7) + 12 * np.exp(-9))
    assert nothing == {"score": pytest.approx(share**2, abs=1e-6), "start": 0, "end": 0, "answer": ""}


def test_no_answer_has_the_lowest_score_of_the_windows(task):
    windows = [{"[CLS]": (8, 8), "Paris": (7, 7)}, {"[CLS]": (1, 1), "today": (7, 7)}]
    options = {"max_seq_len": 13, "doc_stride": 3, "windows": 2}
    assert answer(task, windows, handle_impossible_answer=True, **options)["answer"] == "today"
    assert answer(task, windows, null_threshold=-11.0, **options)["answer"] != ""
    assert answer(task, windows, null_threshold=-13.0, **options)["answer"] == ""


def test_without_being_asked_there_is_an_answer(task):
    assert answer(task, {"[CLS]": (9, 9), "Paris": (1, 1)})["answer"] == "Paris"


def test_a_long_question_is_cut(task):
    (row,) = next(task.request(("Where " * 100, CONTEXT), max_question_len=10).steps)
    assert len(row.input_ids) == 10 + len(PIECES) + 3


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ("Where?", {}, "expected a question and a context, got 'Where?' (str)"),
        (("Where?",), {}, "expected a question and a context"),
        ({"question": "Where?"}, {}, "expected a question and a context"),
        (("Where?", 7), {}, "expected a question and a context"),
        ((" ", CONTEXT), {}, "the question is empty"),
        (("Where?", "\n"), {}, "the context is empty"),
        (("Where?", CONTEXT), {"top_k": 0}, "top_k is 0; expected a whole number of at least 1"),
        (("Where?", CONTEXT), {"max_answer_len": 1.5}, "max_answer_len is 1.5"),
        (("Where?", CONTEXT), {"max_seq_len": 600}, "max_seq_len is 600; expected at most 512, the model's length"),
        (("Where?", CONTEXT), {"doc_stride": -1}, "doc_stride is -1; expected a whole number of at least 0"),
        (("Where?", CONTEXT), {"max_seq_len": 8, "doc_stride": 8}, "max_length=8 with stride=8 leaves no room"),
    ],
)
def test_bad_input(task, inputs, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        task.request(inputs, **options)


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def rows(count=60, seed=3):
    """Questions whose answers are words of their contexts; every fifth has none."""
    source = random.Random(seed)
    found = []
    for n, case in enumerate(questions.cases()[:count]):
        words = [match.span() for match in re.finditer(r"\S+", case["context"])]
        first = source.randrange(len(words))
        last = min(len(words) - 1, first + source.randint(0, 4))
        start, end = words[first][0], words[last][1]
        answers = {"text": [case["context"][start:end]], "answer_start": [start]}
        found.append({"id": n, "question": case["question"], "context": case["context"],
                      "answers": {"text": [], "answer_start": []} if n % 5 == 4 else answers})  # fmt: skip
    return found


def places_of_run_qa(row, window):
    """A literal reading of transformers' examples/pytorch/question-answering/run_qa.py."""
    answers, offsets, sequence_ids = row["answers"], window.offsets, window.sequence_ids
    if len(answers["answer_start"]) == 0:
        return 0, 0
    start_char = answers["answer_start"][0]
    end_char = start_char + len(answers["text"][0])
    token_start_index = 0
    while sequence_ids[token_start_index] != 1:
        token_start_index += 1
    token_end_index = len(window.ids) - 1
    while sequence_ids[token_end_index] != 1:
        token_end_index -= 1
    if not (offsets[token_start_index][0] <= start_char and offsets[token_end_index][1] >= end_char):
        return 0, 0
    while token_start_index < len(offsets) and offsets[token_start_index][0] <= start_char:
        if sequence_ids[token_start_index] != 1:
            break  # beyond the context; the script reads on there, where offsets are 0, to the end of the row
        token_start_index += 1
    while offsets[token_end_index][1] >= end_char:
        token_end_index -= 1
    return token_start_index - 1, token_end_index + 1


@pytest.mark.parametrize(("length", "stride"), [(384, 128), (64, 16), (40, 0)])
def test_features_are_those_of_run_qa(tokenizer, length, stride):
    task = QuestionAnswering(tokenizer, BertConfig.from_dict(reference.CONFIG), length, AnswerOptions(stride=stride))
    given = rows()
    given, said = clean(given)
    assert "without an answer: " in said
    examples = task.featurize(given)
    place, inside = 0, 0
    for row in given:
        windows = tokenizer.encode(
            [row["question"]], [row["context"]], max_length=length, stride=stride, truncate="only_second"
        )[0]
        for window in windows:
            assert examples.input_ids[place].tolist() == window.ids
            assert examples.token_type_ids[place].tolist() == window.type_ids
            expected = places_of_run_qa(row, window)
            assert (examples.targets["start"][place], examples.targets["end"][place]) == expected
            inside += expected != (0, 0)
            place += 1
    assert place == len(examples)
    assert inside >= 30


def postprocessed(row, features, starts, ends, *, n_best, longest, threshold, version_2):
    """A literal reading of postprocess_qa_predictions in transformers' examples (utils_qa.py)."""
    prelim, null = [], None
    for (context, offsets), start_logits, end_logits in zip(features, starts, ends, strict=True):
        mapping = dict(zip(context.tolist(), offsets.tolist(), strict=True))
        null_score = start_logits[0] + end_logits[0]
        if null is None or null["score"] > null_score:
            null = {"offsets": (0, 0), "score": null_score}
        for start_index in np.argsort(start_logits)[-1 : -n_best - 1 : -1].tolist():
            for end_index in np.argsort(end_logits)[-1 : -n_best - 1 : -1].tolist():
                if start_index not in mapping or end_index not in mapping:
                    continue
                if end_index < start_index or end_index - start_index + 1 > longest:
                    continue
                prelim.append({"offsets": (mapping[start_index][0], mapping[end_index][1]),
                               "score": start_logits[start_index] + end_logits[end_index]})  # fmt: skip
    if version_2:
        prelim.append(null)
    predictions = sorted(prelim, key=lambda entry: entry["score"], reverse=True)[:n_best]
    if version_2 and not any(entry["offsets"] == (0, 0) for entry in predictions):
        predictions.append(null)
    for entry in predictions:
        entry["text"] = row["context"][entry["offsets"][0] : entry["offsets"][1]]
    if not predictions or (len(predictions) == 1 and predictions[0]["text"] == ""):
        return "", float(np.finfo(np.float32).max)
    if not version_2:
        return predictions[0]["text"], None
    best = next(entry for entry in predictions if entry["text"] != "")
    over = null["score"] - best["score"]
    return ("" if over > threshold else best["text"]), over


@pytest.mark.parametrize("unanswerable", [True, False])
@pytest.mark.parametrize("threshold", [0.0, -3.0])
def test_answers_are_those_of_run_qa(tokenizer, unanswerable, threshold):
    options = AnswerOptions(
        stride=16, max_answer_length=7, n_best=5, null_threshold=threshold, unanswerable=unanswerable
    )  # fmt: skip
    task = QuestionAnswering(tokenizer, BertConfig.from_dict(reference.CONFIG), 64, options)
    given = [row for row in rows() if unanswerable or row["answers"]["text"]]
    given, _ = clean(given)
    examples = task.featurize(given)
    source = np.random.default_rng(0)
    outputs = {name: [source.normal(0, 3, len(ids)) for ids in examples.input_ids] for name in ("start", "end")}
    for name in outputs:  # [CLS] is sometimes the likeliest
        for logits in outputs[name]:
            logits[0] = source.normal(5, 3)
    found = task.predictions(outputs, examples)
    assert len(found) == len(given)
    empty = 0
    for n, (row, one) in enumerate(zip(given, found, strict=True)):
        which = [i for i, (owner, *_) in enumerate(examples.origins) if owner == n]
        features = [examples.origins[i][2:] for i in which]
        starts, ends = ([outputs[name][i] for i in which] for name in ("start", "end"))
        answer, over = postprocessed(row, features, starts, ends, n_best=5, longest=7, threshold=threshold,
                                     version_2=unanswerable)  # fmt: skip
        assert one["answer"] == answer
        if unanswerable:
            assert one["null_over_best"] == pytest.approx(over)
        assert one["answer"] in row["context"]
        assert sum(entry["probability"] for entry in one["n_best"]) == pytest.approx(1)
        assert len(one["n_best"]) <= 5 + unanswerable
        for entry in one["n_best"]:
            assert row["context"][entry["start"] : entry["end"]] == entry["text"]
        empty += answer == ""
    assert (empty > 5) == unanswerable
    metrics = task.evaluate(outputs, examples)
    assert ("null_threshold" in metrics) == unanswerable
    assert metrics["best_f1"] >= metrics["f1"] - 1e-9


def test_the_best_answer_counts_where_nothing_is_likelier(tokenizer):
    options = AnswerOptions(n_best=2, unanswerable=True)
    task = QuestionAnswering(tokenizer, BertConfig.from_dict(reference.CONFIG), 64, options)
    asked = {"question": "Where?", "context": CONTEXT}
    given = [asked | {"answers": {"text": ["Paris"], "answer_start": [24]}}, asked | {"answers": []},
             asked | {"answers": None}]  # fmt: skip
    given, _ = clean(given, "validation")
    examples = task.featurize(given)
    outputs = {}
    for name, place in examples.targets.items():
        outputs[name] = [np.full(len(ids), -9.0) for ids in examples.input_ids]
        for logits, null in zip(outputs[name], (1.0, 5.0, 1.0), strict=True):
            logits[0], logits[place[0]] = null, 0.5
    found = task.predictions(outputs, examples)
    assert [(one["answer"], one["best_answer"]) for one in found] == [("", "Paris")] * 3
    metrics = task.evaluate(outputs, examples)  # of the two that have a truth
    assert (metrics["f1"], metrics["best_f1"], metrics["null_threshold"]) == (0.5, 1.0, 1.0)
    assert task.tuned(metrics).evaluate(outputs, examples)["f1"] == 1.0
    assert task.evaluate(outputs, examples)["f1"] == 0.5


def test_the_loss_of_a_window_does_not_depend_on_its_padding(tokenizer, checkpoint):
    config = BertConfig.from_dict(questions.CONFIG)
    model = bert_jax.BertForQuestionAnswering(config, rngs=nnx.Rngs(0))
    task = QuestionAnswering(tokenizer, config, 64, AnswerOptions(stride=16))
    given = rows(4)
    given, _ = clean(given)
    examples = task.featurize(given)
    indices = np.arange(3)
    loss = jax.jit(lambda batch: task.loss(model, batch, None))
    found = [loss(examples.batch(one_a_row(indices, n, length))) for n, length in ((3, 64), (3, 96), (8, 64))]
    assert [float(count) for _, count in found] == [3, 3, 3]
    assert [float(mean) for mean, _ in found] == pytest.approx([float(found[0][0])] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": ""}, "the context is ''; expected a text"),
        ({"question": None}, "the question is None; expected a text"),
        (
            {"answers": {"text": ["Rome"], "answer_start": [0]}},
            "the context has 'Norm' at 0; expected the answer 'Rome' there.",
        ),
        ({"answers": {"text": ["Rome"], "answer_start": [-5]}}, "at -5; expected the answer 'Rome' there."),
        ({"answers": ["Rome"]}, "answers is ['Rome']; expected text and answer_start"),
        ({"answers": {"text": ["Rome"]}}, "expected text and answer_start"),
        ({"answers": [{"text": "Rome"}]}, "expected text and answer_start"),
        ({"answers": {"text": ["Rome"], "answer_start": []}}, "expected text and answer_start"),
        ({"answers": {"text": [5], "answer_start": [0]}}, "expected text and answer_start"),
        ({"answers": "[Rome"}, "'[Rome' is not a list or object"),
        (
            {"answers": "{'text': ['Par' 'is', 'x'], 'answer_start': [24]}"},
            "['Par' 'is', 'x'], 'answer_start': [24]}\" is not a list",
        ),
        ({"answers": "{'text': ['Par' 'is'], 'answer_start': [24]}"}, "expected text and answer_start"),
        ({"is_impossible": "perhaps"}, "is_impossible is 'perhaps'; expected true or false."),
        ({"is_impossible": float("nan")}, "is_impossible is nan; expected true or false."),
    ],
)
def test_rows_that_cannot_be_used_are_counted_and_named(change, message):
    good = {"id": "a", "question": "Where?", "context": CONTEXT, "answers": {"text": ["Paris"], "answer_start": [24]}}
    given = {"train": [dict(good), good | {"id": "b"} | change, good | {"id": "c"}]}
    given, said = QuestionAnswering.clean(given, ReadOptions())
    assert said.startswith("skipped 1 of 3 rows; the first is data.train, row 2 b: ")
    assert message in said
    assert [(row["id"], row["row"]) for row in given["train"]] == [("a", 1), ("c", 3)]
    with pytest.raises(InputError, match=r"\(1 of 1 rows are invalid\. A split has no valid rows left\.\)$"):
        QuestionAnswering.clean({"train": [good | change]}, ReadOptions(wrong_answers="stop"))


def test_forms_of_answers():
    row = {"question": "Where?", "context": CONTEXT}
    expected = {"text": ["Paris"], "answer_start": [24]}
    of_pandas = "{'text': array(['Paris'], dtype=object), 'answer_start': array([24], dtype=int32)}"
    for answers in (expected, [{"text": "Paris", "answer_start": 24}], json.dumps(expected), str(expected), of_pandas,
                    {"text": "Paris", "answer_start": 24}):  # fmt: skip
        given = [row | {"answers": answers}]
        given, said = clean(given)
        assert said == ""
        assert given[0]["answers"] == expected
    far = [row | {"answers": {"text": ["Rome"], "answer_start": [0]}}]  # counts for its text where nothing is learnt
    found, said = QuestionAnswering.clean({"train": [row | {"answers": []}], "validation": far}, ReadOptions())
    assert said == "without an answer: 1 of data.train (answers.unanswerable lets the model give no answer)"
    assert found["validation"][0]["answers"]["text"] == ["Rome"]
    for nothing in ([], {"text": [], "answer_start": []}, {"text": [""], "answer_start": [0]}, ""):
        given = [row | {"answers": nothing}]
        given, _ = clean(given)
        assert given[0]["answers"] == {"text": [], "answer_start": []}


@pytest.mark.parametrize("impossible", [True, "True", "true", 1])
def test_plausible_answers_are_none(impossible):
    row = {"question": "Where?", "context": CONTEXT, "answers": {"text": ["Paris"], "answer_start": [24]}}
    given = [
        row | {"is_impossible": impossible},
        row | {"is_impossible": False},
        row | {"is_impossible": None},
        dict(row),
    ]
    given, said = clean(given)
    assert said == "without an answer: 1 of data.train (answers.unanswerable lets the model give no answer)"
    assert [entry["answers"]["text"] for entry in given] == [[], ["Paris"], ["Paris"], ["Paris"]]


def test_labels_are_refused():
    with pytest.raises(InputError, match=r"^data\.labels is a, b; question-answering has no labels"):
        QuestionAnswering.clean({"train": rows()}, ReadOptions(labels=("a", "b")))


def test_questions_without_answers_are_not_trained_on_unasked():
    row = {"question": "Where?", "context": CONTEXT, "answers": None}
    with pytest.raises(InputError, match=r"data\.train, row 1: answers is None; expected .*\(1 of 1 rows"):
        QuestionAnswering.clean({"train": [dict(row)]}, ReadOptions())
    given = [dict(row)]  # to be predicted
    given, said = clean(given, "validation")
    assert said == ""
    assert given[0]["answers"] is None


def test_an_id_stands_for_one_question():
    row = {"id": "a", "question": "Where?", "context": CONTEXT, "answers": []}
    with pytest.raises(InputError, match=r"data\.validation: the id 'a' is in 2 rows; expected one"):
        QuestionAnswering.clean({"validation": [dict(row), dict(row)]}, ReadOptions())


def test_a_question_longer_than_the_window(tokenizer):
    task = QuestionAnswering(tokenizer, BertConfig.from_dict(reference.CONFIG), 32, AnswerOptions(stride=8))
    row = {"question": "why " * 50, "context": CONTEXT, "answers": None}
    with pytest.raises(InputError, match=r"row 7: a question of 50 tokens leaves no room in windows of 32 .* by 8\."):
        task.featurize([row | {"row": 7}])
    short = QuestionAnswering(
        tokenizer, BertConfig.from_dict(reference.CONFIG), 32, AnswerOptions(stride=8, max_question_length=4)
    )
    assert short.featurize([row]).input_ids[0].tolist().count(tokenizer.sep_token_id) == 2


def test_windows_that_hardly_move_are_refused(task):
    options = {"max_seq_len": 400, "doc_stride": 393}
    with pytest.raises(InputError, match=r"the context has 6000 tokens; its windows of 400 tokens .* Lower doc_stride"):
        task.request(("Where?", "a " * 6000), **options)
    words = "unquestionably " * 200  # more characters than its windows could have tokens
    assert task.request(("Where?", words * 2), **options).tokens > 0
