from pathlib import Path

import numpy as np
import pytest

from bert_jax.data import corpus
from bert_jax.data.loader import Loader
from bert_jax.data.masking import MaskedExamples, Masking, choose, count, hide
from bert_jax.losses import IGNORE

TEXT = [
    f"A carpenter number {n} repaired the unbelievably old chairs. It took {n} days!\nNobody paid.\n" for n in range(40)
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("\n".join(TEXT))
    layout = corpus.Layout(max_length=48)
    return corpus.tokenize([folder / "text.txt"], folder / "shards", tokenizer, layout, seed=3, processes=1)


def loader(shards, tokenizer, *, packing=None, part=(0, 1), seed=5, **masked):
    return Loader(
        MaskedExamples.of(shards, tokenizer, Masking(**masked), seed),
        8,
        seed=seed,
        packing=packing,
        part=part,
        share=2,
    )


def guessed(batch, row):
    """Positions, and what stood there."""
    there = batch["targets"]["labels"][row] != IGNORE
    return batch["targets"]["masked_positions"][row][there], batch["targets"]["labels"][row][there]


@pytest.mark.parametrize(
    ("tokens", "most", "n"), [(3, 20, 1), (10, 20, 2), (128, 20, 19), (512, 76, 76), (512, 20, 20)]
)
def test_count(tokens, most, n):
    assert count(tokens, 0.15, most) == n


def test_single_tokens_are_chosen_alike():
    candidates = np.arange(1, 41)
    chosen = np.concatenate([choose(candidates, 6, np.random.default_rng(n)) for n in range(2000)])
    assert np.bincount(chosen, minlength=41)[1:].std() < 40
    assert choose(candidates, 99, np.random.default_rng(0)).tolist() == candidates.tolist()


@pytest.mark.parametrize("continuing", [None, np.zeros(0, bool)])
def test_a_text_of_special_tokens_alone_has_nothing_to_choose(continuing):
    assert choose(np.zeros(0, int), 1, np.random.default_rng(0), continuing).tolist() == []


def test_whole_words_are_chosen_whole():
    random = np.random.default_rng(0)
    shortfalls = []
    for _ in range(2000):
        candidates = np.flatnonzero(random.random(60) < 0.9) + 1
        continuing = random.random(len(candidates)) < 0.3
        longest = max(map(len, np.split(candidates, np.flatnonzero(~continuing[1:]) + 1)))
        n = int(random.integers(1, 12))
        chosen = choose(candidates, n, random, continuing)
        assert np.all(np.diff(chosen) > 0)
        assert 1 <= len(chosen) <= n
        shortfalls.append(n - len(chosen))
        assert shortfalls[-1] < longest
        if longest <= n:  # else a word may be chosen in part
            index = np.searchsorted(candidates, chosen)
            starts = np.maximum.accumulate(np.where(continuing, 0, np.arange(len(candidates))))
            for word in set(starts[index]):
                assert set(np.flatnonzero(starts == word)) <= set(index)
    assert np.mean(shortfalls) < 0.2


def test_what_stands_in_the_place():
    ids = np.full(200_000, 7)
    hidden = hide(ids, np.random.default_rng(1), 103, 29_000)
    assert np.mean(hidden == 103) == pytest.approx(0.8, abs=0.003)
    assert np.mean(hidden == 7) == pytest.approx(0.1, abs=0.003)
    other = hidden[(hidden != 7) & (hidden != 103)]
    assert len(other) / len(ids) == pytest.approx(0.1, abs=0.003)
    assert other.min() < 20
    assert other.max() > 28_980
    assert len(np.unique(other)) > 10_000


@pytest.mark.parametrize("packing", [None, 96])
@pytest.mark.parametrize("whole_words", [False, True])
def test_a_batch_hides_the_right_number_of_the_right_tokens(shards, tokenizer, packing, whole_words):
    batches = loader(shards, tokenizer, packing=packing, whole_words=whole_words, most=6)
    plain = batches.examples
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}
    for step in range(batches.steps_per_epoch):
        place, batch = batches.place(step), batches.batch_at(step)
        for i, row, n, at, stop in plain.spots(place):
            ids, here = plain.input_ids[i], slice(at, stop)
            positions, labels = guessed(batch, row)
            mine = batch["targets"]["guessed_in"][row][: len(positions)] == n
            positions, labels = positions[mine] - at, labels[mine]
            if whole_words:
                assert 1 <= len(positions) <= count(len(ids), 0.15, 6)
            else:
                assert len(positions) == count(len(ids), 0.15, 6)
            assert labels.tolist() == ids[positions].tolist()
            assert not special & set(labels.tolist())
            untouched = np.setdiff1d(np.arange(len(ids)), positions)
            assert batch["inputs"]["input_ids"][row, here][untouched].tolist() == ids[untouched].tolist()


def test_masks_differ_by_epoch_and_seed_and_by_nothing_else(shards, tokenizer):
    def hidden(loader, epoch):
        """Example -> what the model sees of it in an epoch."""
        seen = {}
        for step in range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch):
            batch = loader.batch_at(step)
            for spot in loader.examples.spots(loader.place(step)):
                seen[spot.item] = batch["inputs"]["input_ids"][spot.tokens].tolist()
        return seen

    first = hidden(loader(shards, tokenizer), 0)
    assert first == hidden(loader(shards, tokenizer), 0)
    assert first == hidden(loader(shards, tokenizer, packing=96), 0)
    for other in (hidden(loader(shards, tokenizer), 1), hidden(loader(shards, tokenizer, seed=6), 0)):
        assert sum(first[i] == other[i] for i in first) < len(first) / 4


def test_processes_make_the_rows_of_one_batch(shards, tokenizer):
    whole = loader(shards, tokenizer, packing=96).batch_at(1)
    parts = [loader(shards, tokenizer, packing=96, part=(n, 2)).batch_at(1) for n in range(2)]
    for kind in ("inputs", "targets"):
        for name, array in whole[kind].items():
            np.testing.assert_array_equal(array, np.concatenate([part[kind][name] for part in parts]))


def test_examples_are_what_was_laid_out(shards, tokenizer):
    examples = MaskedExamples.of(shards, tokenizer, Masking(), 0)
    assert len(examples.input_ids) == len(list(examples.input_ids)) == len(examples) > 40
    following = 0
    for ids, types, label in zip(
        examples.input_ids, examples.token_type_ids, examples.targets["next_sentence_label"], strict=True
    ):
        assert len(ids) == len(types) <= 48
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        (first, second) = np.flatnonzero(ids == tokenizer.sep_token_id)
        assert types.tolist() == [0] * (first + 1) + [1] * (second - first)
        following += 1 - label
    assert 0.3 < following / len(examples) < 0.7


def test_a_vocabulary_without_mask(shards, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "mask_token_id", None)
    with pytest.raises(Exception, match=r"no \[MASK\]"):
        MaskedExamples.of(shards, tokenizer, Masking(), 0)


def test_nothing_is_read_at_once(shards):
    assert all(isinstance(table, np.memmap) for table in shards.tables)
    assert Path(shards.tables[0].filename).suffix == ".npy"
