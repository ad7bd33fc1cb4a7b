"""Our text-classification pipeline beside transformers'."""

import random
import shutil

import numpy as np
import pytest
import torch
import transformers

import bert_jax
from bert_jax import hub

pytestmark = pytest.mark.usefixtures("one_torch_thread")

EMBEDDED = hub.EMBEDDED / "bert-mini-cased"
ODD = ["…", "--", "?!", "(", ")", "\"", "’s", "don't", "1,000.50", "café", "naïvely", "Zürich", "Ελλάδα", "Ђорђе",
       "東京", "中文字", "한국어", "😀", "👩‍🔬", "ﬁ", "ǅ", "e\u0301", "\t", "\n", "\u00a0", "[MASK]", "[SEP]",
       "x" * 120, "antidisestablishmentarianism"]  # fmt: skip
COUNT = 500
TASKS = {
    "single": {"problem_type": "single_label_classification", "num_labels": 5},
    "single by default": {"num_labels": 3},
    "multi": {"problem_type": "multi_label_classification", "num_labels": 5},
    "regression": {"problem_type": "regression", "num_labels": 1},
    "one label": {"num_labels": 1},
}


def inputs():
    """Texts of 1 to about 600 tokens, most of them short, and pairs."""
    source = random.Random(0)
    words = [word for word in (EMBEDDED / "vocab.txt").read_text(encoding="utf-8").split("\n") if word.isalpha()]

    def text():
        count = source.choice(
            [1, 2, source.randint(3, 12), source.randint(3, 40), source.randint(3, 40), source.randint(40, 120)]
        )
        if source.random() < 0.05:
            count = source.randint(300, 600)
        drawn = [source.choice(ODD if source.random() < 0.15 else words) for _ in range(count)]
        joined = "".join(word + source.choice([" ", " ", " ", ", ", ". ", "-", "  "]) for word in drawn)
        return joined if joined.strip() else "blank"

    return [(text(), text()) if source.random() < 0.3 else text() for _ in range(COUNT)]


INPUTS = inputs()


@pytest.fixture
def folder(tmp_path):
    """A random classifier whose scores vary with the text, with the embedded model's vocabulary."""

    def folder(task):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=28996, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
            initializer_range=0.1, **TASKS[task]
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
        with torch.no_grad():
            model.classifier.weight.mul_(4.0)
            model.bert.pooler.dense.weight.mul_(2.0)
            # Around the middle, where a score says most about its logit.
            model.classifier.bias.sub_(model.eval()(torch.randint(1000, 28000, (64, 24))).logits.mean(0))
        model.save_pretrained(tmp_path)
        for name in ("vocab.txt", "tokenizer_config.json"):
            shutil.copyfile(EMBEDDED / name, tmp_path / name)
        return tmp_path

    return folder


def test_inputs_are_varied():
    tokenizer = bert_jax.Tokenizer.from_pretrained(EMBEDDED)
    lengths = [len(tokenizer.encode([given])[0][0].ids) for given in INPUTS if isinstance(given, str)]
    pairs = [given for given in INPUTS if isinstance(given, tuple)]
    assert len(INPUTS) == COUNT
    assert len(pairs) > 100
    assert min(lengths) == 3
    assert max(lengths) > 600
    assert sum(n > 512 for n in lengths) > 10
    assert any(len(tokenizer.encode([a], [b])[0][0].ids) > 512 for a, b in pairs)


@pytest.mark.parametrize("task", TASKS)
def test_answers(close, folder, task):
    path = folder(task)
    # In double: see test_fill_mask.py.
    model = transformers.BertForSequenceClassification.from_pretrained(path, dtype=torch.float64)
    tokenizer = transformers.BertTokenizer.from_pretrained(path)
    theirs = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    ours = bert_jax.pipeline("text-classification", path)
    # The network is the same for all tasks: one takes all inputs, the others every fifth.
    inputs = INPUTS if task == "single" else INPUTS[::5]
    given = [{"text": e[0], "text_pair": e[1]} if isinstance(e, tuple) else e for e in inputs]
    expected = [theirs(entry, top_k=None, truncation=True, max_length=512) for entry in given]
    found = ours(inputs, top_k=None)
    for a, b, best in zip(found, expected, ours(inputs), strict=True):
        assert best == a[0]
        # Where two scores are as good as equal, rounding decides which comes first.
        if np.min(-np.diff([entry["score"] for entry in b]), initial=1.0) > 1e-6:
            assert [entry["label"] for entry in a] == [entry["label"] for entry in b]
    scores = [
        np.array([[entry["score"] for entry in sorted(result, key=lambda e: e["label"])] for result in side])
        for side in (found, expected)
    ]
    assert np.ptp(scores[1], axis=0).max() > 0.1  # ten thousand times the tolerance
    close(f"text-classification, {task}: scores", *scores)
