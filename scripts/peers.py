"""Other runtimes' fill-mask for scripts/benchmark.py, each opened in a process of its own.

What is measured is the same work on each side: token ids, a mask and two positions a row go in, logits come out. There
are two graphs: `all`, as libraries export BertForMaskedLM, gives the vocabulary at every token; `gathered` does what
ours does, the last layer and the head at the positions alone.
"""

import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Forward = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""int [B, T], int [B, T], int [B, K] -> float32 logits [B, K, V]."""

Answer = Callable[[list[str]], list[list[tuple[int, float]]]]
"""Texts with one mask each -> five likeliest tokens and their scores."""

THREADS = 2
FLAX_PYTHON = "BERT_JAX_FLAX_PYTHON"
"""Variable that names the Python of FlaxBert's environment."""


def export(folder: Path) -> None:
    """Writes `all.onnx` and `gathered.onnx` beside a checkpoint."""
    import torch
    import transformers

    class Gathered(torch.nn.Module):
        """transformers' BERT up to the last layer, and that one and the head at the positions alone."""

        def __init__(self, model: Any):
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, positions: Any) -> Any:
            bert, heads = self.model.bert, self.model.config.num_attention_heads
            x = bert(input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states[-2]
            layer = bert.encoder.layer[-1]
            attention = layer.attention.self
            chosen = torch.gather(x, 1, positions[..., None].expand(-1, -1, x.shape[-1]))
            q, k, v = (
                linear(source).unflatten(-1, (heads, -1)).transpose(1, 2)
                for linear, source in ((attention.query, chosen), (attention.key, x), (attention.value, x))
            )
            bias = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
            p = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias, dim=-1)
            chosen = layer.attention.output((p @ v).transpose(1, 2).flatten(2), chosen)
            return self.model.cls(layer.output(layer.intermediate(chosen), chosen))

    class Everything(torch.nn.Module):
        def __init__(self, model: Any):
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids, attention_mask=attention_mask).logits

    model = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    ids = torch.ones((2, 16), dtype=torch.long)
    batch, tokens, count = (torch.export.Dim(name, min=1, max=most) for name, most in
                            (("batch", 512), ("tokens", 512), ("count", 512)))  # fmt: skip
    whole = {0: batch, 1: tokens}
    for name, network, inputs, shapes in [
        ("all", Everything(model), (ids, ids), (whole, whole)),
        ("gathered", Gathered(model), (ids, ids, ids[:, :2]), (whole, whole, {0: batch, 1: count})),
    ]:
        torch.onnx.export(
            network, inputs, folder / f"{name}.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False,
            input_names=["input_ids", "attention_mask", "positions"][: len(inputs)], output_names=["logits"],
        )  # fmt: skip


def open_peer(side: str, folder: Path) -> Forward:
    """A runtime by name: of onnxruntime and openvino, " all" or " gathered" follows."""
    name, _, graph = side.partition(" ")
    return {"ours": _ours, "transformers": _transformers, "kerashub": _kerashub, "onnxruntime": _onnxruntime,
            "openvino": _openvino, "flaxbert": _flaxbert}[name](folder, graph)  # fmt: skip


def open_texts(side: str, folder: Path) -> Callable[[int], Answer]:
    """Batch size -> texts to answers: `ours`, transformers' pipeline, or a runtime fed in order, padded per batch."""
    name = side.split()[0]
    if name == "ours":
        import bert_jax

        fill_mask = bert_jax.pipeline("fill-mask", folder)
        return lambda size: lambda texts: [[(e["token"], e["score"]) for e in entry] for entry in fill_mask(texts)]
    if name == "transformers":
        import torch
        import transformers

        torch.set_num_threads(THREADS)
        theirs = transformers.pipeline("fill-mask", model=str(folder), device="cpu")
        return lambda size: (
            lambda texts: [[(e["token"], e["score"]) for e in entry] for entry in theirs(texts, batch_size=size)]
        )
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    forward = open_peer(side, folder)

    def answer(texts: list[str], size: int) -> list[list[tuple[int, float]]]:
        found = []
        for start in range(0, len(texts), size):
            batch = tokenizer(texts[start : start + size], padding=True, return_tensors="np")
            ids = batch["input_ids"]
            # Two positions a row, as ours: of one, ours would be slow and they would not.
            positions = np.argmax(ids == tokenizer.mask_token_id, axis=1)[:, None].repeat(2, axis=1)
            logits = forward(ids, batch["attention_mask"], positions)[:, 0].astype(np.float32)
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            best = np.argpartition(-p, 5, axis=-1)[:, :5]
            for row, chosen in zip(p, best, strict=True):
                found.append(sorted(((int(t), float(row[t])) for t in chosen), key=lambda entry: -entry[1]))
        return found

    return lambda size: lambda texts: answer(texts, size)


def _at(logits: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.take_along_axis(logits, positions[..., None], axis=1)


def _ours(folder: Path, graph: str) -> Forward:
    import jax

    import bert_jax

    params, skeleton = bert_jax.tree.split(bert_jax.BertForMaskedLM.from_pretrained(folder))

    @jax.jit
    def program(params: Any, ids: Any, mask: Any, positions: Any) -> Any:
        return bert_jax.tree.merge(skeleton, params)(ids, mask, masked_positions=positions).logits

    def forward(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        inputs = (array.astype(np.int32) for array in (ids, mask, positions))
        return np.asarray(program(params, *inputs))

    return forward


def _transformers(folder: Path, graph: str) -> Forward:
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.BertForMaskedLM.from_pretrained(folder).eval()

    def forward(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return _at(model(torch.from_numpy(ids), torch.from_numpy(mask)).logits.numpy(), positions)

    return forward


def _kerashub(folder: Path, graph: str) -> Forward:
    """Random weights of the shape: KerasHub's GELU is another, and its numbers cannot be compared."""
    import keras_hub

    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=28996, num_layers=12, num_heads=12, hidden_dim=768, intermediate_dim=3072,
        max_sequence_length=512,
    )  # fmt: skip
    model = keras_hub.models.BertMaskedLM(backbone, preprocessor=None)

    def forward(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        inputs = {
            "token_ids": ids,
            "segment_ids": np.zeros_like(ids),
            "padding_mask": mask,
            "mask_positions": positions,
        }
        return np.asarray(model.predict_on_batch(inputs))

    return forward


def _flaxbert(folder: Path, graph: str) -> Forward:
    """In an environment of its own, see flax_peer.py; the pipe between takes a millisecond."""
    command = [os.environ[FLAX_PYTHON], str(Path(__file__).with_name("flax_peer.py")), str(folder)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def forward(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        assert server.stdin
        assert server.stdout
        pickle.dump((ids, mask, positions), server.stdin)
        server.stdin.flush()
        return pickle.load(server.stdout)

    return forward


def _onnxruntime(folder: Path, graph: str) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(folder / f"{graph}.onnx", options, providers=["CPUExecutionProvider"])

    def forward(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        inputs = {"input_ids": ids, "attention_mask": mask}
        if graph == "all":
            return _at(session.run(None, inputs)[0], positions)
        return session.run(None, inputs | {"positions": positions})[0]

    return forward


def _openvino(folder: Path, graph: str) -> Forward:
    import openvino

    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.compile_model(openvino.Core().read_model(folder / f"{graph}.onnx"), "CPU", properties)

    def forward(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        inputs = [ids, mask] if graph == "all" else [ids, mask, positions]
        logits = model(inputs)[0]
        return _at(logits, positions) if graph == "all" else logits

    return forward
