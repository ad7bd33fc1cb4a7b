import itertools

import jax
import numpy as np
import pytest

from bert_jax.data.loader import (
    LENGTHS,
    Examples,
    Loader,
    Place,
    Shape,
    balanced,
    bucketed,
    one_a_row,
    packed,
    packed_shape,
    padded_length,
)
from bert_jax.losses import IGNORE

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
        jax.tree.all(jax.tree.map(np.array_equal, *pair)) for pair in zip(a, b, strict=True)
    )


def shuffled(lengths, *key):
    return bucketed(lengths, B, B, np.random.default_rng(key))


def padding(places):
    return sum(B * place.shape.length for place in places) - TOKENS.sum()


def assert_equal(batch, other):
    for kind in ("inputs", "targets"):
        assert batch[kind].keys() == other[kind].keys()
        for name in batch[kind]:
            np.testing.assert_array_equal(batch[kind][name], other[kind][name], strict=True)
    for name in ("starts", "weights"):
        np.testing.assert_array_equal(batch[name], other[name], strict=True)


# ── Order ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("packing", [None, 512])
def test_an_epoch_is_a_pure_function(packing):
    def epoch(seed, n):
        loader = Loader(examples(), B, seed=seed, packing=packing)
        return [loader.place(n * loader.steps_per_epoch + i) for i in range(loader.steps_per_epoch)]

    one = epoch(1, 2)
    np.random.seed(3)
    assert same(one, epoch(1, 2))
    for seed, n in [(1, 3), (2, 2), (2, 1), (1, 0), (0, 0)]:
        assert not same(one, epoch(seed, n))
    # The order and not only that of the batches: other examples stand together.
    assert not {frozenset(p.indices.tolist()) for p in one} & {frozenset(p.indices.tolist()) for p in epoch(1, 3)}


@pytest.mark.parametrize("n", [1, 7, 8, 9, 400, 401, 1003])
def test_each_example_once_in_as_few_batches_as_can_be(n):
    lengths = TOKENS[:n]
    places = shuffled(lengths, 0, 0)
    assert sum(len(place.indices) < B for place in places) == (n % B > 0)
    for place in places:
        assert place.shape == (B, padded_length(lengths[place.indices].max()), 1)
        assert place.rows.tolist() == list(range(len(place.indices)))
    batches = balanced(lengths, B, np.random.default_rng(0))
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    for found in (batches, [place.indices for place in places]):
        assert sorted(np.concatenate(found)) == list(range(n))
        assert len(found) == -(-n // B)


def test_examples_of_like_length_are_together():
    order = np.random.RandomState(1).permutation(N)
    random = [padded_length(TOKENS[order[i : i + B]].max()) for i in range(0, N, B)]
    assert padding(shuffled(TOKENS, 0, 0)) < 0.4 * (B * sum(random) - TOKENS.sum())


def test_batches_are_not_in_the_order_of_length():
    lengths = np.array([place.shape.length for place in shuffled(TOKENS, 0, 0)])
    assert abs(np.corrcoef(np.arange(len(lengths)), lengths)[0, 1]) < 0.3
    assert (np.diff(lengths) > 0).sum() > len(lengths) / 4


@pytest.mark.parametrize(
    ("tokens", "length"), [(1, 16), (16, 16), (17, 24), (33, 48), (500, 512), (512, 512), (513, 768), (4097, 4097)]
)
def test_padded_length(tokens, length):
    assert padded_length(tokens) == length


def test_no_length_wastes_more_than_its_half():
    assert all(b <= 2 * a for a, b in itertools.pairwise(LENGTHS))


# ── Packing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_balanced_batches_have_nearly_as_many_tokens_each():
    order = np.random.default_rng(1).permutation(N)
    totals = np.array([TOKENS[batch].sum() for batch in balanced(TOKENS, B, np.random.default_rng(0))])
    random = np.array([TOKENS[order[i : i + B]].sum() for i in range(0, N - B, B)])
    assert totals.std() < random.std() / 5
    assert abs(np.corrcoef(np.arange(len(totals)), totals)[0, 1]) < 0.3


def test_packed_lays_each_into_the_fullest_row_with_room():
    rows, shape = packed(np.array([9, 6, 5, 4, 3, 3, 1]), np.arange(7), 12)
    assert rows.tolist() == [0, 1, 1, 2, 0, 2, 1]
    assert shape == (3, 12, 3)


@pytest.mark.parametrize(("share", "limit"), [(1, 512), (2, 512), (8, 512), (1, 120), (1, 10)])
def test_a_packed_epoch_is_one_shape_with_little_padding(share, limit):
    loader = Loader(examples(), B, seed=5, share=share, packing=limit)
    places = [loader.place(step) for step in range(loader.steps_per_epoch)]
    (shape,) = {place.shape for place in places}
    assert shape.rows % share == 0
    assert shape.length <= max(limit, TOKENS.max())
    for place in places:
        used = np.bincount(place.rows, TOKENS[place.indices], minlength=shape.rows)
        assert used.max() <= shape.length
        assert np.bincount(place.rows).max() <= shape.examples
    if share == 1 and limit == 512:
        assert TOKENS.sum() > 0.85 * shape.rows * shape.length * len(places)
    if share == 8:
        assert shape[:2] == (8, 120)


def test_a_batch_that_does_not_fit_takes_more_rows():
    loader = Loader(examples(), B, seed=5, share=2, packing=128)
    loader._shape = Shape(4, 128, 2)
    for place in (loader.place(step) for step in range(300)):
        assert np.bincount(place.rows).max() <= place.shape.examples
        assert np.bincount(place.rows, TOKENS[place.indices]).max() <= 128
        assert place.shape.rows in (4, 6, 8)
    assert {loader.place(step).shape.rows for step in range(300)} > {4}


def test_the_shape_is_the_one_of_least_work():
    # Two of ten tokens in each row of 24: 96 tokens, where rows of 16 would be eight with one each.
    assert packed_shape(np.full(64, 10), [np.arange(8), np.arange(8, 16)], 1, 512) == (4, 24, 4)
    assert packed_shape(np.full(64, 10), [np.arange(8), np.arange(8, 16)], 1, 16) == (8, 16, 1)


@pytest.mark.parametrize("packing", [None, 512])
def test_rows_of_a_multiple_of_tokens(packing):
    loader = Loader(examples(), 8, seed=0, packing=packing, multiple=128)
    lengths = {loader.place(step).shape.length for step in range(2 * loader.steps_per_epoch)}
    assert lengths
    assert not any(length % 128 for length in lengths)


def test_a_packed_batch():
    data = examples([3, 2, 4], pad_token_id=9)
    tags = [np.arange(1, n + 1, dtype=np.int32) for n in data.lengths]
    data = Examples(data.input_ids, data.token_type_ids, data.targets, {"tags": tags}, pad_token_id=9)
    batch = data.batch(Place(np.array([2, 0, 1]), np.array([0, 1, 0]), Shape(3, 7, 3)))
    expected = {
        "input_ids": [[2000, 2001, 2002, 2003, 1000, 1001, 9], [0, 1, 2, 9, 9, 9, 9], [9] * 7],
        "token_type_ids": [[0, 0, 1, 1, 0, 1, 0], [0, 1, 1, 0, 0, 0, 0], [0] * 7],
        "document_ids": [[1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 0, 0, 0, 0], [0] * 7],
        "position_ids": [[0, 1, 2, 3, 0, 1, 0], [0, 1, 2, 0, 0, 0, 0], [0] * 7],
    }
    assert batch["inputs"].keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(batch["inputs"][name], np.array(values, np.int32), strict=True)
    assert batch["targets"]["labels"].tolist() == [[9, 8, 0], [7, 0, 0], [0, 0, 0]]
    assert batch["targets"]["several"][0].tolist() == [[5, 6], [3, 4], [0, 0]]
    i = IGNORE
    assert batch["targets"]["tags"].tolist() == [[1, 2, 3, 4, 1, 2, i], [1, 2, 3, i, i, i, i], [i] * 7]
    assert batch["starts"].tolist() == [[0, 4, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(batch["weights"], np.array([[1, 1, 0], [1, 0, 0], [0] * 3], np.float32), strict=True)


# ── Batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_batch():
    batch = examples([3, 2, 4], pad_token_id=9).batch(one_a_row(np.array([2, 0]), 3, 5))
    expected = {
        "input_ids": [[2000, 2001, 2002, 2003, 9], [0, 1, 2, 9, 9], [9] * 5],
        "attention_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [0] * 5],
        "token_type_ids": [[0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0] * 5],
    }
    assert batch["inputs"].keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(batch["inputs"][name], np.array(values, np.int32), strict=True)
    np.testing.assert_array_equal(batch["targets"]["labels"], np.array([[9], [7], [0]], np.int32), strict=True)
    several = np.array([[[5, 6]], [[1, 2]], [[0, 0]]], np.float32)
    np.testing.assert_array_equal(batch["targets"]["several"], several, strict=True)
    np.testing.assert_array_equal(batch["starts"], np.zeros((3, 1), np.int32), strict=True)
    np.testing.assert_array_equal(batch["weights"], np.array([[1], [1], [0]], np.float32), strict=True)


def test_a_batch_of_nothing():
    batch = examples().batch(one_a_row(np.array([], int), 2, 4))
    assert batch["weights"].tolist() == [[0], [0]]
    assert not batch["inputs"]["attention_mask"].any()


# ── Steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_place_across_epochs():
    loader = Loader(examples(), B, seed=5)
    assert loader.steps_per_epoch == 126
    for epoch in (2, 0, 1):
        places = [loader.place(epoch * 126 + n) for n in range(126)]
        assert same(places, [place._replace(epoch=epoch) for place in shuffled(TOKENS, 5, epoch)])


@pytest.mark.parametrize("packing", [None, 512])
def test_batch_at_is_the_place(packing):
    data = examples()
    loader = Loader(data, B, seed=5, share=16, packing=packing)
    for step in (0, 125, 126, 300):
        assert_equal(loader.batch_at(step), data.batch(loader.place(step)))


@pytest.mark.parametrize(("batch_size", "share", "rows"), [(32, 8, 32), (30, 8, 32), (1, 8, 8), (33, 16, 48)])
def test_rows_divide_among_devices(batch_size, share, rows):
    assert Loader(examples(), batch_size, seed=0, share=share).place(0).shape.rows == rows


@pytest.mark.parametrize("packing", [None, 512])
@pytest.mark.parametrize(("share", "processes"), [(8, 2), (8, 4), (16, 2), (16, 8), (2, 2)])
def test_the_processes_rows_are_together_the_whole_batch(share, processes, packing):
    data = examples(TOKENS[:21])
    whole = Loader(data, B, seed=5, share=share, packing=packing)
    loaders = [Loader(data, B, seed=5, share=share, packing=packing, part=(i, processes)) for i in range(processes)]
    for step in range(6):
        parts = [loader.batch_at(step) for loader in loaders]
        assert {len(part["weights"]) for part in parts} == {whole.place(step).shape.rows // processes}
        assert_equal(jax.tree.map(lambda *rows: np.concatenate(rows), *parts), whole.batch_at(step))


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (4, 7), (3, 3)])  # the last: a run whose steps are done
def test_batches(start, stop):
    loader = Loader(examples(TOKENS[:21]), B, seed=5)
    batches = list(loader.batches(start, stop))
    assert len(batches) == stop - start
    for step, batch in zip(range(start, stop), batches, strict=True):
        assert_equal(batch, loader.batch_at(step))
