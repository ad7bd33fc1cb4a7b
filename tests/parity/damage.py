"""Some five hundred damaged or unusual checkpoints. They are seeded: the same on every machine.

Each is a small BERT in the published naming, with the tokenizer files that published checkpoints have, and one thing in
it is changed: bytes are cut or flipped at random, or a file says what it should not say.
"""

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes  # teaches numpy, and so safetensors, the name bfloat16
import numpy as np
import reference
from safetensors.numpy import load, save

Apply = Callable[[Path, random.Random], Any]

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
VOCAB, TOKENIZER, SETTINGS = "vocab.txt", "tokenizer.json", "tokenizer_config.json"
SPECIALS, ADDED = "special_tokens_map.json", "added_tokens.json"
SHARD = "model-0000{}-of-00003.safetensors"

SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = """the The cat Cat sat on mat café cafe naïve ##s ##ing ##é
. , ! ' [ ] / ( ) ## # 1 中 国 猫 é É ß ω 🙂 \u0301"""
ENTITIES = ["[E1]", "[/E1]"]  # added behind the vocabulary, as relation extraction adds its markers


@dataclass(frozen=True)
class Damage:
    """One change of one checkpoint."""

    kind: str
    name: str
    form: str
    """The form of the undamaged checkpoint, one of `FORMS`."""
    apply: Apply
    """Changes the folder."""
    expected: str = ""
    """What must come of it:

    - "refused";
    - "equal": it loads with the numbers of the undamaged checkpoint;
    - "said": it does, and the log says what was mended;
    - "undetected": nobody can detect the damage, so it may load with other numbers, if they are transformers' too;
    - "": refused, equal or said.
    """

    def __str__(self) -> str:
        return f"{self.kind}: {self.name} ({self.form})"

    def write(self, folder: Path) -> None:
        """Writes the damaged checkpoint."""
        write(self.form, folder)
        self.apply(folder, random.Random(str(self)))


# ── What is damaged ──────────────────────────────────────────────────────────────────────────────────────────────────

FORMS = {  # name -> lower-cases, its tokenizer's files
    "cased": (False, (VOCAB, TOKENIZER, SETTINGS, SPECIALS, ADDED)),
    "uncased": (True, (VOCAB, TOKENIZER, SETTINGS, SPECIALS, ADDED)),
    "sharded": (False, (VOCAB, TOKENIZER, SETTINGS, SPECIALS, ADDED)),
    "vocab": (False, (VOCAB, SETTINGS, SPECIALS, ADDED)),
    "uncased vocab": (True, (VOCAB, SETTINGS, SPECIALS, ADDED)),
    "plain vocab": (False, (VOCAB, SETTINGS)),
    "json": (False, (TOKENIZER, SETTINGS)),
}


def vocabulary(lower: bool) -> list[str]:
    """Pieces in the order of their ids."""
    pieces = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    pieces += [] if lower else LETTERS.upper()
    return list(dict.fromkeys([*pieces, *(word for word in WORDS.split() if not lower or word == word.lower())]))


@cache
def files(form: str) -> dict[str, bytes]:
    """The undamaged checkpoint: file name -> content."""
    lower, kept = FORMS[form]
    pieces = vocabulary(lower)
    added = [] if form == "plain vocab" else ENTITIES
    config = reference.CONFIG | {
        "architectures": ["BertForMaskedLM"],
        "num_hidden_layers": 2,
        "vocab_size": len(pieces) + len(added),
        "max_position_embeddings": 160,
    }
    declared = [{"id": i, "content": token, "special": True} for i, token in enumerate(pieces[:6]) if i != 1]
    declared += [{"id": len(pieces) + i, "content": token, "special": False} for i, token in enumerate(added)]
    for token in declared:
        token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not token["special"]}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": declared,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": lower,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special("[CLS]", 0), _sequence("A", 0), _special("[SEP]", 0)],
            "pair": [
                _special("[CLS]", 0), _sequence("A", 0), _special("[SEP]", 0), _sequence("B", 1), _special("[SEP]", 1),
            ],
            "special_tokens": {
                token: {"id": token, "ids": [pieces.index(token)], "tokens": [token]} for token in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
        },
    }  # fmt: skip
    settings = {"do_lower_case": lower, "model_max_length": 160, "tokenizer_class": "BertTokenizer"}
    if TOKENIZER not in kept:
        settings |= SPECIAL_TOKENS
    contents = {
        VOCAB: "".join(f"{piece}\n" for piece in pieces),
        TOKENIZER: json.dumps(tokenizer, ensure_ascii=False),
        SETTINGS: json.dumps(settings),
        SPECIALS: json.dumps(SPECIAL_TOKENS),
        ADDED: json.dumps({token: len(pieces) + i for i, token in enumerate(added)}),
    }
    found = {name: contents[name].encode() for name in kept} | {CONFIG: json.dumps(config).encode()}
    named = reference.tensors("BertForPreTraining", config)
    if form != "sharded":
        return found | {WEIGHTS: _safetensors(named)}
    shards = {SHARD.format(n + 1): sorted(named)[n::3] for n in range(3)}
    found |= {file: _safetensors({name: named[name] for name in names}) for file, names in shards.items()}
    size = sum(tensor.nbytes for tensor in named.values())
    weight_map = {name: file for file, names in shards.items() for name in names}
    return found | {INDEX: json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}).encode()}


def write(form: str, folder: Path) -> None:
    """Writes the undamaged checkpoint."""
    folder.mkdir(parents=True)
    for name, content in files(form).items():
        (folder / name).write_bytes(content)


def _special(token: str, type_id: int) -> dict:
    return {"SpecialToken": {"id": token, "type_id": type_id}}


def _sequence(name: str, type_id: int) -> dict:
    return {"Sequence": {"id": name, "type_id": type_id}}


def _safetensors(named: dict[str, np.ndarray]) -> bytes:
    return save(named, metadata={"format": "pt"})


# ── Ways to damage ───────────────────────────────────────────────────────────────────────────────────────────────────


def content(file: str, change: Callable[[bytes, random.Random], bytes]) -> Apply:
    """The file's bytes, changed."""
    return lambda folder, rng: (folder / file).write_bytes(change((folder / file).read_bytes(), rng))


def text(file: str, change: Callable[[str], str]) -> Apply:
    """The file's text, changed."""
    return content(file, lambda old, _: change(old.decode()).encode("utf-8", "surrogatepass"))


def lines(change: Callable[[list[str]], list[str]], end: str = "\n") -> Apply:
    """The vocabulary's lines, changed."""
    return text(VOCAB, lambda old: "".join(piece + end for piece in change(old.splitlines())))


def edited(file: str, change: Callable[[Any], Any]) -> Apply:
    """The JSON file, its content changed in place, or replaced by what is returned."""

    def change_text(old: str) -> str:
        parsed = json.loads(old)
        instead = change(parsed)
        return json.dumps(parsed if instead is None else instead)

    return text(file, change_text)


def with_keys(file: str, **keys: Any) -> Apply:
    """The JSON file with these keys."""
    return edited(file, lambda old: old.update(keys))


def without(file: str, *keys: str) -> Apply:
    """The JSON file without these keys."""
    return edited(file, lambda old: [old.pop(key) for key in keys] and None)


def raw(file: str, key: str, literal: str) -> Apply:
    """The JSON file with a value that Python would not write, as text."""

    def change(old: str) -> str:
        others = {name: value for name, value in json.loads(old).items() if name != key}
        return f'{json.dumps(others)[:-1]}, "{key}": {literal}}}'

    return text(file, change)


def tensors(change: Callable[[dict[str, np.ndarray]], Any], file: str = WEIGHTS) -> Apply:
    """The weights, changed in place, or replaced by those that are returned."""

    def change_bytes(old: bytes, _: random.Random) -> bytes:
        named = load(old)
        instead = change(named)
        return _safetensors(instead if isinstance(instead, dict) else named)

    return content(file, change_bytes)


def header(change: Callable[[dict], Any]) -> Apply:
    """The header of the weights, changed in place, or replaced by what is returned; the data stay."""

    def change_bytes(old: bytes, _: random.Random) -> bytes:
        (length,) = struct.unpack("<Q", old[:8])
        parsed = json.loads(old[8 : 8 + length])
        instead = change(parsed)
        new = instead if isinstance(instead, bytes) else json.dumps(parsed if instead is None else instead).encode()
        return struct.pack("<Q", len(new)) + new + old[8 + length :]

    return content(WEIGHTS, change_bytes)


def header_length(length: Callable[[int], int]) -> Apply:
    def change(old: bytes, _: random.Random) -> bytes:
        return struct.pack("<Q", length(struct.unpack("<Q", old[:8])[0])) + old[8:]

    return content(WEIGHTS, change)


def flipped(start: int = 0, end: int | None = None) -> Callable[[bytes, random.Random], bytes]:
    """One bit of these bytes, at random."""

    def flip(old: bytes, rng: random.Random) -> bytes:
        new = bytearray(old)
        new[rng.randrange(start, len(old) if end is None else end)] ^= 1 << rng.randrange(8)
        return bytes(new)

    return flip


def cut(old: bytes, rng: random.Random) -> bytes:
    """The bytes before a random one."""
    return old[: rng.randrange(len(old))]


def with_value(
    name: str, where: tuple[int, ...] | slice, value: float, dtype: str = "float32", file: str = WEIGHTS
) -> Apply:
    """One tensor with another value in some places."""

    def change(named: dict[str, np.ndarray]) -> None:
        named[name] = named[name].astype(dtype)
        with np.errstate(over="ignore"):
            named[name][where] = value

    return tensors(change, file)


def renamed(change: Callable[[str], str]) -> Apply:
    return tensors(lambda named: {change(name): tensor for name, tensor in named.items()})


def swapped(one: str, other: str) -> Apply:
    return tensors(lambda named: named.update({one: named[other], other: named[one]}))


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Apply:
    """One tensor, changed."""
    return tensors(lambda named: named.update({name: np.ascontiguousarray(change(named[name]))}))


def mapped(change: Callable[[dict[str, str]], Any]) -> Apply:
    """The map of the index, changed in place, or replaced by what is returned."""

    def apply(index: dict) -> None:
        instead = change(index["weight_map"])
        if instead is not None:
            index["weight_map"] = instead

    return edited(INDEX, apply)


def shard_named(name: Any) -> Apply:
    """The index says that the first tensor is in this file."""
    return mapped(lambda weight_map: weight_map.update({next(iter(weight_map)): name}))


def first_shard(instead: Callable[[Path, Path], Any], names: str | None = None) -> Apply:
    """The first shard is moved out of the folder.

    Args:
        instead: Puts something in its place; called with the old and the new path of the shard.
        names: The shard's new name in the index; "{0}" stands for the new path.
    """

    def apply(folder: Path, rng: random.Random) -> None:
        stood, now = folder / SHARD.format(1), folder.parent / f"{folder.name}-outside.safetensors"
        stood.rename(now)
        instead(stood, now)
        if names is not None:
            index = (folder / INDEX).read_text()
            (folder / INDEX).write_text(index.replace(stood.name, names.format(now)))

    return apply


def with_shards(folder: Path, _: random.Random) -> None:
    """Shards and their index beside what is there."""
    for name, content_ in files("sharded").items():
        if name.startswith("model"):
            (folder / name).write_bytes(content_)


def both(*changes: Apply) -> Apply:
    def apply(folder: Path, rng: random.Random) -> None:
        for change in changes:
            change(folder, rng)

    return apply


# ── All of them ──────────────────────────────────────────────────────────────────────────────────────────────────────

WORD = "bert.embeddings.word_embeddings.weight"
QUERY, KEY = (f"bert.encoder.layer.1.attention.self.{name}.weight" for name in ("query", "key"))
INNER, OUTER = (f"bert.encoder.layer.1.{name}.dense.weight" for name in ("intermediate", "output"))
NORM = "bert.encoder.layer.0.output.LayerNorm."
POOLER, BIAS, DECODER = "bert.pooler.dense.bias", "cls.predictions.bias", "cls.predictions.decoder."
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "x" * 5000


def damages() -> list[Damage]:
    """All of them, in the same order every time."""
    kinds = [truncated, bits, values, not_regular, links, headers, names, types, not_finite, index, config]
    kinds += [vocab_txt, tokenizer_json, tokenizer_config, special_tokens_map, added_tokens]
    found = [damage for kind in kinds for damage in kind()]
    assert len({str(damage) for damage in found}) == len(found), "two have one name"
    return found


def each(kind: str, form: str, expected: str, changes: dict[str, Apply]) -> Iterator[Damage]:
    for name, apply in changes.items():
        yield Damage(kind, name, form, apply, expected)


def truncated() -> Iterator[Damage]:
    times = [(WEIGHTS, "cased", 4), (SHARD.format(2), "sharded", 2), (INDEX, "sharded", 2), (CONFIG, "cased", 2)]
    times += [(TOKENIZER, "cased", 3), (SETTINGS, "cased", 2), (SPECIALS, "vocab", 1), (ADDED, "vocab", 1)]
    times += [(VOCAB, "vocab", 2), (VOCAB, "cased", 1)]
    for file, form, n in times:
        for i in range(n):
            # Beside tokenizer.json, vocab.txt is not read.
            yield Damage("truncated", f"{file} {i}", form, content(file, cut), "" if file == VOCAB else "refused")
    for file, form in [(WEIGHTS, "cased"), (CONFIG, "cased"), (VOCAB, "vocab"), (TOKENIZER, "json")]:
        yield Damage("truncated", f"{file} empty", form, content(file, lambda old, rng: b""), "refused")


def bits() -> Iterator[Damage]:
    places = [(WEIGHTS, "cased", 0, 8, 2), (WEIGHTS, "cased", 8, 4000, 5), (WEIGHTS, "cased", 8000, 16000, 3)]
    places += [(CONFIG, "cased", 0, None, 4), (INDEX, "sharded", 0, None, 3), (TOKENIZER, "json", 0, None, 5)]
    places += [(VOCAB, "vocab", 0, None, 4), (SETTINGS, "vocab", 0, None, 2), (ADDED, "vocab", 0, None, 1)]
    for file, form, start, end, n in places:
        for i in range(n):
            yield Damage("bit flipped", f"{file} {start} {i}", form, content(file, flipped(start, end)), "undetected")


def values() -> Iterator[Damage]:
    """A key or a list's entry is gone, or has a value of another kind."""
    others: list[Any] = [None, True, False, 0, 1, -1, 7, 10**9, 0.5, float("nan"), "", "x", "[MASK]", "cat", [], {}]
    others += [["cat"], {"a": 1}]

    def apply(file: str) -> Apply:
        def change(old: bytes, rng: random.Random) -> bytes:
            parsed = json.loads(old)
            parent, key = rng.choice(_places(parsed))
            if rng.randrange(3):
                parent[key] = rng.choice(others)
            else:
                del parent[key]
            return json.dumps(parsed).encode()

        return content(file, change)

    places = [(TOKENIZER, "json", 16), (TOKENIZER, "cased", 4), (SETTINGS, "plain vocab", 12), (SETTINGS, "json", 4)]
    places += [(SPECIALS, "vocab", 4), (CONFIG, "cased", 16), (INDEX, "sharded", 4)]
    for file, form, n in places:
        for i in range(n):
            yield Damage("value changed", f"{file} {i}", form, apply(file), "undetected")


def _places(parsed: Any) -> list[tuple[Any, Any]]:
    """Each object or list in a JSON value with each key in it; of a vocabulary the first few."""
    if not isinstance(parsed, dict | list):
        return []
    found = []
    for key in range(len(parsed)) if isinstance(parsed, list) else list(parsed)[:20]:
        found += [(parsed, key), *_places(parsed[key])]
    return found


def not_regular() -> Iterator[Damage]:
    """Something that is no file has a file's name. Opening a pipe never returns."""
    files = [(WEIGHTS, "cased"), (INDEX, "sharded"), (SHARD.format(1), "sharded"), (CONFIG, "cased"), (VOCAB, "vocab")]
    files += [(TOKENIZER, "json"), (SETTINGS, "vocab"), (SPECIALS, "vocab"), (ADDED, "vocab")]
    ways: dict[str, Callable[[Path], None]] = {
        "a folder": lambda path: path.mkdir(),
        "a pipe": lambda path: os.mkfifo(path),
        "a link to nothing": lambda path: path.symlink_to("nowhere"),
    }
    for file, form in files:
        for name, make in ways.items():

            def apply(folder: Path, _: random.Random, file: str = file, make: Callable[[Path], None] = make) -> None:
                (folder / file).unlink()
                make(folder / file)

            yield Damage("not a file", f"{file} {name}", form, apply, "refused")


def links() -> Iterator[Damage]:
    """All files are links, as in the Hub's cache: `snapshots/COMMIT/NAME` to `blobs/HASH`."""

    def apply(folder: Path, _: random.Random) -> None:
        blobs = folder.parent / f"{folder.name}-models--someone--bert" / "blobs"
        snapshot = blobs.parent / "snapshots" / "5532cc5"
        blobs.mkdir(parents=True)
        snapshot.parent.mkdir()
        for i, path in enumerate(sorted(folder.iterdir())):
            path.rename(blobs / str(i))
            path.symlink_to(f"../../blobs/{i}")
        folder.rename(snapshot)
        folder.symlink_to(snapshot)

    for form in ("cased", "sharded"):
        yield Damage("links", "all, as in the Hub's cache", form, apply, "equal")


def headers() -> Iterator[Damage]:
    yield from each("header", "cased", "refused", {
        "length 0": header_length(lambda n: 0),
        "length one less": header_length(lambda n: n - 1),
        "length over the file's": header_length(lambda n: 10**6),
        "length 2^63": header_length(lambda n: 2**63),
        "a list": header(lambda h: b"[1, 2]"),
        "nested 100,000 deep": header(lambda h: DEEP.encode()),
        "dtype unknown": header(lambda h: h[QUERY].update(dtype="F31")),
        "offsets behind the end": header(lambda h: h[QUERY].update(data_offsets=[10**9, 10**9 + 256])),
        "offsets overlap": header(lambda h: h[QUERY].update(data_offsets=h[KEY]["data_offsets"])),
        "shape over its bytes": header(lambda h: h[QUERY].update(shape=[80, 80])),
        "shape negative": header(lambda h: h[QUERY].update(shape=[-8, -8])),
        "shape overflows": header(lambda h: h[QUERY].update(shape=[2**32, 2**32 + 1])),
        "a name twice": header(lambda h: json.dumps(h).replace(KEY, QUERY).encode()),
        "no tensor": content(WEIGHTS, lambda old, rng: struct.pack("<Q", 2) + b"{}"),
        "of git lfs": content(WEIGHTS, lambda old, rng: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "of HTML": content(WEIGHTS, lambda old, rng: b"<!DOCTYPE html><html><body>404</body></html>" * 50),
    })  # fmt: skip


def names() -> Iterator[Damage]:
    def added(**tensors_: np.ndarray) -> Apply:
        return tensors(lambda named: named.update({name.replace("__", "."): x for name, x in tensors_.items()}))

    def another_layer(named: dict[str, np.ndarray]) -> None:
        named |= {name.replace(".1.", ".2."): x for name, x in named.items() if ".layer.1." in name}

    def met(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {f"{prefix}{name}": x for prefix in ("module.", "model.") for name, x in named.items()}

    yield from each("names", "cased", "refused", {
        "a weight gone": tensors(lambda named: named.pop(QUERY)),
        "a norm gone": tensors(lambda named: named.pop(NORM + "weight")),
        "word embeddings gone": tensors(lambda named: named.pop(WORD)),
        "the head's bias gone": tensors(lambda named: named.pop(BIAS)),
        "weight and gamma": tensors(lambda named: named.update({NORM + "gamma": named[NORM + "weight"]})),
        "with bert. and without": tensors(lambda named: named.update({QUERY[5:]: named[QUERY]})),
        "decoder not tied": tensors(lambda named: named.update({DECODER + "weight": named[WORD] + 1})),
        "decoder's bias not tied": tensors(lambda named: named.update({DECODER + "bias": named[BIAS] + 1})),
        "unlike shapes swapped": swapped(INNER, OUTER),
        "a layer more": tensors(another_layer),
        "a layer 01": renamed(lambda name: name.replace(".layer.1.", ".layer.01.")),
        "layers 0 and 2": renamed(lambda name: name.replace(".layer.1.", ".layer.2.")),
        "unknown": added(loss_fct__weight=np.ones(2, np.float32)),
        "unknown, of 5,000 characters": added(**{LONG: np.ones(2, np.float32)}),
        "half with module.": renamed(lambda name: name if "layer.1" in name else f"module.{name}"),
        "two prefixes": renamed(lambda name: f"module.{name}" if "layer.1" in name else f"model.{name}"),
        "all under two prefixes": tensors(met),
        "with a prefix and without": tensors(lambda named: named | {f"module.{name}": x for name, x in named.items()}),
        "another network's": renamed(lambda name: name.replace("bert.", "roberta.")),
        "without capitals": renamed(lambda name: name.replace("LayerNorm", "layernorm")),
    })  # fmt: skip
    yield from each("names", "cased", "equal", {
        "decoder tied": tensors(lambda n: n.update({DECODER + "weight": n[WORD], DECODER + "bias": n[BIAS]})),
        "gamma and beta": renamed(
            lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        ),
        "position_ids": tensors(lambda n: n.update({"bert.embeddings.position_ids": np.arange(160)[None]})),
    })  # fmt: skip
    prefixes = ["module.", "_orig_mod.", "model.", "module._orig_mod."]
    yield from each("names", "cased", "said", {
        f"all with {prefix}": renamed(lambda name, prefix=prefix: prefix + name) for prefix in prefixes
    })  # fmt: skip
    yield Damage("names", "like shapes swapped", "cased", swapped(QUERY, KEY), "undetected")


def types() -> Iterator[Damage]:
    def rounded(dtype: str) -> Apply:
        return tensors(lambda named: {name: x.astype(dtype) for name, x in named.items()})

    yield from each("types and shapes", "cased", "refused", {
        "int32": replaced(QUERY, lambda x: x.astype(np.int32)),
        "bool": replaced(QUERY, lambda x: x > 0),
        "float8": replaced(QUERY, lambda x: x.astype(ml_dtypes.float8_e4m3fn)),
        "complex": header(lambda h: h[QUERY].update(dtype="C64", shape=[8, 4])),
        "flat": replaced(QUERY, np.ravel),
        "one row less": replaced(WORD, lambda x: x[:-1]),
        "one row more": replaced(WORD, lambda x: np.concatenate([x, x[:1]])),
        "transposed": replaced(INNER, lambda x: x.T),
        "a number": replaced(NORM + "bias", lambda x: x[0].reshape(())),
        "nothing": replaced(BIAS, lambda x: x[:0]),
        "head of another size": replaced(BIAS, lambda x: x[:8]),
    })  # fmt: skip
    yield Damage("types and shapes", "float64", "cased", replaced(QUERY, lambda x: x.astype(np.float64)), "equal")
    yield from each("types and shapes", "cased", "undetected", {
        "a square one transposed": replaced(QUERY, lambda x: x.T),
        "float16": rounded("float16"),
        "bfloat16": rounded("bfloat16"),
    })  # fmt: skip


def not_finite() -> Iterator[Damage]:
    every = slice(None)

    def a_layer(named: dict[str, np.ndarray]) -> None:
        named |= {name: np.full_like(x, np.inf) for name, x in named.items() if ".layer.1." in name}

    yield from each("not finite", "cased", "refused", {
        "a tensor of NaN": with_value(QUERY, every, np.nan),
        "one NaN": with_value(OUTER, (3, 3), np.nan),
        "one NaN, of an unused word": with_value(WORD, (1, 3), np.nan),
        "one inf": with_value(NORM + "bias", (0,), np.inf),
        "one -inf, in the head's bias": with_value(BIAS, (1,), -np.inf),
        "a layer of inf": tensors(a_layer),
        "float16 that overflowed": with_value(OUTER, (3, 3), 1e6, "float16"),
        "float64 over float32's range": with_value(OUTER, (3, 3), 1e300, "float64"),
        "results that overflow": both(with_value(INNER, every, 3e38), with_value(OUTER, every, 3e38)),
    })  # fmt: skip
    shard = SHARD.format(3)
    first = sorted(load(files("sharded")[shard]))[0]
    yield Damage(
        "not finite", "one NaN, in a shard", "sharded", with_value(first, every, np.nan, file=shard), "refused"
    )
    yield Damage("not finite", "one NaN, in the pooler, which is not read", "cased", with_value(POOLER, (0,), np.nan))


def index() -> Iterator[Damage]:
    def moved(names: str) -> Apply:
        return first_shard(lambda stood, now: None, names)

    yield from each("index", "sharded", "refused", {
        "../x": moved("../{0.name}"),
        "a/../../x": moved("a/../../{0.name}"),
        "absolute": moved("{0}"),
        "a link out": first_shard(lambda stood, now: stood.symlink_to(now)),
        "missing": first_shard(lambda stood, now: None),
        "7": shard_named(7),
        "null": shard_named(None),
        "a list": shard_named([SHARD.format(1)]),
        "an object": shard_named({}),
        "''": shard_named(""),
        "'.'": shard_named("."),
        "a zero byte": shard_named("model\0.safetensors"),
        "5,000 characters": shard_named(LONG),
        "a lone surrogate": shard_named("\ud800.safetensors"),
        "another file": shard_named(CONFIG),
        "in another shard": shard_named(SHARD.format(2)),
        "shards exchanged": mapped(lambda m: m.update({k: v.replace("-00001-", "-00003-") for k, v in m.items()})),
        "a name more": mapped(lambda m: m.update({"bert.more": SHARD.format(1)})),
        "a name less": mapped(lambda m: m.pop(QUERY) and None),
        "map empty": mapped(lambda m: {}),
        "map a list": mapped(list),
        "map a text": mapped(lambda m: SHARD.format(1)),
        "map of 5,000 digits": raw(INDEX, "weight_map", "1" * 5000),
        "no map": without(INDEX, "weight_map"),
        "a list instead": edited(INDEX, lambda old: []),
        "nested 100,000 deep": text(INDEX, lambda old: DEEP),
        "UTF-16": content(INDEX, lambda old, rng: old.decode().encode("utf-16")),
    })  # fmt: skip

    yield from each("index", "sharded", "", {
        "no metadata": without(INDEX, "metadata"),
        "metadata a list": with_keys(INDEX, metadata=[]),
    })  # fmt: skip
    beside = both(with_shards, with_keys(INDEX, weight_map={WORD: SHARD.format(1)}))
    yield Damage("index", "beside model.safetensors", "cased", beside)


def config() -> Iterator[Damage]:
    nan, inf = float("nan"), float("inf")
    wrong: list[tuple[str, Any]] = [
        ("hidden_size", "8"), ("hidden_size", 8.0), ("hidden_size", 0), ("hidden_size", 10**9), ("hidden_size", 16),
        ("num_attention_heads", True), ("num_attention_heads", 3), ("num_attention_heads", -2),
        ("num_hidden_layers", 10**9), ("num_hidden_layers", 900), ("num_hidden_layers", 1),
        ("num_hidden_layers", None), ("num_hidden_layers", [2]), ("num_hidden_layers", 0),
        ("vocab_size", 10**15), ("vocab_size", 10**7), ("vocab_size", 100), ("intermediate_size", 16.5),
        ("intermediate_size", 10**6), ("max_position_embeddings", 10**12), ("max_position_embeddings", 80),
        ("type_vocab_size", 1), ("layer_norm_eps", nan), ("layer_norm_eps", inf), ("layer_norm_eps", -1e-12),
        ("layer_norm_eps", "1e-12"), ("layer_norm_eps", None), ("layer_norm_eps", True), ("layer_norm_eps", 0.0),
        ("hidden_dropout_prob", nan), ("hidden_dropout_prob", True), ("attention_probs_dropout_prob", "0.1"),
        ("initializer_range", nan), ("pad_token_id", "x"), ("pad_token_id", 10**9), ("pad_token_id", -200),
        ("hidden_act", "gelu_10"), ("hidden_act", None), ("hidden_act", {}), ("hidden_act", LONG),
        ("id2label", {"a": "A"}), ("id2label", {"0": "A", "2": "B"}), ("id2label", "AB"),
        ("id2label", {"0": LONG, "x": 1}),
        ("model_type", "roberta"), ("model_type", ["bert"]), ("model_type", LONG), ("problem_type", LONG),
        ("position_embedding_type", "relative_key"), ("is_decoder", True), ("is_decoder", "false"),
        ("pruned_heads", {"0": [1]}), ("quantization_config", {"quant_method": "awq"}), ("tie_word_embeddings", False),
    ]  # fmt: skip
    for key, value in wrong:
        yield Damage("config", f"{key} {value!r}"[:60], "cased", with_keys(CONFIG, **{key: value}), "refused")
    yield from each("config", "cased", "refused", {
        "vocab_size of 5,000 digits": raw(CONFIG, "vocab_size", "1" * 5000),
        "layer_norm_eps 1e999": raw(CONFIG, "layer_norm_eps", "1e999"),
        "nested 100,000 deep": raw(CONFIG, "task_specific_params", DEEP),
        "no sizes": without(CONFIG, "vocab_size", "hidden_size", "num_hidden_layers"),
        "a list": edited(CONFIG, lambda old: [old]),
        "empty": edited(CONFIG, lambda old: {}),
        "UTF-16": content(CONFIG, lambda old, rng: old.decode().encode("utf-16")),
    })  # fmt: skip
    yield from each("config", "cased", "equal", {
        "gelu_python": with_keys(CONFIG, hidden_act="gelu_python"),
        "id2label not in order": with_keys(CONFIG, id2label={"1": "B", "0": "A"}, label2id={"A": 0, "B": 1}),
        "no model_type": without(CONFIG, "model_type"),
    })  # fmt: skip
    yield from each("config", "cased", "undetected", {
        "hidden_act gelu_pytorch_tanh": with_keys(CONFIG, hidden_act="gelu_pytorch_tanh"),
        "hidden_act gelu_fast": with_keys(CONFIG, hidden_act="gelu_fast"),
        "hidden_act silu": with_keys(CONFIG, hidden_act="silu"),
        "layer_norm_eps 1e-3": with_keys(CONFIG, layer_norm_eps=1e-3),
        "4 heads": with_keys(CONFIG, num_attention_heads=4),
        "a key twice, with another value last": text(CONFIG, lambda old: old[:-1] + ', "hidden_act": "relu"}'),
    })  # fmt: skip
    yield from each("config", "cased", "", {
        "layer_norm_eps 1, not 1.0": with_keys(CONFIG, layer_norm_eps=1),
        "no layer_norm_eps": without(CONFIG, "layer_norm_eps"),
        "pad_token_id null": with_keys(CONFIG, pad_token_id=None),
        "pad_token_id 7": with_keys(CONFIG, pad_token_id=7),
        "a key twice": text(CONFIG, lambda old: old.replace('"hidden_act"', '"hidden_act": "relu", "hidden_act"')),
        "byte order mark": text(CONFIG, lambda old: "\ufeff" + old),
        "id2label: names of no text": with_keys(CONFIG, id2label={"0": None, "1": 2}, label2id=None),
        "id2label: a list": with_keys(CONFIG, id2label=["A", "B"]),
    })  # fmt: skip


def vocab_txt() -> Iterator[Damage]:
    def put(*pieces: str) -> Apply:
        """Pieces in place of those from the twenty-first on."""
        return lines(lambda old: [*old[:20], *pieces, *old[20 + len(pieces) :]])

    yield from each("vocab.txt", "vocab", "refused", {
        # The tokens added behind the vocabulary then have other ids than the model was trained with.
        "a line more": lines(lambda old: [*old[:20], "more", *old[20:]]),
        "a line twice": lines(lambda old: [*old[:20], old[10], *old[20:]]),
        "a line instead of another": lines(lambda old: [*old[:20], old[10], *old[21:]]),
        "a blank line": lines(lambda old: [*old[:20], "", *old[20:]]),
        "blank lines at the end": lines(lambda old: [*old, "", "", ""]),
        "longer than the model": lines(lambda old: [*old, *(f"more{i}" for i in range(9))]),
        "shorter": lines(lambda old: old[:-3]),
        "UTF-16": content(VOCAB, lambda old, rng: old.decode().encode("utf-16")),
        "Latin-1": content(VOCAB, lambda old, rng: old.decode().encode("latin-1", "replace")),
        "JSON": lines(lambda old: [json.dumps({piece: i for i, piece in enumerate(old)})]),
        "a tab and a count behind": lines(lambda old: [f"{piece}\t7" for piece in old]),
        **{f"without {token}": lines(lambda old, token=token: ["?" if piece == token else piece for piece in old])
           for token in SPECIAL_TOKENS.values() if token != "[PAD]"},
    })  # fmt: skip
    yield from each("vocab.txt", "vocab", "equal", {
        "no newline at the end": text(VOCAB, lambda old: old[:-1]),
        "CRLF": lines(lambda old: old, "\r\n"),
    })  # fmt: skip
    yield from each("vocab.txt", "vocab", "", {
        "spaces behind": lines(lambda old: old, " "),
        "a space behind one": text(VOCAB, lambda old: old.replace("\ncat\n", "\ncat \n")),
        "an ideographic space behind one": text(VOCAB, lambda old: old.replace("\ncat\n", "\ncat\u3000\n")),
        "byte order mark": text(VOCAB, lambda old: "\ufeff" + old),
        "without [PAD]": lines(lambda old: ["?", *old[1:]]),
        "do_lower_case not said": without(SETTINGS, "do_lower_case"),
    })  # fmt: skip
    yield from each("vocab.txt", "vocab", "undetected", {
        "line separators in lines": put("x\u2028y", "x\x85y", "x\x0by"),
        "a space before one": text(VOCAB, lambda old: old.replace("\nmat\n", "\n mat\n")),
        "a carriage return in a line": put("x\ry"),
        "shuffled": lines(lambda old: [*old[:6], *old[:5:-1]]),
        "[MASK] twice": lines(lambda old: [*old[:20], "[MASK]", *old[20:-1]]),
        "do_lower_case, of a cased one": with_keys(SETTINGS, do_lower_case=True),
    })  # fmt: skip
    yield from each("vocab.txt", "uncased vocab", "undetected", {
        "no do_lower_case, of an uncased one": with_keys(SETTINGS, do_lower_case=False),
    })  # fmt: skip
    yield Damage("vocab.txt", "do_lower_case not said", "uncased vocab", without(SETTINGS, "do_lower_case"), "equal")
    yield from each("vocab.txt", "plain vocab", "undetected", {
        "shorter": lines(lambda old: old[:-3]),
        "a line instead of another": lines(lambda old: [*old[:20], old[10], *old[21:]]),
    })  # fmt: skip
    yield Damage("vocab.txt", "longer than the model", "plain vocab", lines(lambda old: [*old, "more"]))
    yield Damage("vocab.txt", "shuffled", "cased", lines(lambda old: [*old[:6], *old[:5:-1]]))


def tokenizer_json() -> Iterator[Damage]:
    def part(name: str, change: Callable[[Any], Any]) -> Apply:
        return edited(TOKENIZER, lambda old: (change(old[name]), None)[1])

    def vocab(change: Callable[[dict], Any]) -> Apply:
        return part("model", lambda model: change(model["vocab"]))

    def other(kind: str, **keys: Any) -> Apply:
        return edited(TOKENIZER, lambda old: old | {"model": {"type": kind, "vocab": old["model"]["vocab"], **keys}})

    def unigram(old: dict) -> None:
        old["model"] = {"type": "Unigram", "unk_id": 2, "vocab": [[piece, -1.0] for piece in old["model"]["vocab"]]}

    def absent(token: str) -> Apply:
        """A token that neither the vocabulary nor the added tokens have."""

        def change(old: dict) -> None:
            del old["model"]["vocab"][token]
            old["added_tokens"] = [added for added in old["added_tokens"] if added["content"] != token]

        return edited(TOKENIZER, change)

    def added(token: str, /, **keys: Any) -> Apply:
        def change(tokens: list[dict]) -> None:
            next(entry for entry in tokens if entry["content"] == token).update(keys)

        return part("added_tokens", change)

    def normalizer(**keys: Any) -> Apply:
        return part("normalizer", lambda old: old.update(keys))

    bert = json.loads(files("json")[TOKENIZER])["normalizer"]
    stripping = {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}, bert]}
    cls_and_sep = {"type": "BertProcessing", "sep": ["[SEP]", 4], "cls": ["[CLS]", 3]}
    truncation = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding = {"strategy": {"Fixed": 32}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    padding |= {"pad_to_multiple_of": None}
    yield from each("tokenizer.json", "json", "refused", {
        "two tokens on one id": vocab(lambda v: v.update(cat=v["sat"])),
        "two added tokens on one id": added("[/E1]", id=117),
        "an added token on a word's id": added("[/E1]", id=60),
        "vocabulary empty": both(vocab(dict.clear), with_keys(TOKENIZER, added_tokens=[])),
        "vocabulary of added tokens alone": vocab(dict.clear),
        "BPE": other("BPE", merges=[["c", "a"]]),
        "WordLevel": other("WordLevel", unk_token="[UNK]"),
        "Unigram": edited(TOKENIZER, unigram),
        "an id of 10^12": vocab(lambda v: v.update(cat=10**12)),
        "an id of 10^9": vocab(lambda v: v.update(cat=10**9)),
        "an id below 0": vocab(lambda v: v.update(cat=-1)),
        "an id that is a text": vocab(lambda v: v.update(cat="60")),
        "an id that is a fraction": vocab(lambda v: v.update(cat=60.5)),
        "a list": edited(TOKENIZER, lambda old: [old]),
        "no model": without(TOKENIZER, "model"),
        "vocabulary a list": part("model", lambda model: model.update(vocab=list(model["vocab"]))),
        "nested 100,000 deep": raw(TOKENIZER, "normalizer", DEEP),
        "UTF-16": content(TOKENIZER, lambda old, rng: old.decode().encode("utf-16")),
        "without [UNK]": absent("[UNK]"),
        "without [CLS]": absent("[CLS]"),
        "an added token behind the model": added("[/E1]", id=10**6),
        "an added token of 5,000 characters": added("[/E1]", content=LONG, id=60),
    })  # fmt: skip
    yield from each("tokenizer.json", "json", "", {
        "without [MASK]": absent("[MASK]"),
        "[CLS] not added": edited(TOKENIZER, lambda old: old["added_tokens"].pop(2) and None),
        "unk_token outside the vocabulary": part("model", lambda model: model.update(unk_token="<unk>")),
        "unk_token another": part("model", lambda model: model.update(unk_token="[unused1]")),
        "prefix @@": part("model", lambda model: model.update(continuing_subword_prefix="@@")),
        "words of 5 characters": part("model", lambda model: model.update(max_input_chars_per_word=5)),
        "no normalizer": with_keys(TOKENIZER, normalizer=None),
        "normalizer NFC": with_keys(TOKENIZER, normalizer={"type": "NFC"}),
        "normalizers in a sequence": with_keys(TOKENIZER, normalizer=stripping),
        "normalizer lower-cases": normalizer(lowercase=True),
        "normalizer strips accents": normalizer(strip_accents=True),
        "normalizer keeps Chinese together": normalizer(handle_chinese_chars=False),
        "normalizer keeps control characters": normalizer(clean_text=False),
        "splits at spaces": with_keys(TOKENIZER, pre_tokenizer={"type": "WhitespaceSplit"}),
        "splits nowhere": with_keys(TOKENIZER, pre_tokenizer=None),
        "no post-processor": with_keys(TOKENIZER, post_processor=None),
        "post-processor BertProcessing": with_keys(TOKENIZER, post_processor=cls_and_sep),
        "post-processor of other ids": with_keys(TOKENIZER, post_processor=cls_and_sep | {"sep": ["[SEP]", 40]}),
        "truncates": with_keys(TOKENIZER, truncation=truncation),
        "pads": with_keys(TOKENIZER, padding=padding),
        "an added token special": added("[/E1]", special=True),
        "version 9.0": with_keys(TOKENIZER, version="9.0"),
        "byte order mark": text(TOKENIZER, lambda old: "\ufeff" + old),
        "no decoder": with_keys(TOKENIZER, decoder=None),
        "no added_tokens": without(TOKENIZER, "added_tokens"),
        "no settings, which say do_lower_case": lambda folder, rng: os.remove(folder / SETTINGS),
    })  # fmt: skip
    yield from each("tokenizer.json", "json", "undetected", {
        "an id left out": vocab(lambda v: v.pop("mat") and None),
        "an added token is a word": added("[/E1]", content="cat"),
        "an added token takes the space before": added("[/E1]", lstrip=True),
        "an added token stands alone": added("[/E1]", single_word=True),
        "[MASK] takes the space before": added("[MASK]", lstrip=True),
        "[SEP] normalized": added("[SEP]", normalized=True),
    })  # fmt: skip


def tokenizer_config() -> Iterator[Damage]:
    def settings(kind: str, form: str, expected: str, *changes: tuple[str, Any]) -> Iterator[Damage]:
        for key, value in changes:
            name = f"{key} {json.dumps(value)}"[:60]
            yield Damage(kind, name, form, with_keys(SETTINGS, **{key: value}), expected)

    def token(content: str, **keys: Any) -> dict:
        flags = dict.fromkeys(["lstrip", "rstrip", "normalized", "single_word"], False)
        return {"content": content, **flags, "special": True, **keys}

    kind, last = "tokenizer_config.json", len(vocabulary(False)) + 1
    yield from settings(
        kind, "vocab", "refused",
        ("tokenizer_class", "RobertaTokenizer"), ("tokenizer_class", "BertJapaneseTokenizer"),
        ("tokenizer_class", "OddTokenizer"), ("tokenizer_class", 7), ("tokenizer_class", 0), ("tokenizer_class", LONG),
        ("do_lower_case", "false"), ("do_lower_case", [False]), ("strip_accents", "no"),
        ("tokenize_chinese_chars", "x"), ("model_max_length", "x"), ("model_max_length", -5),
        ("model_max_length", float("nan")),
        ("added_tokens_decoder", {"60": token("<e>")}), ("added_tokens_decoder", {"x": token("<e>")}),
        ("added_tokens_decoder", {"9": "<e>"}), ("added_tokens_decoder", []),
        ("added_tokens_decoder", {"-1": token("")}), ("extra_special_tokens", "cat"),
        ("extra_special_tokens", {"image_token": 7}), ("extra_special_tokens", [None]),
        ("additional_special_tokens", [7]), ("additional_special_tokens", [[]]), ("additional_special_tokens", "cat"),
    )  # fmt: skip
    yield from settings(
        kind, "vocab", "",
        ("do_lower_case", 1), ("tokenizer_class", "DistilBertTokenizer"), ("model_max_length", 0),
        ("extra_special_tokens", {"image_token": "<image>"}), ("image_token", "<image>"),
    )  # fmt: skip
    yield from settings(
        kind, "vocab", "undetected",
        ("tokenize_chinese_chars", False), ("strip_accents", True), ("added_tokens_decoder", {}),
        ("added_tokens_decoder", {str(last - 1): token("[E1]")}), ("added_tokens_decoder", {"86": token("cat")}),
        ("additional_special_tokens", ["sat", "[E1]"]),
    )  # fmt: skip
    yield from settings(
        kind, "plain vocab", "refused",
        ("unk_token", 7), ("mask_token", {"text": "[MASK]"}), ("cls_token", []), ("mask_token", LONG),
        ("mask_token", {"content": 7}), ("sep_token", "<sep>"), ("unk_token", "<unk>"), ("unk_token", None),
        ("sep_token", None), ("cls_token", None), ("sep_token", "[MASK]"), ("model_max_length", 2),
        ("model_max_length", []),
    )  # fmt: skip
    yield from settings(
        kind, "plain vocab", "",
        ("mask_token", "<mask>"), ("pad_token", "<pad>"), ("added_tokens_decoder", {str(last): token("<e>")}),
    )  # fmt: skip
    yield from settings(
        kind, "plain vocab", "undetected",
        ("mask_token", "[unused1]"), ("mask_token", {"__type": "AddedToken", **token("[MASK]", lstrip=True)}),
        ("sep_token", "cat"), ("cls_token", "[unused1]"), ("unk_token", "[unused1]"), ("pad_token", "[SEP]"),
        ("mask_token", None), ("pad_token", None), ("mask_token", ""), ("pad_token", ""),
    )  # fmt: skip
    yield from settings(
        kind, "json", "",
        ("tokenizer_class", "GPT2TokenizerFast"), ("tokenizer_class", "T5Tokenizer"), ("mask_token", "<mask>"),
        ("added_tokens_decoder", {"9": "<e>"}), ("add_bos_token", True), ("clean_up_tokenization_spaces", True),
        ("model_max_length", 10), ("model_max_length", 10**30), ("do_basic_tokenize", False), ("never_split", ["cat"]),
        ("tokenizer_class", ["BertTokenizer"]), ("tokenizer_class", "OddTokenizer"),
        ("split_special_tokens", True), ("backend", "mistral"), ("padding_side", "left"),
    )  # fmt: skip
    yield from settings(
        kind, "json", "undetected",
        ("do_lower_case", True), ("strip_accents", True), ("tokenize_chinese_chars", False), ("pad_token", "[SEP]"),
        ("cls_token", "[unused1]"), ("added_tokens_decoder", {str(last - 1): token("<e>")}),
        ("extra_special_tokens", ["[E1]", "cat"]),
    )  # fmt: skip
    yield from settings(kind, "uncased", "undetected", ("do_lower_case", False))
    backend = with_keys(SETTINGS, tokenizer_class="PreTrainedTokenizerFast", **SPECIAL_TOKENS)
    yield Damage(kind, "PreTrainedTokenizerFast", "json", backend, "equal")
    yield Damage(kind, "a list", "vocab", edited(SETTINGS, lambda old: [old]), "refused")
    yield Damage(kind, "nested 100,000 deep", "vocab", raw(SETTINGS, "x", DEEP), "refused")
    yield Damage(kind, "5,000 digits", "vocab", raw(SETTINGS, "model_max_length", "1" * 5000), "refused")
    yield Damage(kind, "UTF-16", "vocab", content(SETTINGS, lambda old, rng: old.decode().encode("utf-16")), "refused")


def special_tokens_map() -> Iterator[Damage]:
    kind = "special_tokens_map.json"
    yield from each(kind, "vocab", "refused", {
        "a list": edited(SPECIALS, list),
        "nested 100,000 deep": raw(SPECIALS, "x", DEEP),
        "mask_token 7": with_keys(SPECIALS, mask_token=7),
        "unk_token null": with_keys(SPECIALS, unk_token=None),
        "additional_special_tokens [7]": with_keys(SPECIALS, additional_special_tokens=[7]),
    })  # fmt: skip
    yield from each(kind, "vocab", "undetected", {
        "mask_token [unused1]": with_keys(SPECIALS, mask_token="[unused1]"),
        "mask_token another than in the settings": with_keys(SETTINGS, mask_token="[unused1]"),
        "additional_special_tokens": with_keys(SPECIALS, additional_special_tokens=["sat", "[E1]"]),
    })  # fmt: skip
    changed = with_keys(SPECIALS, mask_token="[unused1]")
    yield Damage(kind, "mask_token [unused1], beside tokenizer.json", "cased", changed, "undetected")


def added_tokens() -> Iterator[Damage]:
    kind, behind = "added_tokens.json", len(vocabulary(False)) + 2
    wrong: dict[str, dict[str, Any]] = {
        "one far behind the model": {"<e>": 10**9},
        "an id of the vocabulary": {"<e>": 60},
        "two on one id": {"<e>": behind - 1},
        "a word with another id": {"cat": behind - 1},
        "id a text": {"<e>": "9"},
        "id below 0": {"<e>": -1},
        "id a fraction": {"<e>": 9.5},
        "id true": {"<e>": True},
        "id null": {"<e>": None},
    }
    yield from each(kind, "vocab", "refused", {name: with_keys(ADDED, **tokens) for name, tokens in wrong.items()})
    yield from each(kind, "vocab", "refused", {
        "a gap": edited(ADDED, lambda old: {"[E1]": behind - 1}),
        "the two exchanged": edited(ADDED, lambda old: {"[E1]": behind - 1, "[/E1]": behind - 1}),
        "a list": edited(ADDED, list),
        "nested 100,000 deep": raw(ADDED, "x", DEEP),
        "an id of 5,000 digits": raw(ADDED, "x", "1" * 5000),
    })  # fmt: skip
    yield from each(kind, "vocab", "", {
        "one behind the model": with_keys(ADDED, **{"<e>": behind}),
        "an empty one": with_keys(ADDED, **{"": behind}),
        "a word with its own id": with_keys(ADDED, mat=90),
    })  # fmt: skip
    yield Damage(kind, "contradicts tokenizer.json", "cased", edited(ADDED, lambda old: {"[E1]": 60}))
