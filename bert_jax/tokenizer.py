"""Text -> token ids: WordPiece by the `tokenizers` library, made into numpy inputs.

Nothing here is stateful: truncation and padding are arguments of a call and not settings of the tokenizer, so that
threads can share one.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from tokenizers import Encoding, decoders, models, normalizers, pre_tokenizers, processors

from bert_jax import hub
from bert_jax.errors import CheckpointError, InputError

SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}

Text = str | Sequence[str]
"""A text, or a list of words where `is_split_into_words`."""


class Tokenizer:
    """The tokenizer of a checkpoint.

    Attributes:
        backend: The `tokenizers.Tokenizer` inside.
        vocab_size: One more than the highest id.
        model_max_length: Tokens that a row may have, [CLS] and [SEP] included.
        special_tokens: "mask_token", "pad_token", … -> the token as it is written in a text.
        mask_token: The token that stands for a word to be filled in.
        mask_token_id: And `pad_token_id`, `unk_token_id`, `cls_token_id`, `sep_token_id`: None where the vocabulary
            has no such token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        model_max_length: int = 512,
        special_tokens: dict[str, str] = SPECIAL_TOKENS,
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.model_max_length = model_max_length
        self.special_tokens = {**SPECIAL_TOKENS, **special_tokens}
        self._copies: dict[tuple[int, int, str], tokenizers.Tokenizer] = {}
        self.vocab_size = max(backend.get_vocab().values()) + 1
        self.mask_token = self.special_tokens["mask_token"]
        self.mask_token_id, self.pad_token_id, self.unk_token_id, self.cls_token_id, self.sep_token_id = (
            backend.token_to_id(self.special_tokens[name])
            for name in ("mask_token", "pad_token", "unk_token", "cls_token", "sep_token")
        )

    @classmethod
    def from_pretrained(cls, model_id: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """The tokenizer of a checkpoint, from its `tokenizer.json` or, without one, its `vocab.txt`.

        `tokenizer_config.json` has the last word on `do_lower_case`, `strip_accents`, `tokenize_chinese_chars` and
        the special tokens. Where nothing says whether to lower-case, the vocabulary does: one that holds capital
        letters is cased.

        Args:
            model_id: A folder, an id on the Hugging Face Hub, or `bert-mini-cased`.
            revision: Branch, tag or commit on the Hub.

        Raises:
            ModelNotFoundError: If there is no such model.
            CheckpointError: If it has no tokenizer files, or they are damaged.
        """
        folder = hub.download(model_id, revision=revision)
        settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        try:
            written = {name: settings[name] for name in SPECIAL_TOKENS if settings.get(name) is not None}
            special = {name: token["content"] if isinstance(token, dict) else token for name, token in written.items()}
            if odd := [token for token in special.values() if not isinstance(token, str)]:
                raise TypeError(f"{odd[0]!r} is no token")
            # A tokenizer without a limit of its own is saved with one of 10^30.
            limit = min(int(settings.get("model_max_length") or 512), 10**6)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'} is damaged ({error!r}); download it again."
            ) from None
        if (folder / "tokenizer.json").is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the library raises nothing narrower
                raise CheckpointError(f"{folder / 'tokenizer.json'} is damaged ({error}); download it again.") from None
            if isinstance(backend.normalizer, normalizers.BertNormalizer):
                backend.normalizer = _normalizer(settings, backend.normalizer)
        elif (folder / "vocab.txt").is_file():
            backend = _wordpiece(folder / "vocab.txt", settings, {**SPECIAL_TOKENS, **special})
        else:
            raise CheckpointError(f"{folder} has no tokenizer; expected tokenizer.json or vocab.txt.")
        return cls(backend, model_max_length=limit, special_tokens=special)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and `vocab.txt`, for this class and for transformers.

        Raises:
            CheckpointError: If the folder cannot be written.
        """
        settings: dict[str, Any] = {"tokenizer_class": "BertTokenizer", "model_max_length": self.model_max_length}
        normalizer = self.backend.normalizer
        if isinstance(normalizer, normalizers.BertNormalizer):
            settings["do_lower_case"] = normalizer.lowercase
            settings["strip_accents"] = normalizer.strip_accents
            settings["tokenize_chinese_chars"] = normalizer.handle_chinese_chars
        vocab = sorted(self.backend.get_vocab().items(), key=lambda entry: entry[1])
        with hub.replacing(Path(folder)) as staging:
            self.backend.save(str(staging / "tokenizer.json"))
            (staging / "tokenizer_config.json").write_text(json.dumps(settings | self.special_tokens, indent=2) + "\n")
            (staging / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in vocab), encoding="utf-8")

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece of the vocabulary, None if it is none."""
        return self.backend.token_to_id(token)

    def encode(
        self,
        text: Sequence[Text],
        text_pair: Sequence[Text] | None = None,
        *,
        is_split_into_words: bool = False,
        add_special_tokens: bool = True,
        max_length: int | None = None,
        stride: int | None = None,
        truncate: str = "longest_first",
    ) -> list[list[Encoding]]:
        """Tokenizes texts, each into one row or, with a stride, into overlapping windows.

        Args:
            text: Texts, or lists of words.
            text_pair: A second text to each.
            is_split_into_words: The texts are lists of words; `Encoding.word_ids` index these.
            add_special_tokens: Puts [CLS] and [SEP] around.
            max_length: Tokens a row may have, special ones included; None for no limit.
            stride: Tokens by which neighbouring windows overlap; None keeps the first window alone.
            truncate: Which text of a pair gives way: "longest_first" or "only_second".

        Returns:
            For each text its `tokenizers.Encoding`s: ids, type_ids, tokens, offsets (characters), word_ids,
            sequence_ids, special_tokens_mask.

        Raises:
            InputError: If something is no text (its index is named), or max_length leaves no room.
        """
        if truncate not in ("longest_first", "only_second"):
            raise InputError(f"truncate is {truncate!r}; expected 'longest_first' or 'only_second'.")
        words = "a list of words" if is_split_into_words else "a text"
        for name, column in [("text", text), ("text_pair", text_pair or [])]:
            for i, entry in enumerate(column):
                if not (_are_words(entry) if is_split_into_words else isinstance(entry, str)):
                    raise InputError(f"{name}[{i}] is {_shown(entry)}; expected {words}.")
        if text_pair is not None and len(text) != len(text_pair):
            raise InputError(f"There are {len(text)} texts and {len(text_pair)} second texts; expected one to each.")
        inputs: Any = list(text) if text_pair is None else list(zip(text, text_pair, strict=True))
        options = {"is_pretokenized": is_split_into_words, "add_special_tokens": add_special_tokens}
        try:
            rows = [[encoding] for encoding in self.backend.encode_batch(inputs, **options)]
        except TypeError:
            raise InputError("a text holds lone surrogates, like \\udc80, which stand for no character.") from None
        if max_length is None:
            return rows
        room = max_length - self.backend.num_special_tokens_to_add(text_pair is not None) * add_special_tokens
        for i, (encoding,) in enumerate(rows):
            if len(encoding) <= max_length:
                continue
            # The library panics where a cut text would keep no more than the stride.
            lengths = [encoding.sequence_ids.count(n) for n in range(1 if text_pair is None else 2)]
            if text_pair is None:
                kept = room
            elif truncate == "only_second":
                kept = room - lengths[0]
            else:
                kept = max(room - min(lengths), room // 2)
            if kept <= (stride or 0):
                raise InputError(
                    f"max_length={max_length} with stride={stride} leaves no room for text[{i}], which has "
                    f"{' and '.join(map(str, lengths))} tokens. Raise max_length or lower stride."
                )
            cut = self._truncating(max_length, stride or 0, truncate).encode_batch([inputs[i]], **options)[0]
            rows[i] = [cut] if stride is None else [cut, *cut.overflowing]
        return rows

    def _truncating(self, max_length: int, stride: int, strategy: str) -> tokenizers.Tokenizer:
        """A copy of the backend that truncates: to it that is a setting, which threads must not share."""
        key = (max_length, stride, strategy)
        if key not in self._copies:
            copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
            copy.enable_truncation(max_length, stride=stride, strategy=strategy)
            self._copies[key] = copy
        return self._copies[key]

    def __call__(
        self,
        text: Text | Sequence[Text],
        text_pair: Text | Sequence[Text] | None = None,
        *,
        is_split_into_words: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        length: int | None = None,
    ) -> dict[str, np.ndarray]:
        """The inputs of a model: `model(**tokenizer(["Paris is the [MASK] of France."]))`.

        Args:
            text: A text or several.
            text_pair: A second text to each.
            is_split_into_words: The texts are lists of words.
            truncation: Cuts rows that are too long; without it they are refused.
            max_length: Tokens a row may have; `model_max_length` by default.
            length: Tokens to pad to; the longest row's by default.

        Returns:
            `input_ids`, `attention_mask` and `token_type_ids`, each int32 [B, T].

        Raises:
            InputError: If there is no text, or a row is too long.
        """
        single = isinstance(text, str) or (is_split_into_words and _are_words(text) and len(text) > 0)
        texts: Any = [text] if single else text
        pairs: Any = [text_pair] if single and text_pair is not None else text_pair
        if not len(texts):
            raise InputError("There is no text.")
        limit = self.model_max_length if max_length is None else max_length
        rows = self.encode(
            texts, pairs, is_split_into_words=is_split_into_words, max_length=limit if truncation else None
        )
        for i, (row, *_) in enumerate(rows):
            if len(row) > limit:
                raise InputError(f"text[{i}] has {len(row)} tokens; the limit is {limit}. Pass truncation=True to cut.")
        return self.pad([row.ids for row, *_ in rows], [row.type_ids for row, *_ in rows], length=length)

    def pad(
        self,
        ids: Sequence[Sequence[int]],
        type_ids: Sequence[Sequence[int]],
        *,
        length: int | None = None,
        rows: int = 0,
    ) -> dict[str, np.ndarray]:
        """Rows of ids -> a rectangle.

        Args:
            ids: Token ids, row by row.
            type_ids: Token types, likewise.
            length: Tokens to pad to; the longest row's by default.
            rows: Rows to pad to; added rows attend to nothing.

        Returns:
            `input_ids`, `attention_mask` and `token_type_ids`, each int32 [rows, length].

        Raises:
            InputError: If a row is longer than `length`.
        """
        longest = max(len(row) for row in ids)
        length = longest if length is None else length
        if longest > length:
            raise InputError(f"A row has {longest} tokens; cannot pad to length={length}.")
        shape = (max(rows, len(ids)), length)
        inputs = {
            "input_ids": np.full(shape, self.pad_token_id or 0, np.int32),
            "attention_mask": np.zeros(shape, np.int32),
            "token_type_ids": np.zeros(shape, np.int32),
        }
        for i, (row, types) in enumerate(zip(ids, type_ids, strict=True)):
            inputs["input_ids"][i, : len(row)] = row
            inputs["attention_mask"][i, : len(row)] = 1
            inputs["token_type_ids"][i, : len(row)] = types
        return inputs

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids: pieces joined, spaces before punctuation taken out."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


def _wordpiece(vocab_file: Path, settings: dict[str, Any], special: dict[str, str]) -> tokenizers.Tokenizer:
    """The tokenizer of google-research/bert tokenization.py over a vocabulary, a piece a line."""
    try:
        pieces = vocab_file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{vocab_file} is damaged ({error}); download it again.") from None
    if pieces[-1] == "":
        pieces.pop()
    vocab = {piece.rstrip("\r"): i for i, piece in enumerate(pieces)}
    if missing := [special[name] for name in ("unk_token", "cls_token", "sep_token") if special[name] not in vocab]:
        raise CheckpointError(f"{vocab_file} lacks {', '.join(missing)}; a tokenizer cannot do without.")
    if settings.get("do_lower_case") is None:
        cased = any(piece != piece.lower() for piece in vocab if piece not in special.values() and piece[:1] != "[")
        settings = {**settings, "do_lower_case": not cased}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=special["unk_token"]))
    backend.normalizer = _normalizer(settings, normalizers.BertNormalizer(lowercase=False))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    cls, sep = special["cls_token"], special["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    backend.add_special_tokens([token for token in special.values() if token in vocab])
    return backend


def _normalizer(settings: dict[str, Any], default: normalizers.BertNormalizer) -> normalizers.BertNormalizer:
    """BERT's normalizer, by tokenizer_config.json where that speaks and else as it was."""

    def setting(name: str, default: Any) -> Any:
        return settings[name] if settings.get(name) is not None else default

    return normalizers.BertNormalizer(
        clean_text=default.clean_text,
        handle_chinese_chars=setting("tokenize_chinese_chars", default.handle_chinese_chars),
        strip_accents=setting("strip_accents", default.strip_accents),
        lowercase=setting("do_lower_case", default.lowercase),
    )


def _are_words(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and all(isinstance(word, str) for word in entry)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '…'} ({type(value).__name__})"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); download it again.") from None
