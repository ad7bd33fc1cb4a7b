"""A small BERT in the published naming, made from seeded numbers; the golden outputs in `golden/` are PyTorch's of it.

The names are written out here once more, on purpose: this is what the package's own table is tested against.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden"

# 12 layers: under string keys 0, 1, 10, 11, 2 … would permute them.
CONFIG = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 8,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "id2label": {"0": "A", "1": "B", "2": "C"},
    "label2id": {"A": 0, "B": 1, "C": 2},
}

ENCODER, POOLER = "bert.", "bert.pooler."
MLM, NSP, CLASSIFIER, QA = "cls.predictions.", "cls.seq_relationship.", "classifier.", "qa_outputs."
HEADS = {  # class -> what its file holds beside the encoder
    "BertModel": (POOLER,),
    "BertForPreTraining": (POOLER, MLM, NSP),
    "BertForMaskedLM": (MLM,),
    "BertForNextSentencePrediction": (POOLER, NSP),
    "BertForSequenceClassification": (POOLER, CLASSIFIER),
    "BertForTokenClassification": (CLASSIFIER,),
    "BertForQuestionAnswering": (QA,),
}


def config(architecture: str) -> dict:
    """The config beside a class's weights; PyTorch's question answering takes its two outputs from the labels."""
    two = {"id2label": {"0": "A", "1": "B"}, "label2id": {"A": 0, "B": 1}}
    return CONFIG | two if architecture == "BertForQuestionAnswering" else CONFIG


def shapes(config: dict = CONFIG) -> dict[str, tuple[int, ...]]:
    """Published names of all heads' tensors and their shapes, PyTorch's way: linears are [out, in]."""
    v, d, f = config["vocab_size"], config["hidden_size"], config["intermediate_size"]

    def linear(name: str, outs: int, ins: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outs, ins), f"{name}.bias": (outs,)}

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.LayerNorm.weight": (d,), f"{name}.LayerNorm.bias": (d,)}

    found = {
        "bert.embeddings.word_embeddings.weight": (v, d),
        "bert.embeddings.position_embeddings.weight": (config["max_position_embeddings"], d),
        "bert.embeddings.token_type_embeddings.weight": (config["type_vocab_size"], d),
        **norm("bert.embeddings"),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            found |= linear(f"{layer}.attention.self.{name}", d, d)
        found |= linear(f"{layer}.attention.output.dense", d, d) | norm(f"{layer}.attention.output")
        found |= linear(f"{layer}.intermediate.dense", f, d)
        found |= linear(f"{layer}.output.dense", d, f) | norm(f"{layer}.output")
    found |= linear("bert.pooler.dense", d, d)
    found |= linear("cls.predictions.transform.dense", d, d) | norm("cls.predictions.transform")
    found |= {"cls.predictions.bias": (v,)}
    found |= linear("cls.seq_relationship", 2, d)
    found |= linear("classifier", len(config["id2label"]), d) | linear("qa_outputs", 2, d)
    return found


def tensors(architecture: str | None = None, config: dict = CONFIG) -> dict[str, np.ndarray]:
    """The small model's weights, for one class or for all heads together; float32, the same on every machine."""
    random = np.random.RandomState(0)  # the legacy generator, whose stream is frozen
    everything = {
        name: (random.normal(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.2, shape)).astype(np.float32)
        for name, shape in shapes(config).items()
    }
    if architecture is None:
        return everything
    kept = HEADS[architecture]
    return {
        name: tensor
        for name, tensor in everything.items()
        if name.startswith(kept) or (name.startswith(ENCODER) and not name.startswith(POOLER))
    }


def write(folder: Path, named: dict[str, np.ndarray], config: dict = CONFIG) -> Path:
    """A checkpoint's folder with these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def inputs(config: dict = CONFIG) -> dict[str, np.ndarray]:
    """Three rows of ten tokens: a text, a pair, and a padded pair."""
    random = np.random.RandomState(1)
    types = np.zeros((3, 10), np.int32)
    types[1, 6:] = types[2, 3:7] = 1
    mask = np.ones((3, 10), np.int32)
    mask[2, 7:] = 0
    return {
        "input_ids": random.randint(1, config["vocab_size"], (3, 10)).astype(np.int32) * mask,
        "attention_mask": mask,
        "token_type_ids": types,
    }


def labels() -> dict[str, np.ndarray]:
    """Targets for each loss; -100 where a token does not count."""
    random = np.random.RandomState(2)
    mlm = np.full((3, 10), -100, np.int32)
    mlm[0, 2], mlm[1, 5], mlm[1, 8], mlm[2, 4] = 7, 8, 9, 10
    token = random.randint(0, 3, (3, 10)).astype(np.int32)
    token[2, 7:] = -100
    return {
        "mlm": mlm,
        "nsp": np.array([0, 1, 1], np.int32),
        "single": np.array([2, 0, 1], np.int32),
        "multi": random.randint(0, 2, (3, 3)).astype(np.float32),
        "regression": random.normal(size=(3, 3)).astype(np.float32),
        "token": token,
        "start": np.array([1, 3, 2], np.int32),
        "end": np.array([4, 3, 5], np.int32),
    }


def golden(name: str) -> Any:
    """What `scripts/make_golden.py` wrote."""
    return json.loads((GOLDEN / name).read_text())["content"]
