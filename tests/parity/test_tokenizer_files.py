"""Tokens as transformers reads them from every file that declares some."""

import numpy as np
import pytest
import reference
import test_tokenizer
from test_tokenizer import folder  # noqa: F401  a fixture

import bert_jax

TEXTS = [test_tokenizer.MARKED, "the[e1]cat cats", "The [MASK] sat", "[CLS] cat", "a concat, [ E1 ]"]


@pytest.mark.parametrize("case", test_tokenizer.DECLARED)
def test_added_tokens(folder, case):  # noqa: F811
    from transformers import AutoTokenizer

    files, *_ = test_tokenizer.DECLARED[case]
    path = folder(test_tokenizer.ADDED, config=reference.CONFIG, **files)
    ours = bert_jax.Tokenizer.from_pretrained(path)
    for saved in [False, True]:  # by ours, too, it is read alike
        if saved:
            ours.save_pretrained(path)
        theirs = AutoTokenizer.from_pretrained(path)
        for text in TEXTS:
            assert ours(text)["input_ids"][0].tolist() == theirs(text)["input_ids"], text


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("lower", [False, True])
def test_tokens_added_later(folder, special, lower):  # noqa: F811
    """As `add_tokens` of transformers, and read back by it together with a resized model."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    path = folder(test_tokenizer.ADDED, config=reference.CONFIG, tokenizer_config={"do_lower_case": lower})
    reference.write(path, reference.tensors("BertForMaskedLM"))
    ours, theirs = bert_jax.Tokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    tokens = ["[E1]", "conCat", "cat"]
    assert ours.add_tokens(tokens, special=special) == 2  # theirs counts "cat", too, which was in the vocabulary
    theirs.add_tokens(tokens, special_tokens=special)
    model = bert_jax.BertForMaskedLM.from_pretrained(path)
    model.resize_embeddings(ours.vocab_size + 60, multiple_of=64)
    for saved in [False, True]:
        if saved:
            ours.save_pretrained(path)
            model.save_pretrained(path)
            ours, theirs = bert_jax.Tokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        for text in [*TEXTS, "a CONCAT [e1]", "conCat[E1]", "conCats"]:
            assert ours(text)["input_ids"][0].tolist() == theirs(text)["input_ids"], text
    loaded = AutoModelForMaskedLM.from_pretrained(path)
    assert loaded.config.vocab_size == model.config.vocab_size
    given = ours(["conCat [MASK]"])
    expected = loaded(**theirs(["conCat [MASK]"], return_tensors="pt")).logits.detach().numpy()
    np.testing.assert_allclose(model(**given).logits, expected, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_tokens_and_texts_of_ids(tmp_path, skip):
    """As BertTokenizerFast of transformers, with tokens that were added as special ones and as others."""
    from transformers import BertTokenizerFast

    ours = bert_jax.Tokenizer.from_pretrained("bert-mini-cased")
    ours.save_pretrained(tmp_path)
    theirs = BertTokenizerFast.from_pretrained(tmp_path)
    for special, token in [(True, "[E1]"), (False, "conCat")]:
        ours.add_tokens([token], special=special)
        theirs.add_tokens([token], special_tokens=special)
    assert ours.get_vocab() == theirs.get_vocab()
    texts = [f"{text} conCat 東京, don't unaffordably [UNK] 1,000.50!" for text in TEXTS]
    given, expected = ours(texts)["input_ids"], theirs(texts, padding=True)["input_ids"]
    assert given.tolist() == expected
    found = ours.batch_decode(given, skip_special_tokens=skip)
    assert found == theirs.batch_decode(expected, skip_special_tokens=skip)
    for row in expected:
        tokens = theirs.convert_ids_to_tokens(row, skip_special_tokens=skip)
        assert ours.convert_ids_to_tokens(row, skip_special_tokens=skip) == tokens
        assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
        assert ours.convert_ids_to_tokens(row[1]) == theirs.convert_ids_to_tokens(row[1])
    unknown = ["[E1]", "no such piece", ""]
    assert ours.convert_tokens_to_ids(unknown) == theirs.convert_tokens_to_ids(unknown)
    assert ours.convert_tokens_to_ids("no such piece") == theirs.convert_tokens_to_ids("no such piece")
