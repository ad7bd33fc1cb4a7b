"""fill-mask against PyTorch transformers' pipeline, and what it does beyond that against the model called by hand."""

import json
import random
import re

import numpy as np
import pytest
import reference

import bert_jax
from bert_jax import Tokenizer
from bert_jax.errors import InputError
from bert_jax.tasks import masked_lm

PARIS = "Paris is the [MASK] of France."
TWO = "The [MASK] of the [MASK] is dead."
BERLIN = "Berlin [MASK] the capital."


def close(got, expected):
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.fixture(scope="module")
def distributions(fill_mask, tokenizer):
    """Probabilities of the vocabulary at each mask of a text or row of ids, by the whole model called directly."""
    model = bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased")

    def distributions(row):
        inputs = tokenizer(row) if isinstance(row, str) else tokenizer.pad([row], [[0] * len(row)])
        logits = np.asarray(model(**inputs).logits[0], np.float64)[inputs["input_ids"][0] == tokenizer.mask_token_id]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True)

    return distributions


# ── As PyTorch's ──


@pytest.mark.parametrize("case", reference.golden("embedded_fill_mask.json"), ids=lambda case: case["text"][:20])
def test_fillings_are_pytorchs(fill_mask, tokenizer, case):
    assert tokenizer.encode([case["text"]])[0][0].ids == case["ids"]
    ours = fill_mask(case["text"])
    for got, expected in zip(ours, case["fillings"], strict=True):
        assert list(got) == ["score", "token", "token_str", "sequence"]
        assert got | {"score": 0} == expected | {"score": 0}
        assert abs(got["score"] - expected["score"]) <= 1e-5


@pytest.mark.parametrize("top_k", [1, 3, 7, 28996])
def test_top_k(fill_mask, distributions, top_k):
    fillings = fill_mask(PARIS, top_k=top_k)
    scores = [entry["score"] for entry in fillings]
    assert len(fillings) == len({entry["token"] for entry in fillings}) == top_k
    assert scores == sorted(scores, reverse=True)
    (p,) = distributions(PARIS)
    np.testing.assert_allclose(scores, np.sort(p)[::-1][:top_k], rtol=1e-3, atol=1e-9)
    if top_k == 28996:
        assert sum(scores) == pytest.approx(1, abs=1e-4)


def test_several_masks(fill_mask, distributions):
    results = fill_mask(TWO, top_k=2)
    assert [len(result) for result in results] == [2, 2]
    for result, p in zip(results, distributions(TWO), strict=True):
        assert result[0]["token"] == p.argmax()
        close([entry["score"] for entry in result], np.sort(p)[::-1][:2])
    first, second = (result[0] for result in results)
    assert first["sequence"] == f"[CLS] The {first['token_str']} of the [MASK] is dead. [SEP]"
    assert second["sequence"] == f"[CLS] The [MASK] of the {second['token_str']} is dead. [SEP]"


# ── Targets ──


def test_targets(fill_mask, distributions, tokenizer):
    (p,) = distributions(PARIS)
    entries = fill_mask(PARIS, targets=["king", "capital", "Berlin"])
    assert {entry["token_str"] for entry in entries} == {"king", "capital", "Berlin"}
    assert entries[0]["token_str"] == "capital"
    for entry in entries:
        token = tokenizer.token_to_id(entry["token_str"])
        assert entry["token"] == token
        close(entry["score"], p[token])  # of the whole vocabulary: not renormalized
        assert entry["rank"] == 1 + np.sum(p > p[token])
        assert entry["sequence"] == f"Paris is the {entry['token_str']} of France."
        assert "pieces" not in entry
    ranks = [entry["rank"] for entry in fill_mask(PARIS, targets=["capital", "king", "city"])]
    assert ranks[0] == 1
    assert ranks == sorted({*ranks})


def test_a_target_of_several_pieces(fill_mask, distributions, tokenizer):
    """Its score by hand: a mask for each piece, filled in one after the other."""
    word = "unhappiness"
    ids = tokenizer.encode([PARIS])[0][0].ids
    pieces = tokenizer.encode([word], add_special_tokens=False)[0][0].ids
    assert len(pieces) > 2
    mask = ids.index(tokenizer.mask_token_id)
    steps = []
    for n, piece in enumerate(pieces):
        filled = pieces[:n] + [tokenizer.mask_token_id] * (len(pieces) - n)
        p = distributions([*ids[:mask], *filled, *ids[mask + 1 :]])[0]
        steps.append((p[piece], piece, 1 + int(np.sum(p > p[piece]))))
    entries = {entry["token_str"]: entry for entry in fill_mask(PARIS, targets=["capital", word])}
    entry = entries[word]
    assert entry["token"] == pieces
    close(entry["score"], np.prod([score for score, _, _ in steps]))
    close([piece["score"] for piece in entry["pieces"]], [score for score, _, _ in steps])
    assert [(piece["token"], piece["rank"]) for piece in entry["pieces"]] == [step[1:] for step in steps]
    assert entry["sequence"] == f"Paris is the {word} of France."
    (whole,) = distributions(PARIS)
    assert entry["rank"] == 1 + np.sum(whole > entry["score"])
    alone = fill_mask(PARIS, targets="capital")[0]
    close(entries["capital"]["score"], alone["score"])


def test_targets_are_ordered_without_repetitions(fill_mask):
    entries = fill_mask(PARIS, targets=["king", "unhappiness", "capital", "king", "unhappiness", "city"])
    assert [entry["token_str"] for entry in entries] == ["capital", "city", "king", "unhappiness"]
    best = fill_mask(PARIS, targets=("king", "capital", "city"), top_k=2)
    assert [entry["token_str"] for entry in best] == ["capital", "city"]
    assert len(fill_mask(PARIS, targets=["king", "city"], top_k=28996)) == 2


def test_targets_of_several_masks(fill_mask, distributions, tokenizer):
    results = fill_mask(TWO, targets=["king", "sea"])
    for result, p in zip(results, distributions(TWO), strict=True):
        expected = sorted(((p[tokenizer.token_to_id(word)], word) for word in ("king", "sea")), reverse=True)
        assert [entry["token_str"] for entry in result] == [word for _, word in expected]
        close([entry["score"] for entry in result], [score for score, _ in expected])
    assert results[0][0]["sequence"].startswith("[CLS] The ")
    assert "[MASK]" in results[0][0]["sequence"]


def test_a_piece_and_a_special_token_are_targets(fill_mask, tokenizer):
    (entry,) = fill_mask(PARIS, targets="##s")
    assert entry["token"] == tokenizer.token_to_id("##s")
    assert fill_mask(PARIS, targets="[UNK]")[0]["token"] == tokenizer.unk_token_id


# ── Jointly ──


def test_joint_scores_are_products(fill_mask):
    entries = fill_mask(TWO, joint=True, top_k=4)
    assert len(entries) == 4
    assert [entry["score"] for entry in entries] == sorted((entry["score"] for entry in entries), reverse=True)
    for entry in entries:
        first, second = entry["token_str"]
        (p_first,) = fill_mask(TWO, targets=first)[0]
        filled = TWO.replace("[MASK]", first, 1)
        (p_second,) = fill_mask(filled, targets=second)
        assert entry["token"] == [p_first["token"], p_second["token"]]
        close(entry["score"], p_first["score"] * p_second["score"])
        assert entry["sequence"] == f"The {first} of the {second} is dead."


@pytest.mark.parametrize("text", [TWO, "[MASK] [MASK] was born in [MASK].", "New [MASK] is a [MASK] city."])
def test_joint_is_no_worse_than_greedy(fill_mask, text):
    (best,) = fill_mask(text, joint=True, top_k=1)
    score, filled = 1.0, text
    while "[MASK]" in filled:
        fillings = fill_mask(filled, top_k=1)
        entry = fillings[0] if isinstance(fillings[0], dict) else fillings[0][0]
        score *= entry["score"]
        filled = filled.replace("[MASK]", entry["token_str"], 1)
    assert best["score"] >= score * (1 - 1e-4)


def test_joint_finds_what_greedy_misses(fill_mask, distributions):
    """The best pair of all, by trying every likely first word."""
    (best,) = fill_mask(TWO, joint=True, top_k=1)
    first = fill_mask(TWO, top_k=40)[0]
    pairs = fill_mask([TWO.replace("[MASK]", entry["token_str"], 1) for entry in first], top_k=1)
    close(best["score"], max(a["score"] * b["score"] for a, (b,) in zip(first, pairs, strict=True)))


def test_joint_with_one_mask(fill_mask):
    entries = fill_mask(PARIS, joint=True)
    for got, expected in zip(entries, fill_mask(PARIS), strict=True):
        assert got["token"] == [expected["token"]]
        assert got["token_str"] == [expected["token_str"]]
        assert got["sequence"] == expected["sequence"]
        close(got["score"], expected["score"])


def test_joint_defaults_to_five_and_goes_beyond_the_beam(fill_mask):
    assert len(fill_mask(TWO, joint=True)) == 5
    assert len({tuple(entry["token"]) for entry in fill_mask(TWO, joint=True, top_k=20)}) == 20


# ── Long texts ──


LONG = "a " * 400


@pytest.mark.slow
@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_a_long_text_is_seen_through_a_window(fill_mask, distributions, tokenizer, place):
    text = {"start": BERLIN + " " + LONG * 2, "middle": LONG + BERLIN + " " + LONG, "end": LONG * 2 + BERLIN}[place]
    ids = tokenizer.encode([text])[0][0].ids
    assert len(ids) > 800
    mask = ids.index(tokenizer.mask_token_id)
    start = {"start": 1, "middle": mask - 255, "end": len(ids) - 511}[place]
    got = fill_mask(text, top_k=3)
    (p,) = distributions([ids[0], *ids[start : start + 510], ids[-1]])
    assert got[0]["token"] == p.argmax()
    np.testing.assert_allclose([entry["score"] for entry in got], np.sort(p)[::-1][:3], rtol=1e-3)
    assert len(got[0]["sequence"]) > len(text) - 20  # all of the text, not of the window


def test_a_text_that_just_fits_is_seen_whole(fill_mask, distributions, tokenizer):
    text = "a " * 505 + BERLIN
    ids = tokenizer.encode([text])[0][0].ids
    assert len(ids) == 512
    (p,) = distributions(ids)
    close([entry["score"] for entry in fill_mask(text, top_k=2)], np.sort(p)[::-1][:2])
    rows = next(fill_mask.task.request(text).steps)
    assert [row.input_ids for row in rows] == [ids]


@pytest.mark.slow
def test_masks_far_apart_get_windows_of_their_own(fill_mask, tokenizer):
    text = "Paris is the [MASK] of France. " + LONG + LONG + BERLIN
    first, second = next(fill_mask.task.request(text).steps)
    for row in (first, second):
        assert len(row.input_ids) == 512
        assert (row.input_ids[0], row.input_ids[-1]) == (101, 102)
        assert [row.input_ids[i] for i in row.masked_positions] == [tokenizer.mask_token_id]
    assert first.input_ids[1:4] == tokenizer.encode(["Paris is the"], add_special_tokens=False)[0][0].ids
    assert second.masked_positions[0] > 500
    results = fill_mask(text, top_k=1)
    alone = fill_mask(["Paris is the [MASK] of France. " + LONG + LONG, LONG + LONG + BERLIN], top_k=1)
    assert [result[0]["token"] for result in results] == [result[0]["token"] for result in alone]
    close([result[0]["score"] for result in results], [result[0]["score"] for result in alone])
    assert len(fill_mask(text, targets=["capital", "unhappiness"])) == 2


def test_masks_near_each_other_share_a_window(fill_mask):
    (row,) = next(fill_mask.task.request(LONG + BERLIN + " " + PARIS + LONG).steps)
    assert len(row.masked_positions) == 2
    far = "[MASK] " + "a " * 508 + "[MASK] " + LONG  # 510 tokens from mask to mask: one window holds both
    assert len(next(fill_mask.task.request(far).steps)) == 1
    assert len(next(fill_mask.task.request(far.replace("a [MASK]", "a a [MASK]")).steps)) == 2


@pytest.mark.slow
def test_joint_over_masks_far_apart_is_refused(fill_mask):
    far = "[MASK] " + "a " * 508 + "[MASK] " + LONG
    assert len(fill_mask(far, joint=True, top_k=1)) == 1
    with pytest.raises(InputError, match=r"masks span 511 tokens; joint supports at most 510\. Set joint=False"):
        fill_mask(far.replace("a [MASK]", "a a [MASK]"), joint=True)


def rows_of(steps):
    """All rows that the steps of a request yield."""
    rows = next(steps)
    while rows:
        yield from rows
        try:
            rows = steps.send([{"probabilities": np.full((len(row.masked_positions), 28996), 0.5)} for row in rows])
        except StopIteration:
            return


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("a [MASK]", {}),
        ("[MASK] " * 200, {"top_k": 3}),
        ("[MASK] is [MASK]", {"targets": ["king", "unhappiness", "queen", "unhappily"]}),
        ("[MASK] is [MASK]", {"joint": True, "top_k": 20}),
    ],
)
def test_the_cost_is_known_before(fill_mask, text, options):
    """The tokens of all rows, and about the size of the result; no row scores many masks at once."""
    request = fill_mask.task.request(text, **options)
    rows = list(rows_of(fill_mask.task.request(text, **options).steps))
    tokens = sum(len(row.input_ids) for row in rows)
    assert tokens <= request.tokens <= 2 * tokens + 100
    size = len(json.dumps(fill_mask(text, **options)))
    assert size / 3 < request.size < 4 * size
    assert max(len(row.masked_positions) for row in rows) <= masked_lm.MASKS


def test_sequences_are_those_of_the_whole_text(fill_mask):
    """Tokens of all kinds, in any place, special ones included."""
    draw, task = random.Random(0), fill_mask.task
    decode, special = fill_mask.tokenizer.decode, [0, 100, 101, 102, 103, 112, 117, 119, 188, 1204]

    def tokens(most):
        return [draw.choice([draw.randrange(28996), draw.choice(special)]) for _ in range(draw.randint(0, most))]

    for _ in range(1000):
        before, after, pieces = tokens(4), tokens(3), [*tokens(2), draw.randrange(28996)]
        for alone in (False, True):
            expected = decode([*before, *pieces, *after], skip_special_tokens=alone)
            assert task._sequence([*before, 103, *after], len(before), alone=alone)(pieces) == expected


def test_many_targets(fill_mask):
    """Duplicates are left out, and the others are in order of their scores, however many there are."""
    words = [f"word{i}" for i in range(40)] + ["king", "queen"]
    found = fill_mask("The [MASK] is dead.", targets=words * 2)
    assert len(found) == 42
    assert [entry["score"] for entry in found] == sorted((entry["score"] for entry in found), reverse=True)
    alone = {entry["token_str"]: entry for word in words for entry in fill_mask("The [MASK] is dead.", targets=[word])}
    for entry in found:
        close([entry["score"]], [alone[entry["token_str"]]["score"]])


def test_targets_of_several_pieces_in_long_texts(fill_mask, tokenizer):
    """Every row fits into the model, and wants a mask that it holds, wherever the mask and however long the target."""
    word = "un" * 30
    for place in [0, 1, 250, 253, 254, 400, 506]:
        text = "a " * place + "[MASK]" + " a" * (506 - place)
        request = fill_mask.task.request(text, targets=["king", word])
        rows = list(rows_of(request.steps))
        assert sum(len(row.input_ids) for row in rows) <= request.tokens
        for row in rows:
            assert len(row.input_ids) <= 512
            assert [row.input_ids[i] for i in row.masked_positions] == [tokenizer.mask_token_id]


# ── Bad input ──


@pytest.mark.parametrize(
    ("text", "parameters", "message"),
    [
        ("Paris is the capital.", {}, "the text has no [MASK] for the word to fill in: 'Paris is the capital"),
        ("Paris is the <mask>.", {}, "the text has no [MASK]"),
        ("", {}, "the text is empty."),
        (" \n", {}, "the text is empty"),
        (7, {}, "expected a text, got 7 (int)"),
        (None, {}, "expected a text, got None (NoneType)"),
        (PARIS, {"top_k": 0}, "top_k is 0; expected a whole number from 1 to 28996"),
        (PARIS, {"top_k": -1}, "top_k is -1"),
        (PARIS, {"top_k": True}, "top_k is True"),
        (PARIS, {"top_k": 2.0}, "top_k is 2.0"),
        (PARIS, {"top_k": "5"}, "top_k is '5'"),
        (PARIS, {"top_k": 28997}, "top_k is 28997; expected a whole number from 1 to 28996"),
        (PARIS, {"targets": []}, "targets is []; expected a list of words"),
        (PARIS, {"targets": ""}, "targets has ''"),
        (PARIS, {"targets": ["capital", " "]}, "targets has ' '"),
        (PARIS, {"targets": ["capital", 7]}, "targets has 7"),
        (PARIS, {"targets": "😀"}, "the target '😀' has characters outside the vocabulary"),
        (PARIS, {"targets": ["capital"], "joint": True}, "joint does not support targets"),
    ],
)
def test_bad_input(fill_mask, text, parameters, message):
    with pytest.raises(InputError, match=re.escape(message)):
        fill_mask([text], **parameters)
    if isinstance(text, str):
        with pytest.raises(InputError, match=f"^{re.escape(message)}"):
            fill_mask(text, **parameters)


def test_a_vocabulary_without_a_mask(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"]))
    with pytest.raises(InputError, match=r"The vocabulary has no \[MASK\], which fill-mask needs"):
        bert_jax.pipeline("fill-mask", checkpoint("BertForMaskedLM"), tokenizer=Tokenizer.from_pretrained(tmp_path))
