"""Questions, contexts and a small model, from seeded numbers; `golden/question_answering.json` has the answers."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import reference

COUNT = 500
EMBEDDED = Path(__file__).parents[1] / "bert_jax" / "embedded" / "bert-mini-cased"
ARCHITECTURE = "BertForQuestionAnswering"
CONFIG = reference.config(ARCHITECTURE) | {
    "vocab_size": 28996, "max_position_embeddings": 512, "num_hidden_layers": 2, "architectures": [ARCHITECTURE],
}  # fmt: skip
ODD = ["…", "--", "?!", "(", '"', "’s", "don't", "1,000.50", "café", "naïvely", "Zürich", "Ελλάδα", "東京", "中文字",
       "😀", "👩‍🔬", "ﬁ", "e\u0301", "\t", "\n", "\u00a0", "antidisestablishmentarianism"]  # fmt: skip


def write_model(folder: Path) -> Path:
    """A checkpoint whose answers vary with question and context."""
    tensors = reference.tensors(ARCHITECTURE, CONFIG)
    tensors["qa_outputs.weight"] *= np.float32(3)
    # Where [CLS] stands, so that no answer is sometimes the best one.
    tensors["bert.embeddings.position_embeddings.weight"][0] = 0.5 * tensors["qa_outputs.weight"].sum(0)
    reference.write(folder, tensors, CONFIG)
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / name, folder / name)
    return folder


def cases() -> list[dict[str, Any]]:
    """Contexts of 8 to about 900 tokens, and all parameters that the reference has."""
    source = random.Random(0)
    words = [word for word in (EMBEDDED / "vocab.txt").read_text(encoding="utf-8").split("\n") if word.isalpha()]

    def text(count: int) -> str:
        drawn = [source.choice(ODD if source.random() < 0.1 else words) for _ in range(count)]
        return "".join(word + source.choice([" ", " ", " ", ", ", ". ", "-", "  "]) for word in drawn)

    found = []
    for _ in range(COUNT):
        count = source.choice([source.randint(8, 30), source.randint(20, 100), source.randint(100, 500)])
        parameters: dict[str, Any] = {"top_k": source.choice([1, 1, 3, 5])}
        if source.random() < 0.3:
            parameters["handle_impossible_answer"] = True
        if source.random() < 0.3:
            parameters["max_answer_len"] = source.choice([1, 4, 30])
        if source.random() < 0.3:
            parameters |= {"max_seq_len": source.choice([64, 128, 512]), "doc_stride": source.choice([0, 16, 24])}
        # Words enough for twice as many spans as are looked at: of fewer, the reference fills up with spans from [CLS].
        count = max(count, 3 * (2 * parameters["top_k"] + 10) if parameters.get("max_answer_len") == 1 else 0)
        found.append({"question": text(source.randint(2, 10)), "context": text(count), "parameters": parameters})
    return found
