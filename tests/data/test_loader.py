import itertools

import numpy as np
import pytest

from bert_jax.data.loader import LENGTHS, Examples, Loader, by_length, padded_length, shuffled

N, B = 1003, 8
TOKENS = np.random.RandomState(0).randint(3, 120, N)


def examples(lengths=TOKENS, pad_token_id=0):
    """Example i holds the tokens 1000 i, 1000 i + 1, …"""
    return Examples(
        input_ids=[np.arange(n, dtype=np.int32) + 1000 * i for i, n in enumerate(lengths)],
        token_type_ids=[(np.arange(n) >= n // 2).astype(np.int32) for n in lengths],
        targets={
            "labels": np.arange(len(lengths), dtype=np.int32) + 7,
            "several": np.arange(2 * len(lengths), dtype=np.float32).reshape(-1, 2) + 1,
        },
        pad_token_id=pad_token_id,
    )


def same(a, b):
    return len(a) == len(b) and all(
        x.length == y.length and np.array_equal(x.indices, y.indices) for x, y in zip(a, b, strict=True)
    )


def padding(places):
    return sum(B * place.length for place in places) - TOKENS.sum()


def assert_equal(batch, other):
    for kind in ("inputs", "targets"):
        assert batch[kind].keys() == other[kind].keys()
        for name in batch[kind]:
            np.testing.assert_array_equal(batch[kind][name], other[kind][name], strict=True)
    np.testing.assert_array_equal(batch["weights"], other["weights"], strict=True)


# ── Order ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shuffled_is_a_pure_function():
    one = shuffled(TOKENS, B, seed=1, epoch=2)
    np.random.seed(3)
    assert same(one, shuffled(TOKENS.copy(), B, seed=1, epoch=2))
    for seed, epoch in [(1, 3), (2, 2), (2, 1), (1, 0), (0, 0)]:
        assert not same(one, shuffled(TOKENS, B, seed=seed, epoch=epoch))
    # The order and not only that of the batches: other examples stand together.
    first = {frozenset(place.indices.tolist()) for place in one}
    assert not first & {frozenset(place.indices.tolist()) for place in shuffled(TOKENS, B, seed=1, epoch=3)}


@pytest.mark.parametrize("n", [1, 7, 8, 9, 400, 401, 1003])
def test_each_example_once_in_as_few_batches_as_can_be(n):
    lengths = TOKENS[:n]
    for places in (shuffled(lengths, B, seed=0, epoch=0), by_length(lengths, B)):
        assert sorted(np.concatenate([place.indices for place in places])) == list(range(n))
        assert len(places) == -(-n // B)
        assert sum(len(place.indices) < B for place in places) == (n % B > 0)
        for place in places:
            assert place.length == padded_length(lengths[place.indices].max())


def test_examples_of_like_length_are_together():
    order = np.random.RandomState(1).permutation(N)
    random = [padded_length(TOKENS[order[i : i + B]].max()) for i in range(0, N, B)]
    wasted = B * sum(random) - TOKENS.sum()
    assert padding(shuffled(TOKENS, B, seed=0, epoch=0)) < 0.4 * wasted
    assert padding(by_length(TOKENS, B)) <= padding(shuffled(TOKENS, B, seed=0, epoch=0))


def test_batches_are_not_in_the_order_of_length():
    lengths = np.array([place.length for place in shuffled(TOKENS, B, seed=0, epoch=0)])
    assert abs(np.corrcoef(np.arange(len(lengths)), lengths)[0, 1]) < 0.3
    assert (np.diff(lengths) > 0).sum() > len(lengths) / 4


def test_by_length_is_longest_first():
    order = np.concatenate([place.indices for place in by_length(TOKENS, B)])
    assert (np.diff(TOKENS[order]) <= 0).all()
    np.testing.assert_array_equal(order, sorted(range(N), key=lambda i: (-TOKENS[i], i)))


@pytest.mark.parametrize(
    ("tokens", "length"), [(1, 16), (16, 16), (17, 24), (33, 48), (500, 512), (512, 512), (513, 513)]
)
def test_padded_length(tokens, length):
    assert padded_length(tokens) == length


def test_no_length_wastes_more_than_its_half():
    assert all(b <= 2 * a for a, b in itertools.pairwise(LENGTHS))


# ── Batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_batch():
    batch = examples([3, 2, 4], pad_token_id=9).batch(np.array([2, 0]), rows=3, length=5)
    expected = {
        "input_ids": [[2000, 2001, 2002, 2003, 9], [0, 1, 2, 9, 9], [9] * 5],
        "attention_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [0] * 5],
        "token_type_ids": [[0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0] * 5],
    }
    assert batch["inputs"].keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(batch["inputs"][name], np.array(values, np.int32), strict=True)
    np.testing.assert_array_equal(batch["targets"]["labels"], np.array([9, 7, 0], np.int32), strict=True)
    several = np.array([[5, 6], [1, 2], [0, 0]], np.float32)
    np.testing.assert_array_equal(batch["targets"]["several"], several, strict=True)
    np.testing.assert_array_equal(batch["weights"], np.array([1, 1, 0], np.float32), strict=True)


def test_a_batch_of_nothing():
    batch = examples().batch(np.array([], int), rows=2, length=4)
    assert batch["weights"].tolist() == [0, 0]
    assert not batch["inputs"]["attention_mask"].any()


# ── Steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_place_across_epochs():
    loader = Loader(examples(), B, seed=5, rows=B)
    assert loader.steps_per_epoch == 126
    for epoch in (2, 0, 1):
        places = [loader.place(epoch * 126 + n) for n in range(126)]
        assert same(places, shuffled(TOKENS, B, seed=5, epoch=epoch))


def test_batch_at_is_the_place():
    data = examples()
    loader = Loader(data, B, seed=5, rows=16)
    for step in (0, 125, 126, 300):
        place = loader.place(step)
        assert_equal(loader.batch_at(step), data.batch(place.indices, rows=16, length=place.length))


@pytest.mark.parametrize(("rows", "processes"), [(8, 2), (8, 4), (16, 2), (16, 8)])
def test_the_processes_rows_are_together_the_whole_batch(rows, processes):
    data = examples(TOKENS[:21])
    whole = Loader(data, B, seed=5, rows=rows)
    loaders = [Loader(data, B, seed=5, rows=rows, process=(i, processes)) for i in range(processes)]
    for step in range(6):
        parts = [loader.batch_at(step) for loader in loaders]
        assert {len(part["weights"]) for part in parts} == {rows // processes}
        together = {
            kind: {name: np.concatenate([part[kind][name] for part in parts]) for name in parts[0][kind]}
            for kind in ("inputs", "targets")
        }
        weights = np.concatenate([part["weights"] for part in parts])
        assert_equal(together | {"weights": weights}, whole.batch_at(step))


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (4, 7), (3, 3)])  # the last: a run whose steps are done
def test_batches(start, stop):
    loader = Loader(examples(TOKENS[:21]), B, seed=5, rows=B)
    batches = list(loader.batches(start, stop))
    assert len(batches) == stop - start
    for step, batch in zip(range(start, stop), batches, strict=True):
        assert_equal(batch, loader.batch_at(step))
