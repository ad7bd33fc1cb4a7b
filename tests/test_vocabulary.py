import numpy as np
import pytest
import tokenizers

from bert_jax import vocabulary
from bert_jax.tokenizer import Tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def made(tmp_path, name, pieces, **settings):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + pieces))
    return Tokenizer.from_pretrained(folder)


def test_rows_are_found_by_name(tmp_path):
    before = made(tmp_path, "before", ["house", "##s", "boat", "##man", "paris", "h", "##ou"])
    after = made(tmp_path, "after", ["House", "Paris", "##s", "boatman", "houseboats", "##house", "ΔΩ", "##S", "boat"])
    sources, counts = vocabulary.carry(before, after)
    old = before.backend.get_vocab()

    def of(piece):
        return sources[after.token_to_id(piece)]

    assert [of(piece) for piece in SPECIAL] == [[i] for i in range(5)]
    assert of("House") == [old["house"]]
    assert of("Paris") == [old["paris"]]
    assert of("##s") == of("##S") == [old["##s"]]
    assert of("boatman") == [old["boat"], old["##man"]]
    assert of("##house") == [old["house"]]
    assert of("ΔΩ") == []
    assert counts == {
        vocabulary.SAME: 7, vocabulary.LOWER: 3, vocabulary.PIECES: 2, vocabulary.NONE: 2,
    }  # fmt: skip
    table = np.arange(2 * len(old), dtype=np.float32).reshape(-1, 2)
    rows = vocabulary.rows(table, sources)
    np.testing.assert_array_equal(rows[after.token_to_id("boatman")], (table[old["boat"]] + table[old["##man"]]) / 2)
    np.testing.assert_array_equal(rows[after.token_to_id("ΔΩ")], table.mean(0))
    assert rows.shape == (after.vocab_size, 2)


def test_the_published_vocabularies(tokenizer):
    sources, counts = vocabulary.carry(tokenizer, tokenizer)
    assert sources == [[i] for i in range(tokenizer.vocab_size)]
    assert counts[vocabulary.SAME] == tokenizer.vocab_size


def test_a_vocabulary_with_hardly_anything(tmp_path, tokenizer):
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "x": 1, "[PAD]": 2}, unk_token="[UNK]"))
    other = Tokenizer(backend)
    sources, counts = vocabulary.carry(other, tokenizer)
    assert sum(counts.values()) == tokenizer.vocab_size
    assert sources[tokenizer.token_to_id("x")] == [1]
    assert pytest.approx(vocabulary.rows(np.ones((3, 1)), sources)) == np.ones((tokenizer.vocab_size, 1))
