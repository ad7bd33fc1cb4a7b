"""question-answering against the answers of transformers 4.57.6, and requests fed with logits of our choice."""

import re

import numpy as np
import pytest
import questions
import reference

import bert_jax
from bert_jax import BertConfig
from bert_jax.errors import InputError
from bert_jax.tasks.question_answering import QuestionAnswering

CONTEXT = "Norman castles stand in Paris, Rome and Huggingface today."
PIECES = ["Norman", "castles", "stand", "in", "Paris", ",", "Rome", "and", "Hu", "##gging", "##face", "today", "."]


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
    assert pipe([row, (question, context)]) == [expected, expected]
    assert next(pipe(iter([row]))) == expected


def answer(task, logits, *, windows=1, **options):
    """The answers where a window's pieces have these logits, `piece: (start, end)`, and -9 elsewhere."""
    request = task.request(("Where?", CONTEXT), **options)
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
    (row,) = next(task.request(("Where " * 100, CONTEXT), max_question_len=10))
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
        (("Where?", CONTEXT), {"max_seq_len": 600}, "max_seq_len is 600; the model has 512 positions"),
        (("Where?", CONTEXT), {"doc_stride": -1}, "doc_stride is -1; expected a whole number of at least 0"),
        (("Where?", CONTEXT), {"max_seq_len": 8, "doc_stride": 8}, "max_length=8 with stride=8 leaves no room"),
    ],
)
def test_bad_input(task, inputs, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        task.request(inputs, **options)
