"""Loads checkpoints with this package and with transformers, in a process that may be killed."""

import logging
import os
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

TEXTS = [
    "The cat sat on the [MASK].",
    "the [E1] cat [/E1] sat, [e1] the CAT [/E1]s",
    "Café NAÏVE café cafe\u0301 É",
    "中国 is 中cat猫sat",
    "tab\tand   spaces\u00a0zzz \u200b x\r\ny \u2028 \x00 \ufffd \x7f",
    "[CLS] odd [SEP] [PAD] [UNK] [unused1] [mask] [ MASK ] [Mask]",
    "cats[MASK]sitting the[E1]x E1 /E1 [E1 ]",
    "",
    "ﬁ ſ İ ß Ω 🙂 !?' '' 1234",
    "##ing cat ##s # ##",
    "a" * 100 + " " + "a" * 101,
    "  [MASK]  sat\n[MASK]",
    "<e> <mask> <image> cat sat more more3 x\u2028y",
]
PAIR = ("The cat [E1]", "sat on the [MASK] mat")
SPECIALS = ["mask", "pad", "cls", "sep", "unk"]


def attempt(load: Callable[[], Any]) -> tuple[Any, dict[str, Any] | None]:
    """The result and None, or None and the error. A panic in Rust is a `BaseException`."""
    try:
        return load(), None
    except BaseException as error:
        typed = any(parent.__name__ == "BertJaxError" for parent in type(error).__mro__)
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno} {last.name}"
        return None, {"type": type(error).__name__, "typed": typed, "message": str(error), "where": where}


class Ours:
    """This package."""

    def tokenizer(self, folder: Path) -> dict[str, Any]:
        from bert_jax import Tokenizer

        tokenizer = Tokenizer.from_pretrained(folder)
        rows = [row for row, *_ in tokenizer.encode(TEXTS)] + [tokenizer.encode([PAIR[0]], [PAIR[1]])[0][0]]
        return {
            "ids": [row.ids for row in rows],
            "type_ids": [row.type_ids for row in rows],
            "special_ids": [getattr(tokenizer, f"{name}_token_id") for name in SPECIALS],
            "vocabulary": tokenizer.backend.get_vocab(True),
        }

    def model(self, folder: Path) -> np.ndarray:
        from bert_jax import BertForMaskedLM

        return np.asarray(BertForMaskedLM.from_pretrained(folder)(**inputs()).logits)

    def fill_mask(self, folder: Path) -> list[tuple[int, float]]:
        import bert_jax

        fill = bert_jax.pipeline("fill-mask", folder)
        (masks,) = fill([f"the cat {fill.tokenizer.mask_token} sat"])
        return [(entry["token"], entry["score"]) for entry in np.ravel(masks)]


class Theirs:
    """PyTorch transformers."""

    def tokenizer(self, folder: Path) -> dict[str, Any]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = [tokenizer(text) for text in TEXTS] + [tokenizer(*PAIR)]
        return {
            "ids": [row["input_ids"] for row in rows],
            "type_ids": [row.get("token_type_ids") for row in rows],
            "special_ids": [getattr(tokenizer, f"{name}_token_id") for name in SPECIALS],
            "vocabulary": tokenizer.get_vocab(),
        }

    def model(self, folder: Path) -> np.ndarray:
        import torch
        from transformers import BertForMaskedLM

        model = BertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            return model(**{name: torch.tensor(array).long() for name, array in inputs().items()}).logits.numpy()

    def fill_mask(self, folder: Path) -> list[tuple[int, float]]:
        import torch
        from transformers import AutoTokenizer, BertForMaskedLM

        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = BertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
        row = tokenizer(f"the cat {tokenizer.mask_token} sat", return_tensors="pt")
        (place,) = (row["input_ids"][0] == tokenizer.mask_token_id).nonzero()
        with torch.no_grad():
            best = model(**row).logits[0, place[0]].softmax(-1).topk(5)
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


class Said(logging.Handler):
    """Keeps the lines that the package logs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self.folder = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += record.getMessage().replace(self.folder, "").split("\n")


def inputs() -> dict[str, np.ndarray]:
    """A text, a pair, and a padded pair."""
    ids = np.random.RandomState(1).randint(0, 80, (3, 10))
    types = (np.arange(10) > 5) * np.array([[0], [1], [1]])
    mask = np.arange(10) < np.array([[10], [10], [7]])
    named = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
    return {name: array.astype(np.int32) for name, array in named.items()}


def serve(connection: Connection) -> None:
    """Takes ("ours" or "theirs", folder, parts) and answers with part -> (result, error) and the lines logged."""
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # programs run once here: compile them quickly
    import torch
    import transformers

    import bert_jax  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    said = Said()
    logging.getLogger("bert_jax").addHandler(said)
    logging.getLogger("bert_jax").setLevel(logging.INFO)
    sides = {"ours": Ours(), "theirs": Theirs()}
    while True:
        name, folder, parts = connection.recv()
        said.lines, said.folder = [], str(folder)
        side, found = sides[name], {}
        for part in parts:
            found[part] = attempt(partial(getattr(side, part), folder))
        connection.send((found, said.lines))
