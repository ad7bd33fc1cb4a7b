"""Reads tokenizer files, which declare special and added tokens and describe a `tokenizers.Tokenizer`."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

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
"""Tokenizer classes that split text as `BertTokenizer` does, named without the endings `Tokenizer` and `Fast`."""
GENERIC_CLASSES = ("PreTrained", "TokenizersBackend")
"""Tokenizer classes that use `tokenizer.json` as it is, named without the endings `Tokenizer` and `Fast`."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that `tokenizer_config.json` can set, in the order in which `transformers` adds them."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""The names that the tokenizer files use for the properties of an added token, apart from its text."""


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Reads a file that contains a JSON object. If the file does not exist, the result is empty."""
    path = folder / name
    if not path.is_file() and (path.exists() or path.is_symlink()):
        raise CheckpointError(f"{path} is not a regular file; replace or remove it.")
    return hub.read_json(path) if path.is_file() else {}


def max_length_of(given: Any) -> int:
    """Converts a `model_max_length` value to the maximum number of tokens per row. None means 512.

    Raises:
        ValueError: If the value is not a number, or if it leaves no room for a text token between [CLS] and [SEP].
    """
    given = 512 if given is None else given
    if not (isinstance(given, int | float) and given >= 3):
        raise ValueError(f"model_max_length is {quoted(given)}; expected at least 3")
    return int(min(given, 10**6))  # a cap, because `transformers` writes 10^30 if there is no limit


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns a dict that maps the names of special tokens, such as "mask_token", to the tokens.

    Args:
        settings: See `declared_tokens`. Tokens that the settings do not define default to those in `SPECIAL_TOKENS`.

    Raises:
        ValueError: If a token is None or empty, if another token is the same as the mask token, or if
            `split_special_tokens` is set, which is not supported.
    """
    if empty := [name for name in SPECIAL_TOKENS if name in settings and settings[name] in (None, "")]:
        raise ValueError(f"{empty[0]} is {settings[empty[0]]!r}")
    if settings.get("split_special_tokens"):
        raise ValueError("split_special_tokens is set")
    given = {name: added_token(settings[name]).content for name in NAMED if settings.get(name) is not None}
    named = SPECIAL_TOKENS | given
    if shared := [name for name in SPECIAL_TOKENS if name != "mask_token" and named[name] == named["mask_token"]]:
        raise ValueError(f"{shared[0]} and mask_token are both {named['mask_token']}")
    return named


def added_token(given: Any, *, special: bool = True) -> AddedToken:
    """Creates an added token from its declaration in a file.

    Args:
        given: The declaration: the token's text, or an object with the text (`content`) and flags.
        special: The value of the `special` flag if the declaration does not set it.
    """
    if isinstance(given, str):
        return AddedToken(given, special=special, normalized=not special)
    return AddedToken(given["content"], **{"special": special} | {flag: given[flag] for flag in FLAGS if flag in given})


def declared_tokens(
    settings: Mapping[str, Any], added: Mapping[str, int], of_file: Sequence[Mapping[str, Any]]
) -> list[tuple[int | None, AddedToken]]:
    """Returns the added tokens that the files declare, in the order in which to add them to the tokenizer.

    Each entry of the result is a pair of the declared id (None if no id is declared) and the token.

    Args:
        settings: The contents of `tokenizer_config.json`. If `added_tokens_decoder` is missing, the caller must
            update `settings` with the contents of `special_tokens_map.json`.
        added: The contents of `added_tokens.json`, which maps tokens to ids.
        of_file: The `added_tokens` in `tokenizer.json`.
    """
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if not isinstance(extra, list | dict):
        raise TypeError(f"extra_special_tokens is {quoted(extra)}")
    others = [
        name for name, token in settings.items()
        if name not in NAMED and name.endswith("_token") and isinstance(token, str | dict)
    ]  # fmt: skip
    named = [added_token(settings[name]) for name in (*NAMED, *others) if settings.get(name) is not None]
    special = [*named, *map(added_token, extra.values() if isinstance(extra, dict) else extra)]
    names, contents = {token.content for token in named}, {token.content for token in special}
    if settings.get("added_tokens_decoder") is not None:
        by_id = {int(id): added_token(token, special=False) for id, token in settings["added_tokens_decoder"].items()}
        pairs = list(by_id.items())
    else:
        by_content = {content: (id, added_token(content, special=content in contents)) for content, id in added.items()}
        by_content |= {token["content"]: (token["id"], added_token(token, special=False)) for token in of_file}
        pairs = list(by_content.values())
    for _, token in pairs:
        token.special = token.special or token.content in names
    return [*sorted(pairs, key=lambda pair: pair[0]), *((None, token) for token in special)]


def read_vocab(vocab_file: Path) -> dict[str, int]:
    """Reads the id of each piece from a file with one piece per line.

    The id of a piece is the index of its line. If several lines contain the same piece, only the last such line
    counts. Trailing whitespace is removed from each line.
    """
    try:
        pieces = vocab_file.read_bytes().decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{vocab_file} is damaged ({error}); download it again.") from None
    return {piece.rstrip(): i for i, piece in enumerate(pieces)}


def from_json(
    path: Path, file: Mapping[str, Any], settings: Mapping[str, Any] | None, named: dict[str, str]
) -> Tokenizer:
    """Creates the tokenizer that a `tokenizer.json` file describes, without the added tokens that the file declares.

    Args:
        path: The path of the file.
        file: The contents of the file.
        settings: The contents of `tokenizer_config.json`, which take precedence over the file. For classes that are not
            in `BERT_CLASSES`, pass None to use the file as it is.
        named: The special tokens, keyed by name, as returned by `named_tokens`.

    Raises:
        CheckpointError: If the file is damaged, if it does not describe a WordPiece tokenizer, or if `settings` is
            given and the tokenizer differs from BERT's.
    """
    try:
        model = file["model"]
        kind, vocab = model.get("type", "WordPiece"), dict(model["vocab"])
        if kind == "WordPiece":
            # If `settings` is given, the vocabulary is left out, because the library parses it slowly. `wordpiece` adds
            # it later.
            content = {**file, "added_tokens": [], "model": {**model, "vocab": {}} if settings is not None else model}
            backend = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises no more specific exception
        raise CheckpointError(f"{path} is damaged ({quoted(error)}); download it again.") from None
    if kind != "WordPiece" or not isinstance(backend.model, models.WordPiece):
        raise CheckpointError(f"{path} contains a {quoted(kind)} tokenizer; expected WordPiece.")
    if settings is None:
        check_vocab(path, vocab, [backend.model.unk_token])
        return backend
    if other := unlike_bert(backend):
        raise CheckpointError(
            f"{path} has a {' and a '.join(other)} that BertTokenizer does not have. To use the file as it is, set "
            "tokenizer_class in tokenizer_config.json to PreTrainedTokenizerFast."
        )
    return wordpiece(path, vocab, settings, named, cased=not backend.normalizer.lowercase)


def wordpiece(
    path: Path, vocab: dict[str, int], settings: Mapping[str, Any], named: dict[str, str], *, cased: bool | None = None
) -> Tokenizer:
    """Creates BERT's tokenizer (tokenization.py in google-research/bert) with the given vocabulary.

    Args:
        path: The vocabulary file's path, which is shown in messages.
        vocab: Maps pieces to ids.
        settings: The contents of `tokenizer_config.json`.
        named: The special tokens, keyed by name, as returned by `named_tokens`.
        cased: Whether to preserve case if `settings` does not contain `do_lower_case`. If `cased` is None, case is
            preserved only if the vocabulary contains capital letters.

    Raises:
        CheckpointError: If the vocabulary or a setting is invalid.
    """
    check_vocab(path, vocab, [named[name] for name in ("unk_token", "cls_token", "sep_token")])
    lowercase = settings.get("do_lower_case")
    if lowercase is None:
        if cased is None:
            cased = any(p != p.lower() for p in vocab if p not in named.values() and not p.startswith("["))
        lowercase = not cased
        if cased:
            logger.warning("%s: tokenizer_config.json has no do_lower_case; text keeps its case.", path)
    backend = Tokenizer(models.WordPiece(vocab, unk_token=named["unk_token"]))
    try:
        backend.normalizer = normalizers.BertNormalizer(
            handle_chinese_chars=settings.get("tokenize_chinese_chars") is None or settings["tokenize_chinese_chars"],
            strip_accents=settings.get("strip_accents"),
            lowercase=lowercase,
        )
    except TypeError as error:
        raise CheckpointError(f"tokenizer_config.json of {path} is damaged ({error}); download it again.") from None
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    cls, sep = named["cls_token"], named["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    return backend


def unlike_bert(backend: Tokenizer) -> list[str]:
    """Returns the names of the tokenizer components in which `backend` differs from BERT's tokenizer."""
    model, normalizer = backend.model, backend.normalizer
    parts = {
        "normalizer": isinstance(normalizer, normalizers.BertNormalizer) and normalizer.clean_text,
        "pre_tokenizer": isinstance(backend.pre_tokenizer, pre_tokenizers.BertPreTokenizer),
        "model": (model.continuing_subword_prefix, model.max_input_chars_per_word) == ("##", 100),
        "post_processor": [backend.num_special_tokens_to_add(pair) for pair in (False, True)] == [2, 3],
    }
    return [name for name, is_bert in parts.items() if not is_bert]


def check_vocab(path: Path, vocab: Mapping[str, int], needed: Sequence[str]) -> None:
    """Raises `CheckpointError` if a vocabulary lacks a `needed` token or contains an invalid or duplicate id."""
    if missing := [token for token in needed if token not in vocab]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; expected a vocabulary that contains them.")
    if not all(type(id) is int and 0 <= id < 2**24 for id in vocab.values()):
        raise CheckpointError(f"{path} is damaged (a token id is not a whole number below 2^24); download it again.")
    if len(set(vocab.values())) < len(vocab):
        id, count = Counter(vocab.values()).most_common(1)[0]
        raise CheckpointError(f"{path} has the id {id} for {count} tokens; expected one token for each id.")
