"""Our fill-mask pipeline beside transformers', and our tokenizer beside its."""

import itertools

import numpy as np
import pytest
import torch
import transformers

import bert_jax
from bert_jax import hub

SUBJECTS = ["The king", "My sister", "Dr. Müller", "The U.S. Senate", "A small café", "Nobody", "The ship’s captain",
            "New York", "She", "The 3rd regiment", "Paris", "An old friend of mine", "COVID-19", "Zoë", "Mr. O'Neill",
            "The board", "God", "Everything", "東京", "The cat 😀"]  # fmt: skip
TEMPLATES = [
    "{} is the [MASK] of France.",
    "{} went to the [MASK] yesterday, and came back late.",
    "[MASK] said that {} was right.",
    "{} was born in 1809 and [MASK] in 1865; the rest is [MASK].",
    "  {}   has [MASK] [MASK] money than before!",
    "\"{}\" [MASK]",
    "[MASK] {} [MASK] [MASK]?",
    "{} won't [MASK] it, don't you think? I'm sure (almost) that it isn't so -- or is it?",
    "What {} did was unbelievably antidisestablishmentarian: a [MASK] of 1,000,000.50 $ a year.",
    "In the long run {} will be remembered for a great many things, of which this [MASK] is only the very last one "
    "that anybody would have thought of at the time when it all began.",
]  # fmt: skip
SENTENCES = [template.format(subject) for subject, template in itertools.product(SUBJECTS, TEMPLATES)]


@pytest.fixture(scope="module")
def theirs():
    folder = hub.download("bert-mini-cased")
    # In double: the reference's float32 is itself 1e-5 off where a score depends on all of its logits.
    model = transformers.BertForMaskedLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = transformers.BertTokenizer.from_pretrained(folder, do_lower_case=False)
    return transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)


def compare(ours, expected):
    """Fillings of one mask or of several: all fields alike, scores to 1e-5."""
    if isinstance(expected[0], list):
        assert len(ours) == len(expected)
        for a, b in zip(ours, expected, strict=True):
            compare(a, b)
        return
    for a, b in zip(ours, expected, strict=True):
        assert abs(a["score"] - b["score"]) <= 1e-5
    # Where two scores are as good as equal, rounding decides which comes first.
    if np.min(-np.diff([entry["score"] for entry in expected]), initial=1.0) > 1e-7:
        for name in ("token", "token_str", "sequence"):
            assert [entry[name] for entry in ours] == [entry[name] for entry in expected]


def test_200_sentences(theirs, fill_mask):
    assert len(SENTENCES) == len(set(SENTENCES)) == 200
    results = fill_mask(SENTENCES)
    for sentence, ours in zip(SENTENCES, results, strict=True):
        compare(ours, theirs(sentence))


def test_targets(theirs, fill_mask):
    targets = ["capital", "king", "of", "the", "Germany"]
    for sentence in SENTENCES[::7]:
        compare(fill_mask(sentence, targets=targets), theirs(sentence, targets=targets))


@pytest.mark.parametrize("lower", [False, True])
def test_tokenizer(tmp_path, lower):
    folder = hub.download("bert-mini-cased")
    theirs = transformers.BertTokenizer.from_pretrained(folder, do_lower_case=lower)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "vocab.txt").write_text((folder / "vocab.txt").read_text())
    (tmp_path / "tokenizer_config.json").write_text(f'{{"do_lower_case": {str(lower).lower()}}}')
    ours = bert_jax.Tokenizer.from_pretrained(tmp_path)
    for first, second in itertools.pairwise([*SENTENCES, "x" * 300, "\t\n a\u0000b \ufffd ǅ ﬁ"]):
        assert ours.encode([first])[0][0].ids == theirs(first)["input_ids"]
        expected = theirs(first, second)
        assert ours.encode([first], [second])[0][0].ids == expected["input_ids"]
        assert ours.encode([first], [second])[0][0].type_ids == expected["token_type_ids"]
        assert ours.decode(expected["input_ids"]) == theirs.decode(expected["input_ids"])
        for max_length in (9, 14, 21):
            if min(len(first.split()), len(second.split())) > 2:
                cut = theirs(first, second, truncation=True, max_length=max_length)["input_ids"]
                assert ours.encode([first], [second], max_length=max_length)[0][0].ids == cut
