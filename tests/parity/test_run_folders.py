"""Runs of each task as others get them: the uploaded files, used by the code of their cards, in both libraries."""

import ast
import json
import re
import shutil

import hub_server
import numpy as np
import pytest
from flax import nnx

import bert_jax
from bert_jax import recipes, upload
from bert_jax.settings import Pretraining, Settings

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PEOPLE, PLACES = ("Anna", "Peter", "Mary"), ("Oslo", "Rome", "Berlin")
SENTENCES = [(PEOPLE[n % 3], PLACES[n // 3 % 3]) for n in range(36)]


def _classified(label):
    return [{"text": f"{person} moved to {place}.", "label": label(person, place)} for person, place in SENTENCES]


ROWS = {
    "text-classification": _classified(lambda person, place: person),
    "several labels": _classified(lambda person, place: [person, place]),
    "regression": _classified(lambda person, place: PLACES.index(place) / 7),
    "token-classification": [
        {"tokens": [person, "moved", "to", place, "."], "tags": ["B-PER", "O", "O", "B-LOC", "O"]}
        for person, place in SENTENCES
    ],
    "question-answering": [
        {"question": f"Where did {person} move?", "context": f"{person} moved to {place}.",
         "answers": {"text": [place], "answer_start": [len(person) + 10]}}
        for person, place in SENTENCES
    ],
    "multiple-choice": [
        {"context": f"{person} moved to {place}.", "choices": [f"{person} left.", f"{place} left."], "label": 0}
        for person, place in SENTENCES
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    config = bert_jax.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    bert_jax.BertForPreTraining(config, rngs=nnx.Rngs(1)).save_pretrained(folder)
    bert_jax.Tokenizer.from_pretrained("bert-mini-cased").save_pretrained(folder)
    return folder


@pytest.fixture
def finished(base, tmp_path):
    """Makes a run of a few steps; returns its uploaded files alone, and what each snippet of its card answers."""

    def finished(task, rows=None, steps=6):
        folder = tmp_path / "run"
        tree = {
            "task": task, "model": {"id": str(base)}, "mesh": {"data": 1},
            "optimizer": {"learning_rate": 1e-2}, "training": {"max_steps": steps, "batch_size": 12},
            "output": {"folder": str(folder), "report_to": []},
        }  # fmt: skip
        if rows is None:
            (tmp_path / "texts.txt").write_text("\n\n".join(f"{a} moved to {b}.\nIt is good." for a, b in SENTENCES))
            data = {"train": str(tmp_path / "texts.txt"), "max_length": 32, "processes": 1}
            recipes.pretrain(Pretraining.from_dict(tree | {"data": data}))
        else:
            path = tmp_path / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            data = {"train": str(path), "validation": str(path), "max_length": 32}
            recipes.finetune(Settings.from_dict(tree | {"data": data}))
        shared = tmp_path / "shared"
        shared.mkdir()
        for name in upload.model_files(folder):
            shutil.copyfile(folder / name, shared / name)
        card = (shared / "README.md").read_text(encoding="utf-8")
        assert hub_server.problems(card) == []
        assert str(tmp_path) not in card
        snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        return [_answer(snippet.replace("OWNER/run", str(shared))) for snippet in snippets]

    return finished


def _answer(code):
    """The value of the last line of some code."""
    module, names = ast.parse(code), {}
    last = ast.Expression(module.body.pop().value)
    exec(compile(module, "snippet", "exec"), names)
    return eval(compile(last, "snippet", "eval"), names)


@pytest.mark.parametrize("kind", ["text-classification", "several labels", "regression"])
def test_text_classification(finished, close, kind):
    ours, (theirs,) = finished("text-classification", ROWS[kind])
    assert ours["label"] == theirs["label"]
    close("cards: text classification", ours["score"], theirs["score"])


def test_token_classification(finished, close):
    ours, theirs = finished("token-classification", ROWS["token-classification"], steps=30)
    assert [entity["entity"] for entity in ours] == ["B-PER", "B-LOC"]
    assert [entity.keys() for entity in ours] == [entity.keys() for entity in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a | {"score": 0} == b | {"score": 0}
    close("cards: token classification", [e["score"] for e in ours], [e["score"] for e in theirs])


def test_question_answering(finished):
    ours, theirs = finished("question-answering", ROWS["question-answering"], steps=60)
    assert ours["answer"].rstrip(".") == theirs == "Oslo"


def test_multiple_choice(finished, close):
    ours, theirs = finished("multiple-choice", ROWS["multiple-choice"])
    assert np.ptp(ours["scores"]) > 1e-5
    close("cards: multiple choice", [ours["scores"]], theirs.detach().numpy(), tolerance=1e-6)


def test_pretraining(finished, close):
    ours, theirs = finished("pretraining")
    assert [filling["token"] for filling in ours] == [filling["token"] for filling in theirs]
    assert [filling["sequence"] for filling in ours] == [filling["sequence"] for filling in theirs]
    close("cards: fill-mask", [filling["score"] for filling in ours], [filling["score"] for filling in theirs])
