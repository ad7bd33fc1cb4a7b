import gzip
import json

import numpy as np
import pytest

from bert_jax.data import corpus
from bert_jax.data.corpus import HEADER, Reader, pairs, runs, sentences
from bert_jax.errors import CheckpointError, InputError

LINES = [f"Word{n} stands here. It is number {n}, they say.\nAnother line follows it." for n in range(30)]


def document(number, lengths):
    """Sentences of tokens 1000 · number + 0, 1, 2, …"""
    tokens = iter(range(1000 * number, 1000 * number + 999))
    return [[next(tokens) for _ in range(length)] for length in lengths]


# ── Documents ────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(path, format=None, column="text"):
    reader = Reader([path], format, column)
    return list(reader), reader.replaced


def test_empty_lines_part_documents(tmp_path):
    (tmp_path / "a.txt").write_text("\n\nOne.\nTwo.\n  \n\nThree.\r\n")
    assert read(tmp_path / "a.txt") == ([["One.", "Two."], ["Three."]], 0)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"One.\n\nTwo."))
    assert read(tmp_path / "a.txt.gz")[0] == [["One."], ["Two."]]


def test_json_lines(tmp_path):
    rows = [{"body": "One.\nTwo.", "text": 3}, {"body": "Three."}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path / "a.jsonl", column="body")[0] == [["One.", "Two."], ["Three."]]
    with pytest.raises(InputError, match=r"a.jsonl, line 1: expected an object with text under the key 'text'"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{')
    with pytest.raises(InputError, match=r"b.jsonl, line 2 is not JSON"):
        read(tmp_path / "b.jsonl")


def test_what_is_no_utf8_is_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("caf\u00e9 \ufffd ".encode() + b"caf\xe9 \xff\n\nnext")
    assert read(tmp_path / "a.txt") == ([["café \ufffd caf\ufffd \ufffd"], ["next"]], 2)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("He came. She left.", ["He came.", "She left."]),
        ('"Why?" she asked. "Go!"', ['"Why?" she asked.', '"Go!"']),
        ("It is 3.5 m, e.g. here.", ["It is 3.5 m, e.g. here."]),
        ("(He came.) Then he left", ["(He came.)", "Then he left"]),
        ("   ", []),
    ],
)
def test_sentences(line, expected):
    found = list(sentences(line))
    assert [s.replace(" ", "") for s in found] == [s.replace(" ", "") for s in expected]


def test_a_line_of_megabytes_is_cut():
    line = "word " * 500_000
    parts = list(sentences(line))
    assert max(map(len, parts)) <= corpus.PIECE
    assert "".join(parts).split() == line.split()
    assert "".join(sentences("x" * 250_000)) == "x" * 250_000


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pairs_follow_or_are_of_another_document():
    random = np.random.default_rng(0)
    documents = [document(n, random.integers(1, 12, random.integers(1, 40))) for n in range(50)]
    found = list(pairs(documents, 40, 0.1, random))
    assert len(found) > 200
    for first, second, other in found:
        assert first
        assert second
        assert len(first) + len(second) <= 40
        assert first == list(range(first[0], first[-1] + 1))
        assert second == list(range(second[0], second[-1] + 1))
        assert (first[0] // 1000 != second[0] // 1000) == other
        if not other and len(first) + len(second) < 40:
            assert second[0] == first[-1] + 1
    assert np.mean([other for *_, other in found]) == pytest.approx(0.5, abs=0.1)
    lengths = np.array([len(first) + len(second) for first, second, _ in found])
    assert np.mean(lengths[:-1] >= 30) > 0.75  # the rest is short ones, and documents' ends
    whole = list(pairs(documents, 40, 0.0, np.random.default_rng(1)))
    assert np.mean([len(a) + len(b) for a, b, _ in whole]) > lengths.mean()


def test_no_sentence_is_left_out():
    documents = [document(n, [5] * 30) for n in range(4)]
    found = list(pairs(documents, 40, 0.1, np.random.default_rng(2)))
    firsts = {token for first, *_ in found for token in first}
    seconds = {token for _, second, other in found if not other for token in second}
    missing = {token for d in documents for s in d for token in s} - firsts - seconds
    assert len(missing) < 30  # of 600: what trimming cuts off


def test_runs_fill_the_room():
    found = list(runs([document(1, [5, 6, 7]), document(2, [30, 2])], 12))
    assert found == [
        [*range(1000, 1011)], [*range(1011, 1018)],
        [*range(2000, 2012)], [*range(2012, 2024)], [*range(2024, 2032)],
    ]  # fmt: skip


# ── Shards ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(LINES))
    return path


def made(text, tokenizer, name="shards", processes=1, **layout):
    folder, layout = text.parent / name, corpus.Layout(**{"max_length": 32} | layout)
    return folder, corpus.tokenize([text], folder, tokenizer, layout, seed=1, processes=processes)


def table(shards):
    return np.concatenate(shards.tables)


@pytest.mark.parametrize("next_sentence", [True, False])
def test_shards_hold_the_texts(text, tokenizer, next_sentence, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD", 400)
    _, shards = made(text, tokenizer, next_sentence=next_sentence)
    assert len(shards.tables) > 4
    assert sum(part["documents"] for part in shards.manifest["shards"]) == 30
    assert sum(part["rows"] for part in shards.manifest["shards"]) == len(table(shards))
    lengths = shards.column(HEADER[0])
    assert sum(part["tokens"] for part in shards.manifest["shards"]) == lengths.sum()
    assert [np.count_nonzero(shards.ids(i)) for i in range(len(lengths))] == lengths.tolist()
    words = " ".join(tokenizer.decode(shards.ids(i).tolist(), skip_special_tokens=True) for i in range(len(lengths)))
    assert all(f"Word{n} stands" in words for n in range(30))


def test_processes_make_the_same_shards(text, tokenizer, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD", 400)
    one, two = (made(text, tokenizer, name, processes=n)[1] for name, n in (("one", 1), ("two", 3)))
    np.testing.assert_array_equal(table(one), table(two))


def test_work_goes_on_where_it_stood(text, tokenizer, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD", 400)
    folder, whole = made(text, tokenizer)
    expected = table(whole).copy()
    written = (folder / "00000.npy").stat().st_mtime_ns
    for name in ("manifest.json", "00002.json", "00003.npy", "00003.json"):
        (folder / name).unlink()
    (folder / "00004.new").write_bytes(b"half")
    np.testing.assert_array_equal(table(made(text, tokenizer)[1]), expected)
    assert (folder / "00000.npy").stat().st_mtime_ns == written


def test_a_damaged_shard(text, tokenizer):
    folder, _ = made(text, tokenizer)
    content = bytearray((folder / "00000.npy").read_bytes())
    content[-3] ^= 1
    (folder / "00000.npy").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"00000.npy is damaged or missing. Remove 00000\.\* and manifest.json"):
        made(text, tokenizer)
    for name in ("00000.npy", "00000.json", "manifest.json"):
        (folder / name).unlink()
    made(text, tokenizer)


def test_shards_of_something_else(text, tokenizer):
    made(text, tokenizer)
    with pytest.raises(InputError, match=r"shards with other values of max_length. Remove the folder"):
        made(text, tokenizer, max_length=16)
    text.write_text("Another text.\n\nOf two.")
    with pytest.raises(InputError, match="shards with other values of files"):
        made(text, tokenizer)
    (text.parent / "other").mkdir()
    (text.parent / "other" / "mine.txt").touch()
    with pytest.raises(InputError, match="holds files that are not shards"):
        made(text, tokenizer, "other")


def test_a_kill_before_the_first_file_is_complete_does_no_harm(text, tokenizer):
    (text.parent / "other").mkdir()
    (text.parent / "other" / "corpus.new").write_text('{"files"')
    made(text, tokenizer, "other")


@pytest.mark.parametrize(
    ("content", "problem"),
    [("", "There is no text in"), (" \n\n ", "There is no text in"), ("One. Two.\nThree.", "Pairs need two documents")],
)
def test_too_little_text(tmp_path, tokenizer, content, problem):
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(InputError, match=problem):
        made(tmp_path / "text.txt", tokenizer)


def test_one_document_does_for_masked_tokens_alone(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text("One. Two.\nThree.")
    assert len(table(made(tmp_path / "text.txt", tokenizer, next_sentence=False)[1])) == 1


def test_the_last_document_is_not_alone(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD", 10)
    (tmp_path / "text.txt").write_text("\n\n".join(f"This is document {n}. And so on." for n in range(5)))
    _, shards = made(tmp_path / "text.txt", tokenizer)
    assert [part["documents"] for part in shards.manifest["shards"]] == [2, 3]


def test_a_file_that_is_not_there(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"Cannot access .*none.txt: No such file"):
        made(tmp_path / "none.txt", tokenizer)


def test_a_disk_that_is_full(text, tokenizer, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD", 400)
    folder, _ = made(text, tokenizer)
    (folder / "manifest.json").unlink()
    (folder / "00004.json").unlink()
    (folder / "00004.npy").unlink()
    (folder / "00004.new").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"Cannot access .*: No space left on device. Finished shards stay"):
        made(text, tokenizer)
    assert (folder / "00003.npy").exists()
    (folder / "00004.new").unlink()
    made(text, tokenizer)
