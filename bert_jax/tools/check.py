"""Checks a machine: compares the outputs of its devices with reference outputs and measures the devices' speed.

The reference outputs in `check.safetensors` were computed by PyTorch `transformers` in float64 from the embedded model
(`bert-mini-cased`); see `scripts/make_golden.py`. The tolerance is tight enough to detect matrix products that are
computed in a lower precision than float32. TPUs and some GPUs use a lower precision by default.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

import bert_jax
from bert_jax import attention, hub, processor, sharding, tree, weights
from bert_jax.attention import Attended
from bert_jax.data.loader import Examples
from bert_jax.losses import cross_entropy
from bert_jax.quantization import DTYPES, hold
from bert_jax.tasks.sequence_classification import SequenceClassification
from bert_jax.tokenizer import Tokenizer
from bert_jax.tools import aot
from bert_jax.tools.report import table
from bert_jax.training import loop, optim, step

MODEL = "bert-mini-cased"
MARKS = {True: "✓", False: "✗", None: ""}
LABELS = ["odd", "even"]
GOLDEN = Path(__file__).parent / "check.safetensors"
EXACT = 1e-5
"""The maximum allowed error of float32 results, relative to 1 plus the absolute value of the expected number."""
ERRORS = {"bfloat16": 0.03, "int8": 0.06}
"""The maximum allowed relative error of the logits in each dtype: ‖x − reference‖ / ‖reference‖."""
FUSED_ERROR = 2e-2
"""The maximum allowed error of a fused kernel in bfloat16, relative to the largest absolute value in the result."""
PEAKS = {
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), aot.CHIPS["v5e"].flops),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), aot.CHIPS["v6e"].flops),
    **dict.fromkeys(("TPU v5", "TPU v5p"), aot.CHIPS["v5p"].flops),
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), aot.CHIPS["h100"].flops),
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), 312e12),
    "TPU v4": 275e12, "NVIDIA L4": 121e12, "NVIDIA B200": 2250e12,
}  # fmt: skip
"""The published rate of bfloat16 matrix products on each kind of device, in operations per second without sparsity.

Sources: cloud.google.com/tpu/docs and NVIDIA's data sheets.
"""
BASE = bert_jax.BertConfig()
LARGE = bert_jax.BertConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of the report.

    Attributes:
        part: The part of the report to which the row belongs.
        what: The computed or measured quantity.
        found: The result.
        expected: The expected result; empty if there is none.
        passed: Whether the result is as expected; None if there is no expected result, or if this machine cannot
            compute the result.
    """

    part: str
    what: str
    found: str
    expected: str = ""
    passed: bool | None = None


def check() -> Iterator[Row]:
    """Yields the rows of the report one after another.

    The first row takes several seconds, because a separate process first stops and resumes a training run. That process
    runs first because it needs exclusive access to the devices.
    """
    resumed = _resume_elsewhere()  # before this process takes the devices
    for part in (machine, goldens, dtypes, kernels, lambda: [resumed], layouts, speed):
        try:
            yield from part()
        except Exception as error:  # after any error, the other parts can still be checked
            reason = (str(error).splitlines() or [""])[0]
            yield Row("stopped", getattr(part, "__name__", ""), f"{type(error).__name__}: {reason}", "", False)


def _row(part: str, what: str, error: float, limit: float) -> Row:
    return Row(part, what, f"{error:.1e}", f"≤ {limit:.0e}", bool(error <= limit))


def _error(found: Any, expected: Any) -> float:
    """Returns the largest error, relative to 1 plus the absolute value of the expected number.

    Returns infinity if any difference is not finite.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    difference = np.abs(found - expected) / (1 + np.abs(expected))
    return float(difference.max()) if np.isfinite(difference).all() else np.inf


def machine() -> Iterator[Row]:
    """Reports the package versions, the devices, and whether bfloat16 and int8 should be faster than float32."""
    part = "machine"
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    yield Row(
        part,
        "versions",
        f"Python {sys.version.split()[0]}, bert-jax {bert_jax.__version__}, "
        + ", ".join(f"{name} {metadata.version(name)}" for name in packages),
    )
    devices = jax.devices()
    yield Row(part, "devices", f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})")
    for dtype in DTYPES[1:]:
        yield Row(part, dtype, processor.speed(dtype))


def markdown(rows: Sequence[Row]) -> str:
    """Returns the report as a Markdown table."""
    cells = [[row.part, row.what, row.found, row.expected, MARKS[row.passed]] for row in rows]
    return table(["", "", "found", "expected", ""], cells) + "\n"


# ── Numbers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def _golden() -> dict[str, Any]:
    golden: dict[str, Any] = load_file(GOLDEN)
    return golden


def _inputs() -> dict[str, Any]:
    return {name: _golden()[name] for name in ("input_ids", "attention_mask", "token_type_ids", "masked_positions")}


def _loss(skeleton: tree.Skeleton, flat: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> tuple[jax.Array, Any]:
    """Returns the pretraining loss of a batch, and the model's output."""
    labels = dict(batch)
    mlm, following = labels.pop("labels"), labels.pop("next_sentence_label")
    out = tree.merge(skeleton, tree.unflatten(dict(flat)))(**labels)
    return cross_entropy(out.prediction_logits, mlm) + cross_entropy(out.seq_relationship_logits, following), out


def goldens() -> Iterator[Row]:
    """Compares the embedded model's outputs and gradients in float32 with those of PyTorch `transformers`."""
    part, golden = "float32 compared with PyTorch", _golden()
    params, skeleton = tree.split(bert_jax.BertForPreTraining.from_pretrained(MODEL))
    batch = _inputs() | {name: golden[name] for name in ("labels", "next_sentence_label")}
    program = jax.jit(jax.value_and_grad(functools.partial(_loss, skeleton), has_aux=True))
    (loss, out), gradients = program(tree.flatten(params), batch)
    for name, found in {
        "hidden states": jnp.stack(out.hidden_states[:-1]),
        "logits of words": out.prediction_logits,
        "logits of the next sentence": out.seq_relationship_logits,
        "loss": loss,
    }.items():
        yield _row(part, name, _error(found, golden[name]), EXACT)
    paths = dict(zip(gradients, weights.published_names(gradients), strict=True))
    vectors = {path: name for path, name in paths.items() if gradients[path].ndim == 1}
    worst = max(_error(gradients[path], golden[f"gradient {name}"]) for path, name in vectors.items())
    yield _row(part, f"gradients of {len(vectors)} vectors", worst, EXACT)
    norms = {path: float(jnp.linalg.norm(gradients[path].astype(jnp.float32))) for path in paths}
    worst = max(_error(norms[path], golden[f"norm {name}"]) for path, name in paths.items())
    yield _row(part, f"norms of {len(paths)} gradients", worst, EXACT)


def dtypes() -> Iterator[Row]:
    """Compares the embedded model's logits in bfloat16 and int8 with the reference logits."""
    expected = _golden()["logits of words"]
    for dtype, limit in ERRORS.items():
        params, skeleton = tree.split(bert_jax.BertForPreTraining.from_pretrained(MODEL, dtype=dtype))  # type: ignore[arg-type]
        found = jax.jit(lambda params, batch, skeleton=skeleton: tree.merge(skeleton, params)(**batch))(
            params, _inputs()
        )
        logits = np.asarray(found.prediction_logits, np.float32)
        error = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
        same = np.mean(logits.argmax(-1) == expected.argmax(-1))
        yield _row("bfloat16 and int8", f"logits in {dtype}; first choice the same in {same:.0%}", error, limit)


def kernels() -> Iterator[Row]:
    """Compares fused kernels with plain attention: outputs and gradients for full, padded and packed rows."""
    part, platform = "fused attention", jax.default_backend()
    for name, (hardware, needed) in attention.FUSED.items():
        dtype, limit, kernel = jnp.bfloat16, FUSED_ERROR, attention.ATTENTION[name]
        where = ""
        if name in attention.BLOCKS and platform == "cpu":
            dtype, limit, where = jnp.float32, EXACT, ", interpreted"
            kernel = functools.partial(kernel, interpret=True)
        elif platform != needed:
            yield Row(part, name, f"not run: it needs {hardware}")
            continue
        for rows in ("full", "padded", "packed"):
            if rows == "packed" and name in attention.UNPACKED:
                yield Row(part, f"{name}, packed rows", "not supported")
                continue
            errors = _kernel_errors(kernel, rows, dtype)
            for what, error in errors.items():
                yield _row(part, f"{name}{where}, {rows} rows: {what}", error, limit)


def _kernel_errors(kernel: Callable[..., Any], rows: str, dtype: Any) -> dict[str, float]:
    tokens, lengths = 256, np.array([256, 100])
    arrays = [
        jax.random.normal(key, (2, tokens, 4, 64)).astype(dtype) for key in jax.random.split(jax.random.key(0), 3)
    ]
    real = (np.arange(tokens)[None] < lengths[:, None]).astype(np.int32)
    documents = jnp.asarray(real * (1 + np.arange(tokens)[None] // 50))
    attended = {
        "full": None,
        "padded": Attended(jnp.ones((2, 1), jnp.int32), jnp.asarray(real)),
        "packed": Attended(documents, documents),
    }[rows]

    def loss(kernel: Callable[..., Any], *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        context = kernel(*arrays, attended, 0.0, None)[0].astype(jnp.float32)
        context = context * jnp.asarray(real, jnp.float32)[:, :, None, None]  # ignores the outputs for padding
        return jnp.sum(jnp.sin(context)), context

    def results(kernel: Callable[..., Any], arrays: Any) -> tuple[Any, Any]:
        program = jax.jit(jax.value_and_grad(functools.partial(loss, kernel), argnums=(0, 1, 2), has_aux=True))
        (_, context), gradients = program(*arrays)
        return context, gradients

    def error(found: jax.Array, expected: jax.Array) -> float:
        difference = jnp.max(jnp.abs(found.astype(jnp.float32) - expected)) / jnp.max(jnp.abs(expected))
        return float(difference) if jnp.isfinite(difference) else np.inf

    context, gradients = results(kernel, arrays)
    exact, exact_gradients = results(attention.plain_attention, [array.astype(jnp.float32) for array in arrays])
    return {"context": error(context, exact), "gradients": max(map(error, gradients, exact_gradients))}


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _examples(
    config: bert_jax.BertConfig, count: int, length: int, *, full: bool
) -> tuple[SequenceClassification, Examples]:
    """Returns a task and its examples, which have different lengths or, if `full` is true, exactly `length` tokens."""
    task = SequenceClassification(Tokenizer.from_pretrained(MODEL), config, max_length=length)
    words = [length if full else 1 + 7 * n % 20 for n in range(count)]
    rows = [{"text": "a word " * words[n], "label": LABELS[n % 2]} for n in range(count)]
    return task, task.featurize(rows)


def _resume_elsewhere() -> Row:
    """Stops and resumes a training run in a separate process, with deterministic operations on GPUs."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    command = [sys.executable, "-m", "bert_jax.tools.check"]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags.strip()}, capture_output=True, text=True, check=False
    )
    found = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr.strip()[-200:]
    return Row("training", "a run that was stopped and resumed", found, "bit for bit", found == "bit for bit")


def _resume() -> str:
    """Compares the parameters of a run of six training steps with those of a run that is resumed after three steps."""
    model = bert_jax.BertForSequenceClassification.from_pretrained(MODEL, new=[r"classifier\..*"], id2label=LABELS)
    task, examples = _examples(model.config, 32, 32, full=False)

    def train(steps: int, folder: Path | None) -> loop.Trained:
        mesh = sharding.mesh(devices=jax.local_devices()[:1])
        return loop.train(model, task, examples, optim.adamw(1e-3), steps=steps, batch_size=8, folder=folder, mesh=mesh)

    with tempfile.TemporaryDirectory() as name:
        train(3, Path(name))
        resumed = train(6, Path(name)).trained
    whole = train(6, None).trained
    different = [path for path in whole if not np.array_equal(whole[path], resumed[path])]
    return f"{len(different)} of {len(whole)} arrays differ" if different else "bit for bit"


def layouts() -> Iterator[Row]:
    """Compares the loss and gradients of a batch on meshes of all local devices with those on one device."""
    part, devices = "several devices", jax.local_devices()
    n = len(devices)
    if n == 1:
        yield Row(part, "layouts", "not run: there is one device")
        return
    shapes: list[dict[str, int]] = [{"data": n}, {"data": 1, "fsdp": n}]
    if n % 2 == 0:
        shapes.append({"data": n // 2, "tensor": 2})
    if n % 4 == 0:
        shapes.append({"data": n // 4, "fsdp": 2, "tensor": 2})
    params, skeleton = tree.split(bert_jax.BertForPreTraining.from_pretrained(MODEL))
    golden = _golden()
    batch = _inputs() | {name: golden[name] for name in ("labels", "next_sentence_label")}
    batch = {name: np.tile(array, (n, *[1] * (array.ndim - 1))) for name, array in batch.items()}
    flat = tree.flatten(params)

    def results(mesh: jax.sharding.Mesh) -> Any:
        def program(flat: Any, batch: Any) -> tuple[Any, Any]:
            (loss, _), gradients = jax.value_and_grad(functools.partial(_loss, skeleton), has_aux=True)(flat, batch)
            return loss, gradients

        with jax.set_mesh(mesh):
            placed = sharding.put(flat, sharding.placements(mesh, flat))
            return jax.device_get(jax.jit(program)(placed, sharding.put_batch(batch, mesh)))

    expected = results(sharding.mesh(devices=devices[:1]))
    for sizes in shapes:
        errors = jax.tree.map(_error, results(sharding.mesh(**sizes, devices=devices)), expected)
        name = " · ".join(f"{axis} {size}" for axis, size in sizes.items())
        yield _row(part, f"loss and gradients, {name}", max(jax.tree.leaves(errors)), EXACT)


# ── Speed ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def speed() -> Iterator[Row]:
    """Measures training and inference speed on one device, in tokens/s and as a share of the peak rate."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        peak = _product_rate()
        yield Row("speed", "float32 product of 2,048 × 2,048 matrices", f"{peak / 1e9:,.0f} GFLOP/s")
        embedded = bert_jax.BertConfig.from_file(hub.EMBEDDED / MODEL / hub.CONFIG_FILE)
        cases = [("embedded", embedded, 8, 128), ("base", BASE, 8, 128)]
        dtype, of = "float32", "of that rate"
    else:
        peak = PEAKS.get(device.device_kind, 0.0)
        cases = [
            ("base", BASE, 256, 128),
            ("base", BASE, 64, 512),
            ("large", LARGE, 128, 128),
            ("large", LARGE, 32, 512),
        ]
        dtype, of = "bfloat16", "of the published peak"
    for name, config, rows, tokens in cases:
        for measure in (inference, training):
            yield _measured(f"{name}, {dtype}, rows of {tokens}", measure, config, dtype, rows, tokens, peak, of)


def _measured(
    what: str,
    measure: Callable[..., tuple[float, Any, float]],
    config: bert_jax.BertConfig,
    dtype: Any,
    rows: int,
    tokens: int,
    peak: float,
    of: str,
) -> Row:
    """Returns the measured speed. If the device runs out of memory, halves the number of rows and measures again."""
    while True:
        try:
            seconds, sizes, flops = measure(config, dtype, rows, tokens)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or rows == 1:
                raise
            rows //= 2
            continue
        found = f"{rows * tokens / seconds:,.0f} tokens/s"
        found += f", {flops / seconds / peak:.0%} {of}" if peak else "; the peak of this device is not known"
        found += f"; {_memory(sizes)}"
        return Row("speed", f"{measure.__name__}, {what} × {rows}", found)


def _memory(sizes: Any) -> str:
    predicted = (
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
    )
    words = f"{predicted / aot.GIB:.2f} GiB predicted"
    reported = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return words + (f", {reported / aot.GIB:.2f} GiB at the peak so far" if reported else "")


def inference(
    config: bert_jax.BertConfig, dtype: Any, rows: int, tokens: int, attention: Any = "plain"
) -> tuple[float, Any, float]:
    """Measures inference with a masked language model. Each row has two masked positions.

    Returns:
        The seconds per call, the program's memory use, and the number of operations in its matrix products.
    """
    model = bert_jax.BertForMaskedLM(config, attention=attention)
    hold(model.encoder, dtype)
    _, skeleton = tree.split(model)
    params = tree.unflatten(jax.jit(_random, static_argnums=0)(tuple(skeleton.specs.items())))
    ids = np.random.default_rng(0).integers(1000, config.vocab_size, (rows, tokens), np.int32)

    def logits(params: tree.Params, ids: jax.Array) -> jax.Array:
        found: jax.Array = tree.merge(skeleton, params)(ids, masked_positions=jnp.array([[1, 2]])).logits
        return found

    traced = jax.jit(logits).trace(params, ids)
    compiled = traced.lower().compile()
    return _seconds(lambda: compiled(params, ids)), compiled.memory_analysis(), _flops(traced)


def _flops(traced: jax.stages.Traced) -> float:
    return sum(flops for _, flops in aot.products(traced).values())


def _random(specs: tuple[tuple[str, jax.ShapeDtypeStruct], ...]) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(specs))
    return {path: 0.02 * jax.random.normal(key, s.shape, s.dtype) for (path, s), key in zip(specs, keys, strict=True)}


def training(
    config: bert_jax.BertConfig, dtype: Any, rows: int, tokens: int, attention: Any = "plain"
) -> tuple[float, Any, float]:
    """Measures the training of a text classifier.

    Returns:
        The seconds per step, the program's memory use, and the number of operations in its matrix products.
    """
    config = config.replace(id2label=LABELS)
    options: dict[str, Any] = {"compute_dtype": dtype, "attention": attention}
    model = nnx.jit(lambda: bert_jax.BertForSequenceClassification(config, rngs=nnx.Rngs(0), **options))()
    task, examples = _examples(config, rows, tokens, full=True)
    mesh = sharding.mesh(devices=jax.local_devices()[:1])
    run = loop.set_up(model, task, examples, optim.adamw(1e-5), batch_size=rows, packing=False, mesh=mesh)
    traced = run.trace(run.loader.place(0).shape)
    compiled = traced.lower().compile()
    state = sharding.put(step.init_state(run.plan, 0), run.layout)
    frozen = sharding.put(run.plan.frozen, sharding.placements(mesh, run.plan.frozen))
    batch = sharding.put_batch(run.loader.batch_at(0), mesh)

    def one() -> Any:
        nonlocal state
        state, metrics = compiled(state, frozen, batch)
        return metrics

    return _seconds(one), compiled.memory_analysis(), _flops(traced)


def _product_rate() -> float:
    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    return 2 * 2048**3 / _seconds(lambda: product(x), least=1.0)


def _seconds(call: Callable[[], Any], least: float = 2.0) -> float:
    """Returns the mean time per call in seconds. The measured calls take at least `least` seconds in total."""
    jax.block_until_ready(call())
    count, began = 0, time.perf_counter()
    while count < 2 or time.perf_counter() - began < least:
        # Four calls are in flight at a time, so that the device does not wait for the host.
        jax.block_until_ready([call() for _ in range(4 if jax.default_backend() != "cpu" else 1)])
        count += 4 if jax.default_backend() != "cpu" else 1
    return (time.perf_counter() - began) / count


if __name__ == "__main__":
    print(_resume())
