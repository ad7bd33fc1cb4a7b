"""The files of a tokenizer: the tokens that they declare, and the backend that they describe."""

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from bert_jax import hub
from bert_jax.errors import CheckpointError, quoted

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}

BERT_CLASSES = ("Bert", "DistilBert", "Electra", "MobileBert", "ConvBert")
"""Classes that split text as BERT's does, by their names without `Tokenizer` and `Fast`."""
GENERIC_CLASSES = ("PreTrained", "TokenizersBackend")
"""Classes that use `tokenizer.json` as it is."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that settings can name, in the order in which transformers adds them."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""The flags of an added token."""


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a folder; empty if there is no such file."""
    path = folder / name
    if not path.is_file() and os.path.lexists(path):
        raise CheckpointError(f"{path} is not a regular file; replace or remove it.")
    return hub.read_json(path) if path.is_file() else {}


def max_length_of(given: Any) -> int:
    """The maximum number of tokens per row. It must leave room for at least one token of text."""
    if given is None:
        return 512
    # A tokenizer without its own limit is saved with a limit of 10^30.
    if isinstance(given, bool) or not isinstance(given, int | float) or not (limit := int(min(given, 10**6))) > 2:
        raise ValueError(f"model_max_length is {quoted(given)}")
    return limit


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that the settings name, as they are written in a text.

    Raises:
        ValueError: If a token is None or empty, or is the same as the mask token.
    """
    for name in SPECIAL_TOKENS:
        if name in settings and settings[name] in (None, ""):
            raise ValueError(f"{name} is {settings[name]!r}")
    if settings.get("split_special_tokens"):
        raise ValueError("split_special_tokens is set")
    special = {name: added_token(settings[name]).content for name in NAMED if settings.get(name) is not None}
    roles = SPECIAL_TOKENS | special
    if shared := [name for name in SPECIAL_TOKENS if name != "mask_token" and roles[name] == roles["mask_token"]]:
        raise ValueError(f"{shared[0]} and mask_token are both {roles['mask_token']}")
    return special


def added_token(given: Any, *, special: bool = True) -> AddedToken:
    """The token that a file declares, either as its text or as an object with flags."""
    if isinstance(given, str):
        return AddedToken(given, special=special, normalized=not special)
    flags = {flag: given[flag] for flag in FLAGS if flag in given}
    return AddedToken(given["content"], **{"special": special} | flags)


def declared_tokens(
    settings: Mapping[str, Any], added: Mapping[str, int], of_file: Sequence[Mapping[str, Any]]
) -> list[tuple[int | None, AddedToken]]:
    """The added tokens that files declare, in the order in which they get ids, each with its id if one is given.

    Args:
        settings: `tokenizer_config.json`, overridden by `special_tokens_map.json`.
        added: `added_tokens.json`.
        of_file: The added tokens of `tokenizer.json`.
    """
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if not isinstance(extra, list | dict):
        raise TypeError(f"extra_special_tokens is {quoted(extra)}")
    named = [settings[name] for name in NAMED if settings.get(name) is not None]
    named += [
        token for name, token in settings.items()
        if name not in NAMED and name.endswith("_token") and isinstance(token, str | dict)
    ]  # fmt: skip
    special = [added_token(token) for token in [*named, *(extra.values() if isinstance(extra, Mapping) else extra)]]
    names, contents = ({token.content for token in some} for some in (special[: len(named)], special))
    decoder = settings.get("added_tokens_decoder")
    if decoder is not None:
        numbered = {int(id): added_token(token, special=False) for id, token in decoder.items()}
        pairs = list(numbered.items())
    else:
        by_content = {content: (id, added_token(content, special=content in contents)) for content, id in added.items()}
        by_content |= {token["content"]: (token["id"], added_token(token, special=False)) for token in of_file}
        pairs = list(by_content.values())
    for _, token in pairs:
        token.special = token.special or token.content in names
    return [*sorted(pairs, key=lambda pair: pair[0]), *((None, token) for token in special)]


def read_vocab(vocab_file: Path) -> dict[str, int]:
    """Reads a vocabulary file, one piece per line, without trailing white space. The last of equal lines counts."""
    try:
        with open(vocab_file, encoding="utf-8", newline="") as file:
            pieces = file.read().split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{vocab_file} is damaged ({error}); download it again.") from None
    if pieces[-1] == "":
        pieces.pop()
    return {piece.rstrip(): i for i, piece in enumerate(pieces)}


def from_json(
    path: Path, file: Mapping[str, Any], settings: Mapping[str, Any] | None, special: Mapping[str, str]
) -> tokenizers.Tokenizer:
    """The tokenizer of a `tokenizer.json`, without its added tokens.

    Args:
        path: The path of the file.
        file: The content of the file.
        settings: `tokenizer_config.json`, which takes precedence for BERT's own class; None uses the file as it is.
        special: The named special tokens.

    Raises:
        CheckpointError: If the file is damaged, is not a WordPiece tokenizer, or contradicts the class that reads it.
    """
    try:
        model = file["model"]
        kind, vocab = model.get("type", "WordPiece"), model["vocab"]
        if kind == "WordPiece":
            # The vocabulary is kept apart, because the library takes longest to read it.
            content = {**file, "added_tokens": [], "model": {**model, "vocab": {}} if settings is not None else model}
            backend = tokenizers.Tokenizer.from_str(json.dumps(content))
            vocab = dict(vocab)
    except Exception as error:  # the library raises no narrower exception
        raise CheckpointError(f"{path} is damaged ({quoted(error)}); download it again.") from None
    if kind != "WordPiece" or not isinstance(backend.model, models.WordPiece):
        raise CheckpointError(f"{path} holds a {quoted(kind)} tokenizer; expected WordPiece.")
    if settings is None:
        check_vocab(path, vocab, [backend.model.unk_token])
        return backend
    if other := unlike_bert(backend):
        raise CheckpointError(
            f"{path} has a {' and a '.join(other)} that BertTokenizer does not have, but tokenizer_config.json "
            "names that class. To use the file as it is, set tokenizer_class to PreTrainedTokenizerFast."
        )
    return wordpiece(path, vocab, settings, special, cased=not backend.normalizer.lowercase)


def wordpiece(
    path: Path,
    vocab: dict[str, int],
    settings: Mapping[str, Any],
    special: Mapping[str, str],
    *,
    cased: bool | None = None,
) -> tokenizers.Tokenizer:
    """The tokenizer of google-research/bert tokenization.py with the given vocabulary.

    Args:
        path: The file of the vocabulary.
        vocab: Piece -> id.
        settings: `tokenizer_config.json`.
        special: The named special tokens.
        cased: Whether text keeps its case if the settings do not say; by default, whether the vocabulary has capital
            letters.
    """
    check_vocab(path, vocab, [special[name] for name in ("unk_token", "cls_token", "sep_token")])
    lowercase = settings.get("do_lower_case")
    if lowercase is None:
        if cased is None:
            pieces = (piece for piece in vocab if piece not in special.values() and piece[:1] != "[")
            cased = any(piece != piece.lower() for piece in pieces)
        lowercase = not cased
        if cased:
            logger.warning("%s: no do_lower_case in tokenizer_config.json; text keeps its case.", path)
    chinese = settings.get("tokenize_chinese_chars")
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=special["unk_token"]))
    try:
        backend.normalizer = normalizers.BertNormalizer(
            handle_chinese_chars=True if chinese is None else chinese,
            strip_accents=settings.get("strip_accents"),
            lowercase=lowercase,
        )
    except TypeError as error:
        raise CheckpointError(f"tokenizer_config.json of {path} is damaged ({error}); download it again.") from None
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    cls, sep = special["cls_token"], special["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    return backend


def unlike_bert(backend: tokenizers.Tokenizer) -> list[str]:
    """The parts of a tokenizer that differ from BERT's."""
    model, normalizer = backend.model, backend.normalizer
    parts = {
        "normalizer": isinstance(normalizer, normalizers.BertNormalizer) and normalizer.clean_text,
        "pre_tokenizer": isinstance(backend.pre_tokenizer, pre_tokenizers.BertPreTokenizer),
        "model": (model.continuing_subword_prefix, model.max_input_chars_per_word) == ("##", 100),
        "post_processor": [backend.num_special_tokens_to_add(pair) for pair in (False, True)] == [2, 3],
    }
    return [name for name, is_bert in parts.items() if not is_bert]


def check_vocab(path: Path, vocab: Mapping[str, int], needed: Sequence[str]) -> None:
    """Raises `CheckpointError` if a vocabulary lacks a needed token, or gives one id to two tokens."""
    if missing := [token for token in needed if token not in vocab]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; expected a vocabulary with all of these.")
    if not all(type(id) is int and 0 <= id < 2**24 for id in vocab.values()):
        raise CheckpointError(f"{path} is damaged (a token id is not a whole number below 2^24); download it again.")
    if len(set(vocab.values())) < len(vocab):
        id, count = Counter(vocab.values()).most_common(1)[0]
        raise CheckpointError(f"{path} has the id {id} for {count} tokens; expected one token for each id.")
