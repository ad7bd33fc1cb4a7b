"""Our token-classification and feature-extraction pipelines beside transformers'."""

import random
import shutil

import numpy as np
import pytest
import torch
import transformers

import bert_jax
from bert_jax import hub
from bert_jax.tasks.token_classification import STRATEGIES

pytestmark = pytest.mark.usefixtures("one_torch_thread")

EMBEDDED = hub.EMBEDDED / "bert-mini-cased"
ODD = ["…", "--", "?!", "(", "\"", "’s", "don't", "1,000.50", "café", "naïvely", "Zürich", "Ελλάδα", "Ђорђе", "東京",
       "中文字", "한국어", "😀", "👩‍🔬", "ﬁ", "ǅ", "e\u0301", "\t", "\n", "\u00a0", "[MASK]", "[SEP]", "x" * 120,
       "antidisestablishmentarianism"]  # fmt: skip
COUNT = 500
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"]


def texts():
    """Texts of 1 to some 300 tokens, with runs of spaces, accents, emoji and CJK."""
    source = random.Random(0)
    words = [word for word in (EMBEDDED / "vocab.txt").read_text(encoding="utf-8").split("\n") if word.isalpha()]

    def text():
        count = source.choice([1, 2, source.randint(3, 12), source.randint(3, 40), source.randint(40, 80)])
        drawn = [source.choice(ODD if source.random() < 0.15 else words) for _ in range(count)]
        joined = "".join(word + source.choice([" ", " ", " ", ", ", ". ", "-", "   "]) for word in drawn)
        return joined if joined.strip() else "blank"

    return [text() for _ in range(COUNT)]


TEXTS = texts()
WORDS = [[word for word in text.split(" ") if word.strip()] for text in TEXTS[:100]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random tagger whose labels vary from token to token, with the embedded model's vocabulary."""
    path = tmp_path_factory.mktemp("tagger")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=28996, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        initializer_range=0.1, id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    model = transformers.BertForTokenClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(3.0)
    model.save_pretrained(path)
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / name, path / name)
    return path


def compare(close, what, ours, theirs):
    """All entities with the same keys and values, scores apart, which may differ by 1e-5."""
    assert len(ours) == len(theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        assert [{**entity, "score": 0} for entity in mine] == [{**entity, "score": 0} for entity in reference]
        assert [list(entity) for entity in mine] == [list(entity) for entity in reference]
    scores = [[entity["score"] for result in results for entity in result] for results in (ours, theirs)]
    close(what, *scores)
    return len(scores[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_entities(close, folder, strategy):
    theirs = transformers.pipeline("token-classification", str(folder), aggregation_strategy=strategy, device="cpu")
    ours = bert_jax.pipeline("token-classification", folder)
    found = compare(close, f"token-classification, {strategy}", ours(TEXTS, aggregation_strategy=strategy),
                    theirs(TEXTS))  # fmt: skip
    assert found > 5 * COUNT


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_entities_of_words(close, folder, strategy):
    theirs = transformers.pipeline("token-classification", str(folder), aggregation_strategy=strategy, device="cpu")
    ours = bert_jax.pipeline("token-classification", folder)
    compare(close, f"token-classification of words, {strategy}", ours(WORDS, aggregation_strategy=strategy),
            [theirs(words, is_split_into_words=True)[0] for words in WORDS])  # fmt: skip


def test_ignored_labels(close, folder):
    theirs = transformers.pipeline("token-classification", str(folder), ignore_labels=["MISC", "I-LOC"], device="cpu")
    ours = bert_jax.pipeline("token-classification", folder)
    compare(close, "token-classification, other labels ignored", ours(TEXTS[:50], ignore_labels=["MISC", "I-LOC"]),
            theirs(TEXTS[:50]))  # fmt: skip


def test_features(close, folder):
    theirs = transformers.pipeline("feature-extraction", str(folder), device="cpu")
    ours = bert_jax.pipeline("feature-extraction", folder)
    for text, states in zip(TEXTS, ours(TEXTS), strict=True):
        reference = np.asarray(theirs(text)[0])
        close("feature-extraction, tokens", states, reference)
        if text in TEXTS[:50]:
            mean, normal = reference.mean(0), reference / np.linalg.norm(reference, axis=-1, keepdims=True)
            close("feature-extraction, cls", ours(text, pooling="cls"), reference[0])
            close("feature-extraction, mean", ours(text, pooling="mean"), mean)
            close("feature-extraction, normalized", ours(text, normalize=True), normal)
            close("feature-extraction, normalized mean", ours(text, pooling="mean", normalize=True),
                  mean / np.linalg.norm(mean))  # fmt: skip
