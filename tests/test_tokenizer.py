"""WordPiece against known ids and against the `tokenizers` library's own truncation; every form of tokenizer files."""

import itertools
import json
import os
import re

import numpy as np
import pytest
import tokenizers

import bert_jax
from bert_jax import Tokenizer
from bert_jax.errors import CheckpointError, InputError

HELLO = "Hello I'm a [MASK] model."
IDS = [101, 8667, 146, 112, 182, 170, 103, 2235, 119, 102]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def one(tokenizer, *texts, **options):
    """The only row of one text or pair."""
    ((row,),) = tokenizer.encode(*([text] for text in texts), **options)
    return row


def facts(encoding):
    return (encoding.ids, encoding.type_ids, encoding.offsets, encoding.word_ids, encoding.sequence_ids,
            encoding.special_tokens_mask, encoding.attention_mask)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Writes a checkpoint's tokenizer files: the vocabulary, a piece a line, and the rest as JSON."""

    def folder(pieces=None, name="model", **files):
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text("{}")
        if pieces is not None:
            (path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
        for file, content in files.items():
            (path / f"{file}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return folder


# ── Ids and offsets ──


def test_known_ids(tokenizer):
    row = one(tokenizer, HELLO)
    assert row.ids == IDS
    assert row.type_ids == [0] * 10
    assert row.special_tokens_mask == [1, *[0] * 5, 0, 0, 0, 1]
    assert one(tokenizer, HELLO, add_special_tokens=False).ids == IDS[1:-1]
    assert tokenizer.vocab_size == 28996
    assert tokenizer.model_max_length == 512
    ids = [getattr(tokenizer, f"{name}_token_id") for name in ("pad", "unk", "cls", "sep", "mask")]
    assert ids == [0, 100, 101, 102, 103]
    assert tokenizer.mask_token == "[MASK]"
    assert tokenizer.token_to_id("capital") == 2364
    assert tokenizer.token_to_id("no such piece") is None


def test_decode(tokenizer):
    assert tokenizer.decode(IDS) == "[CLS] Hello I ' m a [MASK] model. [SEP]"
    assert tokenizer.decode(np.array(IDS).tolist(), skip_special_tokens=True) == "Hello I ' m a model."
    assert tokenizer.decode(one(tokenizer, "naïve").ids, skip_special_tokens=True) == "naïve"


def test_tokens_and_ids(tokenizer):
    tokens = ["[CLS]", "Hello", "I", "'", "m", "a", "[MASK]", "model", ".", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(np.array(IDS)) == tokenizer.convert_ids_to_tokens(IDS) == tokens
    assert tokenizer.convert_ids_to_tokens(IDS, skip_special_tokens=True) == [*tokens[1:6], *tokens[7:9]]
    assert tokenizer.convert_tokens_to_ids(tokens) == IDS
    assert (tokenizer.convert_ids_to_tokens(2235), tokenizer.convert_tokens_to_ids("model")) == ("model", 2235)
    assert tokenizer.convert_tokens_to_ids("no such piece") == tokenizer.unk_token_id
    vocab = tokenizer.get_vocab()
    assert (len(vocab), vocab["model"]) == (28996, 2235)
    for id in (-1, 28996):
        with pytest.raises(InputError, match=f"{id} is not the id of a token; expected 0 to 28995"):
            tokenizer.convert_ids_to_tokens([5, id])


def test_batch_decode(tokenizer):
    rows = tokenizer([HELLO, "a"])["input_ids"]
    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == ["Hello I ' m a model.", "a"]
    assert tokenizer.batch_decode([IDS]) == [tokenizer.decode(IDS)] == ["[CLS] Hello I ' m a [MASK] model. [SEP]"]


def test_pairs(tokenizer):
    row = one(tokenizer, "Paris is big.", "So is London.")
    assert row.tokens == ["[CLS]", "Paris", "is", "big", ".", "[SEP]", "So", "is", "London", ".", "[SEP]"]
    assert row.type_ids == [0] * 6 + [1] * 5
    assert row.sequence_ids == [None, 0, 0, 0, 0, None, 1, 1, 1, 1, None]
    bare = one(tokenizer, "Paris is big.", "So is London.", add_special_tokens=False)
    assert bare.tokens == [token for token in row.tokens if token not in SPECIAL]


def test_words(tokenizer):
    words = ["naïve", "New York", "", "Paris"]
    row = one(tokenizer, words, is_split_into_words=True)
    assert row.tokens == ["[CLS]", "na", "##ï", "##ve", "New", "York", "Paris", "[SEP]"]
    assert row.word_ids == [None, 0, 0, 0, 1, 1, 3, None]
    assert row.offsets[1:-1] == [(0, 2), (2, 3), (3, 5), (0, 3), (4, 8), (0, 5)]
    pair = one(tokenizer, ("Paris", "is"), ("big",), is_split_into_words=True)
    assert pair.word_ids == [None, 0, 1, None, 0, None]
    assert pair.sequence_ids == [None, 0, 0, None, 1, None]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("naïve Zürich café", ["na", "ï", "ve", "Zürich", "café"]),
        ("go 😀 on👍🏽!", ["go", "😀", "on👍🏽", "!"]),
        ("東京 is  big", ["東", "京", "is", "big"]),
        ("  Paris \t is\n\nbig  ", ["Paris", "is", "big"]),
        ("e\u0301 a\u200bb", None),  # a combining accent; a character that is dropped
    ],
)
def test_offsets_are_characters_of_the_text(tokenizer, text, pieces):
    row = one(tokenizer, text, add_special_tokens=False)
    found = [text[a:b] for a, b in row.offsets]
    if pieces is not None:
        assert found == pieces
    assert all(a < b for a, b in row.offsets)
    for piece, token in zip(found, row.tokens, strict=True):
        assert token in ("[UNK]", piece.replace("\u200b", ""), "##" + piece)


# ── Truncation and windows ──

TEXTS = ["Paris is big and naïve.", "In the beginning God created the heaven and the earth: 東京.", "a", ""]


@pytest.mark.parametrize("strategy", ["longest_first", "only_second"])
@pytest.mark.parametrize("stride", [None, 0, 1, 3])
def test_truncation_is_the_librarys(tokenizer, strategy, stride):
    """On a copy of the backend that is told to truncate, at every length that leaves room."""
    reference = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    inputs = [(text,) for text in TEXTS if strategy == "longest_first"]
    inputs += [(first, second) for first in TEXTS for second in TEXTS]
    compared = 0
    for texts in inputs:
        lengths = [len(one(tokenizer, text, add_special_tokens=False)) for text in texts]
        total = sum(lengths) + len(texts) + 1
        for max_length in range(3, total + 2):
            try:
                rows = tokenizer.encode(
                    *([text] for text in texts), max_length=max_length, stride=stride, truncate=strategy
                )[0]
            except InputError as error:
                room = max_length - len(texts) - 1
                kept = (
                    room - lengths[0] if strategy == "only_second" else min(*lengths, room // 2) if texts[1:] else room
                )
                # What is cut may be shortened to no less than the room that the other leaves.
                assert kept <= (stride or 0), (texts, max_length, error)
                assert re.match(rf"max_length={max_length} with stride={stride} leaves no room", str(error))
                continue
            if stride and stride >= max_length - 2:  # which the library refuses even where nothing is cut
                assert total <= max_length
                continue
            reference.enable_truncation(max_length, stride=stride or 0, strategy=strategy)
            expected = reference.encode(*texts)
            expected = [expected] if stride is None else [expected, *expected.overflowing]
            assert [facts(row) for row in rows] == [facts(row) for row in expected], (texts, max_length)
            compared += len(rows) > 1 or max_length < total
    assert compared > 10


def test_windows_cover_the_text(tokenizer):
    text = " ".join(f"word{i}" for i in range(50))
    whole = one(tokenizer, text, add_special_tokens=False)
    windows = tokenizer.encode([text], max_length=20, stride=5)[0]
    assert len(windows) > 3
    assert all(len(window) <= 20 for window in windows)
    pieces = [window.offsets[1:-1] for window in windows]
    for before, after in itertools.pairwise(pieces):
        assert before[-5:] == after[:5]
    assert pieces[0] + [offset for after in pieces[1:] for offset in after[5:]] == whole.offsets


def test_nothing_is_remembered(tokenizer):
    long = "a " * 30
    assert len(one(tokenizer, long, max_length=8)) == 8
    assert len(one(tokenizer, long)) == 32
    tokenizer([long, "a"], length=40)
    assert len(one(tokenizer, "a")) == 3
    assert tokenizer.backend.truncation is None
    assert tokenizer.backend.padding is None


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        (["a b c d"], {"max_length": 2}),
        (["a b c d"], {"max_length": 0}),
        (["a b c d e f"], {"max_length": 5, "stride": 3}),
        (["a b c d", "e f"], {"max_length": 3}),
        (["a b c d", "e f"], {"max_length": 7, "truncate": "only_second"}),
    ],
)
def test_no_room(tokenizer, texts, options):
    with pytest.raises(InputError, match=rf"max_length={options['max_length']} .*leaves no room.*Raise max_length"):
        one(tokenizer, *texts, **options)


def test_a_text_that_fits_needs_no_room_for_a_stride(tokenizer):
    assert len(tokenizer.encode(["a b"], max_length=4, stride=10)[0]) == 1


# ── Inputs of a model ──


def test_call(tokenizer):
    inputs = tokenizer([HELLO, "a"])
    np.testing.assert_array_equal(inputs["input_ids"], [IDS, [101, 170, 102, *[0] * 7]])
    np.testing.assert_array_equal(inputs["attention_mask"], [[1] * 10, [1] * 3 + [0] * 7])
    np.testing.assert_array_equal(inputs["token_type_ids"], np.zeros((2, 10)))
    assert {array.dtype for array in inputs.values()} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(tokenizer(HELLO)["input_ids"], [IDS])
    assert tokenizer("a", length=12)["input_ids"].shape == (1, 12)


def test_call_with_pairs_and_words(tokenizer):
    single = tokenizer("Paris is", "big")
    several = tokenizer(["Paris is", "a"], ["big", "b"])
    np.testing.assert_array_equal(single["token_type_ids"], [[0, 0, 0, 0, 1, 1]])
    np.testing.assert_array_equal(several["token_type_ids"], [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]])
    np.testing.assert_array_equal(several["attention_mask"][1], [1, 1, 1, 1, 1, 0])
    words = tokenizer(["Paris", "is"], ["big"], is_split_into_words=True)
    np.testing.assert_array_equal(words["input_ids"], single["input_ids"])
    words = tokenizer([["Paris", "is"], ["a"]], is_split_into_words=True)
    np.testing.assert_array_equal(words["input_ids"], tokenizer(["Paris is", "a"])["input_ids"])


def test_long_rows_are_refused_or_cut(tokenizer):
    long = "a " * 600
    with pytest.raises(InputError, match=r"text\[1\] has 602 tokens; the limit is 512.*truncation=True"):
        tokenizer(["a", long])
    with pytest.raises(InputError, match="limit is 6"):
        tokenizer(HELLO, max_length=6)
    assert tokenizer(long, truncation=True)["input_ids"].shape == (1, 512)
    np.testing.assert_array_equal(
        tokenizer(HELLO, truncation=True, max_length=6)["input_ids"], [[*IDS[:5], tokenizer.sep_token_id]]
    )


def test_padding(tokenizer):
    inputs = tokenizer.pad([[101, 102], [101, 170, 102]], [[0, 0], [0, 0, 1]], length=4, rows=3)
    np.testing.assert_array_equal(inputs["input_ids"], [[101, 102, 0, 0], [101, 170, 102, 0], [0] * 4])
    np.testing.assert_array_equal(inputs["attention_mask"], [[1, 1, 0, 0], [1, 1, 1, 0], [0] * 4])
    np.testing.assert_array_equal(inputs["token_type_ids"], [[0] * 4, [0, 0, 1, 0], [0] * 4])
    assert tokenizer.pad([[1], [1]], [[0], [0]], rows=1)["input_ids"].shape == (2, 1)
    with pytest.raises(InputError, match="has 2 tokens; cannot pad to length=1"):
        tokenizer.pad([[101, 102]], [[0, 0]], length=1)


def test_bad_texts(tokenizer):
    assert tokenizer.encode([]) == []
    with pytest.raises(InputError, match="There is no text"):
        tokenizer([])
    with pytest.raises(InputError, match=r"text\[1\] is 7 \(int\); expected a text"):
        tokenizer(["a", 7])
    with pytest.raises(InputError, match=r"text\[1\] is None \(NoneType\); expected a text"):
        tokenizer.encode(["a", None])
    with pytest.raises(InputError, match=r"text_pair\[0\] is b'b' \(bytes\)"):
        tokenizer.encode(["a"], [b"b"])
    with pytest.raises(InputError, match=r"text\[0\] is \['a'\] \(list\); expected a text"):
        tokenizer([["a"]])
    with pytest.raises(InputError, match=r"text\[1\] is 'b' \(str\); expected a list of words"):
        tokenizer.encode([["a"], "b"], is_split_into_words=True)
    with pytest.raises(InputError, match="2 texts and 1 second texts"):
        tokenizer.encode(["a", "b"], ["c"])
    with pytest.raises(InputError, match="1 texts and 0 second texts"):
        tokenizer.encode(["a"], [])


# ── Files ──

UNCASED = [*SPECIAL, "hello", "e", "é", "##e", "東", "京", "東京", "[unused1]", "##é"]
CASED = [*UNCASED, "Hello"]


def test_vocab_alone(folder):
    tokenizer = Tokenizer.from_pretrained(folder(UNCASED))
    assert one(tokenizer, "hello [MASK]").ids == [2, 5, 4, 3]
    assert tokenizer.vocab_size == len(UNCASED)
    assert tokenizer.model_max_length == 512


def test_vocab_with_windows_line_ends(folder):
    path = folder()
    (path / "vocab.txt").write_bytes("\r\n".join(UNCASED).encode())
    assert one(Tokenizer.from_pretrained(path), "hello").ids == [2, 5, 3]


def test_the_vocabulary_says_whether_it_is_cased(folder):
    cased = Tokenizer.from_pretrained(folder(CASED))
    assert one(cased, "Hello hello HELLO é").tokens[1:-1] == ["Hello", "hello", "[UNK]", "é"]
    uncased = Tokenizer.from_pretrained(folder(UNCASED))
    assert one(uncased, "Hello HELLO É").tokens[1:-1] == ["hello", "hello", "e"]


def test_tokenizer_json_alone_and_its_settings_do_not_act(tokenizer, folder):
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.enable_truncation(5)
    backend.enable_padding(length=20)
    loaded = Tokenizer.from_pretrained(folder(tokenizer=backend.to_str()))
    assert one(loaded, HELLO).ids == IDS
    assert loaded(["a", HELLO])["input_ids"].shape == (2, 10)


def normalized(path, text):
    return one(Tokenizer.from_pretrained(path), text, add_special_tokens=False).tokens


@pytest.mark.parametrize("stored", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, ["Hello", "é", "東", "京"]),
        ({"do_lower_case": None}, ["Hello", "é", "東", "京"]),
        ({"do_lower_case": False}, ["Hello", "é", "東", "京"]),
        ({"do_lower_case": True}, ["hello", "e", "東", "京"]),
        ({"do_lower_case": True, "strip_accents": False}, ["hello", "é", "東", "京"]),
        ({"strip_accents": True}, ["Hello", "e", "東", "京"]),
        ({"tokenize_chinese_chars": False}, ["Hello", "é", "東京"]),
    ],
)
def test_tokenizer_config_has_the_last_word(folder, stored, settings, tokens):
    path = folder(CASED)
    if stored == "tokenizer.json":
        Tokenizer.from_pretrained(path).backend.save(str(path / "tokenizer.json"))
        (path / "vocab.txt").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert normalized(path, "Hello é 東京") == tokens


def test_model_max_length(folder):
    assert Tokenizer.from_pretrained(folder(CASED, tokenizer_config={"model_max_length": 64})).model_max_length == 64
    huge = Tokenizer.from_pretrained(folder(CASED, tokenizer_config={"model_max_length": 1e30}))
    assert 512 <= huge.model_max_length <= 10**6


@pytest.mark.parametrize("form", [lambda token: token, lambda token: {"content": token, "lstrip": False}])
@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
def test_other_special_tokens(folder, form, file):
    names = {
        "cls_token": "<s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
        "unk_token": "<unk>",
    }
    pieces = ["Hello", "<mask>", "<s>", "a", "</s>", "<unk>", "<pad>"]
    path = folder(pieces, **{file: {name: form(token) for name, token in names.items()}})
    tokenizer = Tokenizer.from_pretrained(path)
    assert one(tokenizer, "Hello<mask> b").ids == [2, 0, 1, 5, 4]
    ids = [getattr(tokenizer, f"{name}_token_id") for name in ("pad", "unk", "cls", "sep", "mask")]
    assert ids == [6, 5, 2, 4, 1]
    assert tokenizer.mask_token == "<mask>"
    np.testing.assert_array_equal(tokenizer(["a", "a a"])["input_ids"], [[2, 3, 4, 6], [2, 3, 3, 4]])
    assert tokenizer.decode([2, 0, 1, 4], skip_special_tokens=True) == "Hello"


def test_a_vocabulary_without_a_mask(folder):
    tokenizer = Tokenizer.from_pretrained(folder([piece for piece in CASED if piece != "[MASK]"]))
    assert tokenizer.mask_token_id is None
    assert one(tokenizer, "Hello").tokens == ["[CLS]", "Hello", "[SEP]"]


def test_saved_and_loaded(tokenizer, tmp_path, folder):
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text("{}")
    assert (tmp_path / "saved" / "vocab.txt").read_bytes() == (
        bert_jax.hub.EMBEDDED / "bert-mini-cased" / "vocab.txt"
    ).read_bytes()
    for left_out in [None, "tokenizer.json"]:
        if left_out:
            (tmp_path / "saved" / left_out).unlink()
        again = Tokenizer.from_pretrained(tmp_path / "saved")
        assert again.special_tokens == tokenizer.special_tokens
        assert again.model_max_length == 512
        for text in [HELLO, *TEXTS]:
            assert facts(one(again, text)) == facts(one(tokenizer, text))
            assert facts(one(again, text, HELLO)) == facts(one(tokenizer, text, HELLO))


def test_an_odd_one_saved_and_loaded(folder, tmp_path):
    settings = {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False, "mask_token": "<mask>"}
    path = folder([*UNCASED, "<mask>"], tokenizer_config=settings | {"model_max_length": 77})
    tokenizer = Tokenizer.from_pretrained(path)
    tokenizer.save_pretrained(path)
    again = Tokenizer.from_pretrained(path)
    assert normalized(path, "HELLO é 東京<mask>") == ["hello", "é", "東京", "<mask>"]
    assert (again.model_max_length, again.mask_token, again.mask_token_id) == (77, "<mask>", len(UNCASED))
    assert json.loads((path / "tokenizer_config.json").read_text()).items() >= settings.items()


# ── Added tokens ──

ADDED = [*SPECIAL, "the", "cat", "sat", "[", "]", "E", "##1", "/", "1", "E1", "e", "##E"]
N = len(ADDED)
PLAIN = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
MARKED = "the [E1] cat [/E1] sat"
# Where tokens are declared -> the files, and the ids of MARKED and of "the[e1]cat cats" as transformers has them
# (tests/parity/test_tokenizer_files.py).
NONE, BOTH, ONE = [5, 8, 14, 9, 6, 8, 12, 14, 9, 7], [5, N, 6, N + 1, 7], [5, N, 6, 8, 12, 14, 9, 7]
SPLIT = [5, 8, 15, 11, 9, 6, 1]
DECLARED = {
    "nowhere": ({"tokenizer_config": PLAIN}, NONE, SPLIT),
    "added_tokens": ({"tokenizer_config": PLAIN, "added_tokens": {"[E1]": N, "[/E1]": N + 1}}, BOTH, SPLIT),
    "extra": ({"tokenizer_config": PLAIN | {"extra_special_tokens": ["[E1]", "[/E1]"]}}, BOTH, SPLIT),
    "extra by name": (
        {"tokenizer_config": PLAIN | {"extra_special_tokens": {"e_token": "[E1]", "f_token": "[/E1]"}}}, BOTH, SPLIT
    ),
    "additional": ({"tokenizer_config": PLAIN | {"additional_special_tokens": ["[E1]", "[/E1]"]}}, BOTH, SPLIT),
    "additional in the map": (
        {"tokenizer_config": PLAIN, "special_tokens_map": {"additional_special_tokens": ["[E1]", "[/E1]"]}}, BOTH, SPLIT
    ),
    "decoder": (
        {"tokenizer_config": PLAIN | {"added_tokens_decoder": {
            str(N + 1): {"content": "[/E1]", **FLAGS}, str(N): {"content": "[E1]", **FLAGS, "lstrip": True},
        }}}, BOTH, SPLIT,
    ),
    "decoder, before added_tokens": (
        {"tokenizer_config": PLAIN | {"added_tokens_decoder": {"0": {"content": "[PAD]", **FLAGS}}},
         "added_tokens": {"[E1]": N}}, NONE, SPLIT,
    ),
    "a token of its own name": ({"tokenizer_config": PLAIN | {"entity_token": "[E1]"}}, ONE, SPLIT),
    "bos": ({"tokenizer_config": PLAIN | {"bos_token": "[E1]"}}, ONE, SPLIT),
    "normalized": (
        {"tokenizer_config": PLAIN | {"do_lower_case": True}, "added_tokens": {"[E1]": N}},
        [5, N, 6, 8, 12, 15, 11, 9, 7], [5, N, 6, 1],
    ),
    "not normalized": (
        {"tokenizer_config": PLAIN | {"do_lower_case": True, "extra_special_tokens": ["[E1]"]}},
        [5, N, 6, 8, 12, 15, 11, 9, 7], SPLIT,
    ),
    "single_word": (
        {"tokenizer_config": PLAIN | {"added_tokens_decoder": {
            str(N): {"content": "cats", **FLAGS, "single_word": True, "special": False}
        }}}, NONE, [5, 8, 15, 11, 9, 6, N],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLARED)
def test_added_tokens(folder, tmp_path, case):
    files, marked, lower = DECLARED[case]
    path = folder(ADDED, **files)
    tokenizer = Tokenizer.from_pretrained(path)
    assert one(tokenizer, MARKED, add_special_tokens=False).ids == marked
    assert one(tokenizer, "the[e1]cat cats", add_special_tokens=False).ids == lower
    assert tokenizer.vocab_size == max([N - 1, *marked, *lower]) + 1
    # Saved and loaded, also from the files without tokenizer.json, it is the same.
    tokenizer.save_pretrained(path)
    for file in ["special_tokens_map.json", "added_tokens.json"]:
        (path / file).unlink(missing_ok=True)
    for left_out in [None, "tokenizer.json"]:
        if left_out:
            (path / left_out).unlink()
        again = Tokenizer.from_pretrained(path)
        assert one(again, MARKED, add_special_tokens=False).ids == marked
        assert one(again, "the[e1]cat cats", add_special_tokens=False).ids == lower
        assert again.decode(marked, skip_special_tokens=True) == tokenizer.decode(marked, skip_special_tokens=True)


def test_added_tokens_in_all_files_at_once(folder):
    path = folder(ADDED, tokenizer_config=PLAIN, added_tokens={"[E1]": N})
    backend = Tokenizer.from_pretrained(path).backend
    path = folder(
        None, "other", tokenizer=backend.to_str(), tokenizer_config=PLAIN | {"extra_special_tokens": ["[/E1]"]}
    )
    assert one(Tokenizer.from_pretrained(path), MARKED, add_special_tokens=False).ids == BOTH


def test_special_added_tokens_are_left_out_of_texts(folder):
    special = folder(ADDED, tokenizer_config=PLAIN | {"extra_special_tokens": ["[E1]", "[/E1]"]})
    assert Tokenizer.from_pretrained(special).decode(BOTH, skip_special_tokens=True) == "the cat sat"
    plain = folder(ADDED, "plain", tokenizer_config=PLAIN, added_tokens={"[E1]": N, "[/E1]": N + 1})
    assert Tokenizer.from_pretrained(plain).decode(BOTH, skip_special_tokens=True) == "the [E1] cat [/E1] sat"


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"[E1]": N + 3}},
        {"added_tokens": {"[E1]": N, "[/E1]": N}},
        {"added_tokens": {"cat": N}},
        {"tokenizer_config": {"added_tokens_decoder": {"0": {"content": "[E1]"}}}},
    ],
)
def test_added_tokens_with_ids_that_are_not_theirs(folder, files):
    with pytest.raises(CheckpointError, match="do not belong to its vocabulary"):
        Tokenizer.from_pretrained(folder(ADDED, **files))


# ── Other families ──


def test_a_class_that_is_no_wordpiece_is_refused(folder):
    for file in ("tokenizer_config", "config"):
        for name in ("BertJapaneseTokenizer", "XLMRobertaTokenizerFast"):
            with pytest.raises(CheckpointError, match=f"tokenizer_class: '{name}'"):
                Tokenizer.from_pretrained(folder(CASED, **{file: {"tokenizer_class": name}}, name=f"{file} {name}"))
    for name in ("BertTokenizerFast", "DistilBertTokenizer", None):
        path = folder(CASED, tokenizer_config={"tokenizer_class": name})
        assert one(Tokenizer.from_pretrained(path), "Hello").ids == [2, CASED.index("Hello"), 3]


def test_tokenizer_json_decides_on_the_family_and_not_the_class(tokenizer, folder):
    path = folder(tokenizer=tokenizer.backend.to_str(), tokenizer_config={"tokenizer_class": "BertJapaneseTokenizer"})
    assert one(Tokenizer.from_pretrained(path), HELLO).ids == IDS
    for model in (tokenizers.models.BPE(), tokenizers.models.WordLevel({"a": 0}, "a"), tokenizers.models.Unigram()):
        other = tokenizers.Tokenizer(model).to_str()
        with pytest.raises(CheckpointError, match=f"contains a '{type(model).__name__}' tokenizer; expected WordPiece"):
            Tokenizer.from_pretrained(folder(CASED, tokenizer=other, tokenizer_config=PLAIN))


def test_a_file_of_other_parts_than_its_class_has(folder):
    backend = Tokenizer.from_pretrained(folder(CASED)).backend
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    with pytest.raises(CheckpointError, match="has a pre_tokenizer that BertTokenizer does not have"):
        Tokenizer.from_pretrained(folder(CASED, tokenizer=backend.to_str(), tokenizer_config=PLAIN))
    as_it_is = {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True}
    path = folder(CASED, tokenizer=backend.to_str(), tokenizer_config=as_it_is)
    assert one(Tokenizer.from_pretrained(path), "Hello Hello! ").ids == [2, CASED.index("Hello"), 1, 3]


@pytest.mark.parametrize("name", [0, False, 7, "", ["BertTokenizer"], {}])
def test_a_class_that_is_no_name(folder, name):
    with pytest.raises(CheckpointError, match="no tokenizer that this package supports"):
        Tokenizer.from_pretrained(folder(CASED, tokenizer_config={"tokenizer_class": name}))


def test_files_that_are_none(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        for number, make in enumerate([os.mkdir, os.mkfifo, lambda path: os.symlink("nothing", path)]):
            path = folder(CASED, f"{name} {number}")
            make(path / name)
            with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is not a regular file"):
                Tokenizer.from_pretrained(path)


def test_a_cased_guess_is_said(folder, caplog):
    Tokenizer.from_pretrained(folder(CASED, tokenizer_config=PLAIN))
    Tokenizer.from_pretrained(folder(UNCASED))
    assert not caplog.records
    Tokenizer.from_pretrained(folder(CASED, "other"))
    assert "text keeps its case" in caplog.text


# ── Repeated lines ──


def test_repeated_lines_keep_the_ids_of_all_others(folder):
    repeated = [*SPECIAL, "hello", "e", "hello", "##e", "e", "x"]
    path = folder(repeated, tokenizer_config=PLAIN)
    tokenizer = Tokenizer.from_pretrained(path)
    assert one(tokenizer, "hello e x", add_special_tokens=False).ids == [7, 9, 10]  # the last of equal lines
    tokenizer.save_pretrained(path)
    for left_out in [None, "tokenizer.json", "tokenizer_config.json"]:
        if left_out:
            (path / left_out).unlink()
        again = Tokenizer.from_pretrained(path)
        assert one(again, "hello ee x", add_special_tokens=False).ids == [7, 9, 8, 10]
        assert again.vocab_size == len(repeated)


def test_a_token_added_behind_repeated_lines(folder):
    path = folder([*SPECIAL, "a", "b", "a", "c"], tokenizer_config=PLAIN, added_tokens={"[E1]": 8})
    with pytest.raises(CheckpointError, match="has the id 8 for 2 tokens"):
        Tokenizer.from_pretrained(path)


def test_white_space_behind_a_piece_is_none_of_it(folder):
    """As the library reads the file: pieces end where a line does, and a carriage return within one is not an end."""
    path = folder()
    lines = [*SPECIAL, "hello ", "e\t", "x\ry", "東\u3000", ""]
    (path / "vocab.txt").write_bytes("\n".join([*lines, "last"]).encode())
    (path / "tokenizer_config.json").write_text(json.dumps(PLAIN))
    tokenizer = Tokenizer.from_pretrained(path)
    assert one(tokenizer, "hello e 東 last", add_special_tokens=False).ids == [5, 6, 8, 10]
    tokenizer.save_pretrained(path)
    (path / "tokenizer.json").unlink()
    assert one(Tokenizer.from_pretrained(path), "hello e 東 last", add_special_tokens=False).ids == [5, 6, 8, 10]


@pytest.mark.parametrize("model", [{"a": 1}, {"[UNK]": 0, "[CLS]": 1, "[SEP]": 1}, {}, {"[UNK]": 2**25}])
@pytest.mark.parametrize("kind", ["BertTokenizer", "PreTrainedTokenizerFast"])
def test_a_vocabulary_of_tokenizer_json_that_is_none(tokenizer, folder, model, kind):
    file = json.loads(tokenizer.backend.to_str())
    file["model"]["vocab"] = model
    with pytest.raises(CheckpointError, match=r"tokenizer\.json (lacks|has|is damaged)"):
        Tokenizer.from_pretrained(folder(tokenizer=file, tokenizer_config={"tokenizer_class": kind}))


# ── Damaged files ──


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"text"', '{"version": "1.0", "model": {}}'])
def test_damaged_tokenizer_json(folder, content):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.* is damaged.*download it again"):
        Tokenizer.from_pretrained(folder(CASED, tokenizer=content))


@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map", "added_tokens"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "7", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_damaged_settings(folder, file, content):
    with pytest.raises(CheckpointError, match=rf"{file}\.json is damaged"):
        Tokenizer.from_pretrained(folder(CASED, **{file: content}))


@pytest.mark.parametrize(
    "content",
    [
        {"mask_token": {}}, {"cls_token": 7}, {"model_max_length": "long"}, {"model_max_length": -1},
        {"model_max_length": float("nan")}, {"model_max_length": True}, {"do_lower_case": "yes"},
        {"strip_accents": 1}, {"added_tokens_decoder": ["[E1]"]}, {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"extra_special_tokens": 7}, {"extra_special_tokens": [7]}, {"added_tokens_decoder": {"0": {"lstrip": True}}},
        {"extra_special_tokens": "cat"}, {"additional_special_tokens": "cat"}, {"split_special_tokens": True},
        {"model_max_length": 2}, {"model_max_length": ""}, {"model_max_length": []},
        {"unk_token": None}, {"mask_token": None}, {"pad_token": ""}, {"sep_token": "[MASK]"}, {"mask_token": "[CLS]"},
    ],
)  # fmt: skip
def test_settings_of_another_kind(folder, content):
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer.from_pretrained(folder(CASED, tokenizer_config=content))


def test_damaged_vocab(folder):
    path = folder()
    (path / "vocab.txt").write_bytes(b"[CLS]\n\xff\xfe\n")
    with pytest.raises(CheckpointError, match=r"vocab\.txt is damaged"):
        Tokenizer.from_pretrained(path)


@pytest.mark.parametrize("lacking", ["[UNK]", "[CLS]", "[SEP]"])
def test_a_vocabulary_that_lacks_a_special_token(folder, lacking):
    with pytest.raises(CheckpointError, match=rf"vocab\.txt lacks {re.escape(lacking)};"):
        Tokenizer.from_pretrained(folder([piece for piece in CASED if piece != lacking]))


def test_an_empty_vocab(folder):
    with pytest.raises(CheckpointError, match=r"lacks \[UNK\], \[CLS\], \[SEP\]"):
        Tokenizer.from_pretrained(folder([]))


def test_a_folder_without_tokenizer(folder):
    with pytest.raises(CheckpointError, match=r"has no tokenizer .* expected tokenizer\.json, or vocab\.txt"):
        Tokenizer.from_pretrained(folder())


# ── More tokens ──


@pytest.mark.parametrize("special", [False, True])
def test_tokens_added_later(tokenizer, tmp_path, special):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    ours = Tokenizer.from_pretrained(tmp_path)
    ours.encode(["a text that is cut"], max_length=4)  # makes a copy of the backend, which must not be used any more
    assert ours.add_tokens(["[E1]", "neurotransmitter", "[E1]"], special=special) == 2
    assert ours.vocab_size == 28998
    row = one(ours, "the[E1] neurotransmitters", max_length=9)
    assert row.tokens == ["[CLS]", "the", "[E1]", "neurotransmitter", "s", "[SEP]"]
    assert (row.ids[2], row.ids[3]) == (28996, 28997)
    assert one(ours, "x [E1] " * 9, max_length=4).tokens == ["[CLS]", "x", "[E1]", "[SEP]"]
    assert ours.add_tokens(["[E2]", "the"]) == 1
    ours.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.vocab_size == ours.vocab_size == 28999
    assert facts(one(again, "the[E1] [E2]neurotransmitters")) == facts(one(ours, "the[E1] [E2]neurotransmitters"))
    assert ("[E1]" in again.decode(row.ids, skip_special_tokens=True)) != special
    assert tokenizer.vocab_size == 28996


@pytest.mark.parametrize("tokens", ["[E1]", None, 5, iter(["a"]), [""], [" "], [1], ["a", None], ["\udc80"]])
def test_tokens_that_cannot_be_added(tokenizer, tokens):
    with pytest.raises(InputError, match=r"expected a list of strings that are not blank|lone surrogates"):
        tokenizer.add_tokens(tokens)
    assert tokenizer.vocab_size == 28996
