"""Fill-mask in other runtimes, for the cases `peers` and `texts`. Each runtime is opened in a separate process.

A side maps the token ids, a mask and the positions of each row to the logits at these positions, all as NumPy arrays.
The second word of a side's name states what the runtime computes:

- `all`: all layers and the head at all tokens, as libraries implement and export BertForMaskedLM
- `head`: all layers at all tokens, the head only at the positions
- `gathered`: all layers but the last at all tokens, the last layer and the head only at the positions

Only `gathered` does the same work as ours. A third word is the dtype (bfloat16 or int8) if it is not float32.
"""

import importlib.util
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Forward = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Token ids int [B, T], mask int [B, T] and positions int [B, K] -> logits float32 [B, K, V]."""

Answer = Callable[[list[str]], list[list[tuple[int, float]]]]
"""Texts with one mask each -> the five most likely tokens for each text, with their scores."""

THREADS = os.cpu_count() or 1
"""Number of threads for PyTorch, ONNX Runtime and OpenVINO; the same as for XLA."""


def export(folder: Path) -> None:
    """Writes `all.onnx` and `gathered.onnx` to a checkpoint's folder."""
    import torch
    import transformers

    class Gathered(torch.nn.Module):
        """BERT from `transformers`, with the last layer and the head computed only at the positions."""

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

    # Not "sdpa", whose export also handles fully masked rows, with operations that the runtimes do not optimize away.
    model = transformers.BertForMaskedLM.from_pretrained(folder, attn_implementation="eager")
    # Three separate tensors, because the export treats a tensor that is passed twice as a single input.
    ids, mask, positions = (torch.ones(shape, dtype=torch.long) for shape in ((2, 16), (2, 16), (2, 3)))
    batch, tokens, count = (torch.export.Dim(name, min=1, max=512) for name in ("batch", "tokens", "count"))
    whole = {0: batch, 1: tokens}
    for name, network, inputs, shapes in [
        ("all", Everything(model), (ids, mask), (whole, whole)),
        ("gathered", Gathered(model), (ids, mask, positions), (whole, whole, {0: batch, 1: count})),
    ]:
        torch.onnx.export(
            network.eval(), inputs, folder / f"{name}.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False,
            input_names=["input_ids", "attention_mask", "positions"][: len(inputs)], output_names=["logits"],
        )  # fmt: skip


def quantize(folder: Path) -> None:
    """Writes int8 versions of `gathered.onnx`: a dynamic version for ONNX Runtime and a calibrated one for OpenVINO."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = folder / "gathered.onnx"
    if (folder / "onnxruntime int8.onnx").exists():
        return
    quantize_dynamic(source, folder / "onnxruntime int8.onnx", weight_type=QuantType.QInt8, per_channel=True)
    if not importlib.util.find_spec("nncf"):
        return
    import nncf
    import openvino

    random = np.random.default_rng(1)
    batches = [{"input_ids": random.integers(1000, 28000, (8, 128)), "attention_mask": np.ones((8, 128), np.int64),
                "positions": random.integers(1, 127, (8, 2))} for _ in range(10)]  # fmt: skip
    model = nncf.quantize(
        openvino.Core().read_model(source), nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=10
    )
    openvino.save_model(model, folder / "openvino int8.xml")


def open_peer(side: str, folder: Path) -> Forward:
    """Opens a side by name, such as "ours" or "openvino gathered int8"."""
    name, graph, dtype = described(side)
    return {"ours": _ours, "transformers": _transformers, "kerashub": _kerashub, "onnxruntime": _onnxruntime,
            "openvino": _openvino, "flaxbert": _flaxbert}[name](folder, graph, dtype)  # fmt: skip


def described(side: str) -> tuple[str, str, str]:
    """Splits the name of a side into the runtime, the computation (such as "gathered") and the dtype."""
    name, *rest = side.split()
    graph, dtype = [*rest, *["gathered", "float32"][len(rest) :]]
    return name, graph, dtype


def open_texts(side: str, folder: Path) -> Callable[[int], Answer]:
    """Opens a side that answers texts: our pipeline, the `transformers` pipeline, or another runtime.

    Returns:
        Batch size -> `Answer`. Ours ignores the batch size. The others take texts in order and pad each batch.
    """
    name, _, dtype = described(side)
    if name == "ours":
        import bert_jax

        fill_mask = bert_jax.pipeline("fill-mask", folder, dtype=dtype)
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
            # One position per row. Ours pads to two, because XLA is slow with one.
            logits = forward(ids, batch["attention_mask"], np.argmax(ids == tokenizer.mask_token_id, 1)[:, None])[:, 0]
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            for row, chosen in zip(p, np.argpartition(-p, 5, axis=-1)[:, :5], strict=True):
                found.append(sorted(((int(t), float(row[t])) for t in chosen), key=lambda entry: -entry[1]))
        return found

    return lambda size: lambda texts: answer(texts, size)


def _at(logits: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.take_along_axis(logits, positions[..., None], axis=1)


def _ours(folder: Path, graph: str, dtype: str) -> Forward:
    import jax

    import bert_jax
    from bert_jax import tree

    params, skeleton = tree.split(bert_jax.BertForMaskedLM.from_pretrained(folder, dtype=dtype))

    @jax.jit
    def program(params: Any, ids: Any, mask: Any, positions: Any) -> Any:
        return tree.merge(skeleton, params)(ids, mask, masked_positions=positions).logits

    def forward(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        inputs = (array.astype(np.int32) for array in (ids, mask, positions))
        return np.asarray(program(params, *inputs))

    return forward


def _transformers(folder: Path, graph: str, dtype: str) -> Forward:
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    if dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    elif dtype == "int8":
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    def forward(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return _at(model(torch.from_numpy(ids), torch.from_numpy(mask)).logits.float().numpy(), positions)

    return forward


def _kerashub(folder: Path, graph: str, dtype: str) -> Forward:
    """KerasHub. Its logits differ slightly from ours: its GELU is the tanh approximation, and one epsilon differs."""
    import jax
    import keras_hub

    import bert_jax

    model = keras_hub.models.BertMaskedLM(keras_hub.models.BertBackbone.from_preset(str(folder)), preprocessor=None)
    ours = bert_jax.BertForMaskedLM.from_pretrained(folder)  # KerasHub does not read the head from a checkpoint
    dense, norm = ours.predictions.transform, ours.predictions.layer_norm
    words = ours.bert.embeddings.word_embeddings.weight
    model.masked_lm_head.set_weights(
        [ours.predictions.bias[...], words[...], dense.weight[...].T, dense.bias[...], norm.weight[...], norm.bias[...]]
    )
    # Not predict_on_batch, which passes the weights in and out in each call.
    state = [[variable.value for variable in variables]
             for variables in (model.trainable_variables, model.non_trainable_variables)]  # fmt: skip
    program = jax.jit(lambda state, inputs: model.stateless_call(*state, inputs, training=False)[0])

    def forward(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        inputs = {
            "token_ids": ids,
            "segment_ids": np.zeros_like(ids),
            "padding_mask": mask,
            "mask_positions": positions,
        }
        return np.asarray(program(state, inputs))

    return forward


def _flaxbert(folder: Path, graph: str, dtype: str) -> Forward:
    """FlaxBert in a separate environment; see flax_peer.py. The pipe to it adds about a millisecond per call."""
    command = [os.environ["BERT_JAX_FLAX_PYTHON"], str(Path(__file__).with_name("flax_peer.py")), str(folder)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def forward(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        assert server.stdin
        assert server.stdout
        pickle.dump((ids, mask, positions), server.stdin)
        server.stdin.flush()
        return pickle.load(server.stdout)

    return forward


def _onnxruntime(folder: Path, graph: str, dtype: str) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()  # all graph optimizations; the offline ones for BERT bring no gain
    options.intra_op_num_threads = THREADS
    file = folder / ("onnxruntime int8.onnx" if dtype == "int8" else f"{graph}.onnx")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def forward(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        inputs = {"input_ids": ids, "attention_mask": mask}
        if graph == "all":
            return _at(session.run(None, inputs)[0], positions)
        return session.run(None, inputs | {"positions": positions})[0]

    return forward


def _openvino(folder: Path, graph: str, dtype: str) -> Forward:
    import openvino

    # By default, OpenVINO computes in bfloat16 if the CPU supports it. The hint THROUGHPUT would divide the cores among
    # parallel requests.
    precision = "bf16" if dtype == "bfloat16" else "f32"  # for operations that are not quantized
    properties = {
        "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"
    }  # fmt: skip
    file = folder / ("openvino int8.xml" if dtype == "int8" else f"{graph}.onnx")
    model = openvino.compile_model(openvino.Core().read_model(file), "CPU", properties)

    def forward(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        inputs = [ids, mask] if graph == "all" else [ids, mask, positions]
        logits = model(inputs, share_outputs=True)[0]  # overwritten by the next call; a full copy is slow
        return _at(logits, positions) if graph == "all" else logits.copy()

    return forward
