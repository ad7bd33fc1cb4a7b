"""Tokens as transformers reads them from every file that declares some."""

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
