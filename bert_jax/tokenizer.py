"""Converts texts to token ids, and token ids to NumPy arrays for a model.

The `tokenizers` library splits the texts into WordPiece tokens. Truncation and padding are arguments of each call, not
settings of a tokenizer, so threads can share a tokenizer.
"""

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, overload

import numpy as np
import tokenizers

from bert_jax import hub, porting
from bert_jax import tokenizer_files as files
from bert_jax.data.rows import lay_out, model_inputs
from bert_jax.errors import CheckpointError, InputError, quoted
from bert_jax.upload import PushToHub

logger = logging.getLogger(__name__)

Text = str | Sequence[str]
"""A text or, if the `is_split_into_words` argument is true, a list of words."""


class ModelInputs(TypedDict):
    """The model arguments for B texts, padded to T tokens. Each is an int32 array of shape [B, T]."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    token_type_ids: np.ndarray


class Tokenizer(PushToHub):
    """The tokenizer of a checkpoint.

    Attributes:
        backend: The underlying `tokenizers.Tokenizer`.
        vocab_size: The highest id plus one.
        model_max_length: The maximum number of tokens per row, including [CLS] and [SEP].
        special_tokens: Maps "mask_token", "pad_token", … to the tokens themselves, such as "[MASK]".
        mask_token: The token that stands for a word to predict.
        mask_token_id: The id of `mask_token`, or None if that token is not in the vocabulary. `pad_token_id`,
            `unk_token_id`, `cls_token_id` and `sep_token_id` are the ids of the other special tokens.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        model_max_length: int = 512,
        special_tokens: dict[str, str] = files.SPECIAL_TOKENS,
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.model_max_length = model_max_length
        self.special_tokens = files.SPECIAL_TOKENS | special_tokens
        self._copies: dict[tuple[int, int, str], tokenizers.Tokenizer] = {}
        self.vocab_size = max(backend.get_vocab().values()) + 1
        self.mask_token = self.special_tokens["mask_token"]
        self.mask_token_id, self.pad_token_id, self.unk_token_id, self.cls_token_id, self.sep_token_id = (
            backend.token_to_id(self.special_tokens[name])
            for name in ("mask_token", "pad_token", "unk_token", "cls_token", "sep_token")
        )

    @classmethod
    @porting.suggests(porting.TOKENIZER_FROM_PRETRAINED)
    def from_pretrained(cls, model_id: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """Reads a checkpoint's tokenizer from `tokenizer.json` or, if that file does not exist, from `vocab.txt`.

        This class reads the files in the same way as `transformers` 5. `tokenizer_config.json` determines the special
        tokens and, for BERT's tokenizer classes, `do_lower_case`, `strip_accents` and `tokenize_chinese_chars`. If that
        file contains `added_tokens_decoder`, no other file is read for added tokens. Otherwise, `added_tokens.json`,
        `tokenizer.json` and `special_tokens_map.json` are also read, and `special_tokens_map.json` overrides
        `tokenizer_config.json`.

        There is one difference from `transformers`. If `do_lower_case` is not set, the BERT tokenizer classes in
        `transformers` lowercase all text. In contrast, this class preserves case if `tokenizer.json` exists and does
        not lowercase text, or if `tokenizer.json` does not exist and the vocabulary contains capital letters. If this
        class preserves case for one of these reasons, it logs a warning.

        Args:
            model_id: A folder, the name of the embedded model (`bert-mini-cased`), or an id on the Hugging Face Hub.
            revision: The branch, tag or commit on the Hub.

        Raises:
            ModelNotFoundError: If the model does not exist.
            CheckpointError: If the tokenizer files are missing or damaged, or do not describe a WordPiece tokenizer.
        """
        folder = hub.download(model_id, revision=revision)
        settings, file = files.read_json(folder, "tokenizer_config.json"), files.read_json(folder, "tokenizer.json")
        added = {}
        # Older versions of `transformers` wrote the following two files instead of `added_tokens_decoder`.
        if settings.get("added_tokens_decoder") is None:
            settings |= files.read_json(folder, "special_tokens_map.json")
            added = files.read_json(folder, "added_tokens.json")
        try:
            limit = files.max_length_of(settings.get("model_max_length"))
            named = files.named_tokens(settings)
            tokens = files.declared_tokens(settings, added, file["added_tokens"] if file else [])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"tokenizer_config.json or tokenizer.json in {folder} is damaged ({quoted(error)}); download it again."
            ) from None
        name = settings.get("tokenizer_class")
        if name is None:
            name = hub.read_json(hub.config_file(folder)).get("tokenizer_class")
        kind = re.sub("(Tokenizer)?(Fast)?$", "", "Bert" if name is None else str(name))
        bert = kind in files.BERT_CLASSES
        if (folder / "tokenizer.json").is_file():
            backend = files.from_json(folder / "tokenizer.json", file, settings if bert else None, named)
            if not bert and kind not in files.GENERIC_CLASSES:
                logger.warning("%s is used as it is, not as a %s.", folder / "tokenizer.json", quoted(name))
        elif bert and (folder / "vocab.txt").is_file():
            backend = files.wordpiece(folder / "vocab.txt", files.read_vocab(folder / "vocab.txt"), settings, named)
        else:
            raise CheckpointError(
                f"{folder} has no tokenizer that this package supports (tokenizer_class: {quoted(name)}); expected "
                "tokenizer.json, or vocab.txt and a class such as BertTokenizer."
            )
        if bert:
            tokens += [
                (None, files.added_token(token)) for token in named.values() if backend.token_to_id(token) is not None
            ]
        backend.add_tokens([token for _, token in tokens])
        # Duplicate lines in a vocab.txt file leave ids unused, and an added token may then get the id of another token.
        # This check rejects a tokenizer in which two tokens have the same id.
        files.check_vocab(folder, backend.get_vocab(), [])
        if absent := [token for token in named.values() if backend.token_to_id(token) is None]:
            logger.warning("%s: the vocabulary has no %s, so texts cannot contain it.", folder, " and no ".join(absent))
        for id, token in tokens:
            if id not in (None, found := backend.token_to_id(token.content)):
                raise CheckpointError(
                    f"{folder} declares the id {id} for the added token {quoted(token.content)}, but the token gets "
                    f"the id {found}; the added tokens do not belong to its vocabulary."
                )
        return cls(backend, model_max_length=limit, special_tokens=named)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and `vocab.txt`, which `transformers` can also read.

        Raises:
            CheckpointError: If the folder cannot be written.
        """
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.model_max_length}
        if not files.unlike_bert(self.backend):
            settings |= {
                "tokenizer_class": "BertTokenizer",
                "do_lower_case": self.backend.normalizer.lowercase,
                "strip_accents": self.backend.normalizer.strip_accents,
                "tokenize_chinese_chars": self.backend.normalizer.handle_chinese_chars,
            }
        settings["added_tokens_decoder"] = {
            str(id): {"content": token.content, **{flag: getattr(token, flag) for flag in files.FLAGS}}
            for id, token in self.backend.get_added_tokens_decoder().items()
        }
        pieces = {id: piece for piece, id in self.backend.get_vocab(with_added_tokens=False).items()}
        for id in range(max(pieces), 0, -1):
            # A vocab.txt file may repeat a piece. Only the last line with the piece counts, so the ids of the earlier
            # lines have no piece. The new file needs a line for every id, so an id without a piece gets the piece of
            # the next id. This does not change the id of that piece, because only its last line counts.
            pieces.setdefault(id - 1, pieces[id])
        with hub.replacing(Path(folder)) as staging:
            self.backend.save(str(staging / "tokenizer.json"))
            (staging / "tokenizer_config.json").write_text(json.dumps(settings | self.special_tokens, indent=2) + "\n")
            (staging / "vocab.txt").write_text("".join(f"{pieces[id]}\n" for id in sorted(pieces)), encoding="utf-8")

    def add_tokens(self, tokens: Sequence[str], *, special: bool = False) -> int:
        """Adds tokens that the tokenizer never splits, such as domain terms or entity markers.

        Afterward, call `model.resize_embeddings(tokenizer.vocab_size)` before you create any pipelines.

        Args:
            tokens: The tokens. Tokens that the vocabulary already contains keep their ids.
            special: Whether the tokens are special, like [MASK]. `decode` can skip special tokens, and they are matched
                before normalization. Other tokens are matched after normalization, so a tokenizer that lowercases text
                matches them regardless of case.

        Returns:
            The number of tokens that the vocabulary did not contain.

        Raises:
            InputError: If a token is not a string, is blank or contains lone surrogates.
        """
        if not _are_words(tokens) or not all(token.strip() for token in tokens):
            raise InputError(f"tokens is {quoted(tokens)}; expected a list of strings that are not blank.")
        before = self.backend.get_vocab_size()
        try:
            self.backend.add_tokens([files.added_token(token, special=special) for token in tokens])
        except (TypeError, UnicodeEncodeError):
            raise InputError("a token contains lone surrogates such as \\udc80; remove them.") from None
        self._copies.clear()
        self.vocab_size = max(self.backend.get_vocab().values()) + 1
        return self.backend.get_vocab_size() - before

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token; None if the token is not in the vocabulary."""
        return self.backend.token_to_id(token)

    def get_vocab(self) -> dict[str, int]:
        """Returns a dict that maps all tokens, including added ones, to their ids."""
        vocab: dict[str, int] = self.backend.get_vocab()
        return vocab

    @overload
    def convert_tokens_to_ids(  # type: ignore[overload-overlap]  # a string is a sequence of strings
        self, tokens: str
    ) -> int | None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]: ...
    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """Returns the id of one token or the ids of several tokens.

        The id of a token that is not in the vocabulary is `unk_token_id`.
        """
        if isinstance(tokens, str):
            id = self.token_to_id(tokens)
            return self.unk_token_id if id is None else id
        return [self.convert_tokens_to_ids(token) for token in tokens]

    @overload
    def convert_ids_to_tokens(self, ids: int, *, skip_special_tokens: bool = False) -> str: ...
    @overload
    def convert_ids_to_tokens(
        self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False
    ) -> list[str]: ...
    def convert_ids_to_tokens(
        self, ids: int | Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False
    ) -> str | list[str]:
        """Returns the token with the given id, or the tokens with the given ids.

        Args:
            ids: One id or several ids.
            skip_special_tokens: Whether to leave out the `special_tokens`, such as [CLS], if several ids are given. As
                in `transformers`, special tokens added by `add_tokens` are kept. In contrast, `decode` leaves them out.

        Raises:
            InputError: If an id has no token.
        """
        if not isinstance(ids, int | np.integer):
            skipped = {self.token_to_id(token) for token in self.special_tokens.values()} if skip_special_tokens else ()
            return [self.convert_ids_to_tokens(int(id)) for id in ids if int(id) not in skipped]
        token: str | None = self.backend.id_to_token(int(ids)) if ids >= 0 else None
        if token is None:
            raise InputError(f"{ids} is not the id of a token; expected 0 to {self.vocab_size - 1}.")
        return token

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
    ) -> list[list[tokenizers.Encoding]]:
        """Tokenizes each text into one or more rows.

        A text that is longer than `max_length` is truncated to one row or, if `stride` is given, cut into overlapping
        rows, called windows.

        Args:
            text: Texts, or lists of words.
            text_pair: The second text of each pair; None if the texts are not paired.
            is_split_into_words: Whether the texts are lists of words. If so, `Encoding.word_ids` contains indices into
                these lists.
            add_special_tokens: Whether to add [CLS] and [SEP].
            max_length: The maximum number of tokens per row, including special tokens; None for no limit.
            stride: The number of tokens by which neighboring windows overlap; None keeps only the first window.
            truncate: Which text of a pair to truncate: the longer one ("longest_first"), or always the second
                ("only_second").

        Returns:
            A list of rows for each text. Each row is a `tokenizers.Encoding` with the attributes `ids`, `type_ids`,
            `tokens`, `offsets` (in characters), `word_ids`, `sequence_ids` and `special_tokens_mask`.

        Raises:
            InputError: If an entry of `text` or `text_pair` has the wrong type (the message gives the entry's index),
                if a text contains lone surrogates, if `text` and `text_pair` differ in length, or if `max_length`
                leaves no room for a text.
        """
        if truncate not in ("longest_first", "only_second"):
            raise InputError(f"truncate is {quoted(truncate)}; expected 'longest_first' or 'only_second'.")
        words = "a list of words" if is_split_into_words else "a text"
        for name, column in [("text", text), ("text_pair", text_pair or [])]:
            for i, entry in enumerate(column):
                if not (_are_words(entry) if is_split_into_words else isinstance(entry, str)):
                    raise InputError(f"{name}[{i}] is {quoted(entry)} ({type(entry).__name__}); expected {words}.")
        if text_pair is not None and len(text) != len(text_pair):
            raise InputError(f"There are {len(text)} texts and {len(text_pair)} second texts; expected equal numbers.")
        inputs: Any = list(text) if text_pair is None else list(zip(text, text_pair, strict=True))
        options = {"is_pretokenized": is_split_into_words, "add_special_tokens": add_special_tokens}
        try:
            rows = [[encoding] for encoding in self.backend.encode_batch(inputs, **options)]
        except TypeError:
            raise InputError("a text contains lone surrogates such as \\udc80; remove them.") from None
        if max_length is None:
            return rows
        room = max_length - self.backend.num_special_tokens_to_add(text_pair is not None) * add_special_tokens
        for i, (encoding,) in enumerate(rows):
            if len(encoding) > max_length:
                first, second = (encoding.sequence_ids.count(n) for n in (0, 1))
                kept = room - first if truncate == "only_second" else max(room - min(first, second), room // 2)
                # The `tokenizers` library would panic in this case.
                if kept <= (stride or 0):
                    raise InputError(
                        f"max_length={max_length} with stride={stride} leaves no room for text[{i}], which has "
                        f"{first + second} tokens. Raise max_length or lower stride."
                    )
                cut = self._truncating(max_length, stride or 0, truncate).encode_batch([inputs[i]], **options)[0]
                rows[i] = [cut] if stride is None else [cut, *cut.overflowing]
        return rows

    def _truncating(self, max_length: int, stride: int, strategy: str) -> tokenizers.Tokenizer:
        """Returns a copy of the backend that truncates texts.

        Threads share the backend, so the settings of the backend itself must not change.
        """
        key = (max_length, stride, strategy)
        if key not in self._copies:
            copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
            copy.enable_truncation(max_length, stride=stride, strategy=strategy)
            self._copies[key] = copy
        return self._copies[key]

    @porting.suggests(porting.TOKENIZER)
    def __call__(
        self,
        text: Text | Sequence[Text],
        text_pair: Text | Sequence[Text] | None = None,
        *,
        is_split_into_words: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        length: int | None = None,
    ) -> ModelInputs:
        """Tokenizes and pads texts for a model: `model(**tokenizer(["Paris is the [MASK] of France."]))`.

        Args:
            text: One text or several.
            text_pair: The second text of each pair.
            is_split_into_words: Whether the texts are lists of words.
            truncation: Whether to truncate rows that are too long. If false, such rows are rejected.
            max_length: The maximum number of tokens per row; `model_max_length` by default.
            length: The number of tokens to pad to; by default, the length of the longest row.

        Returns:
            `input_ids`, `attention_mask` and `token_type_ids`, each int32 [B, T].

        Raises:
            InputError: If there is no text, if a row is too long, if `truncation` is not a bool, or if `encode` raises
                this error.
        """
        if not isinstance(truncation, bool):
            raise InputError(
                f"truncation is {quoted(truncation)}; expected True, which cuts the longest text of a pair first, or "
                "False. `encode` can cut the second text."
            )
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
    ) -> ModelInputs:
        """Pads rows of token ids to the same length and returns them as arrays.

        Args:
            ids: The token ids of each row.
            type_ids: The token types of each row.
            length: The number of tokens to pad to; by default, the length of the longest row.
            rows: The minimum number of rows in the result. If `ids` contains fewer rows, padding rows are added.

        Returns:
            `input_ids`, `attention_mask` and `token_type_ids`, each int32 [B, T].

        Raises:
            InputError: If a row is longer than `length`.
        """
        longest = max(len(row) for row in ids)
        length = longest if length is None else length
        if longest > length:
            raise InputError(f"A row has {longest} tokens; cannot pad to length={length}.")
        spots = lay_out(range(len(ids)), range(len(ids)), map(len, ids))
        inputs: Any = model_inputs(
            spots, ids, type_ids, (max(rows, len(ids)), length), packed=False, pad_token_id=self.pad_token_id or 0
        )
        padded: ModelInputs = inputs
        return padded

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """Converts token ids to text, joining the pieces of words and removing spaces before punctuation."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Sequence[Sequence[int]] | np.ndarray, *, skip_special_tokens: bool = False
    ) -> list[str]:
        """Converts rows of token ids to texts by applying `decode` to each row."""
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in sequences]


def _are_words(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and all(isinstance(word, str) for word in entry)
