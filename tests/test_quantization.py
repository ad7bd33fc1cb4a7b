"""Models held in bfloat16 and int8: their parameters, their outputs beside float32's, and what they refuse."""

import logging
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from safetensors.numpy import load_file, save_file

import bert_jax
from bert_jax import hub, processor, tree
from bert_jax.errors import CheckpointError, InputError
from bert_jax.evaluation import held_out
from bert_jax.inference.server import models
from bert_jax.quantization import quantized_product
from bert_jax.server_settings import Serving
from bert_jax.settings import HeldOut, Pretraining, Settings
from bert_jax.training import lora, step

HEADS = ["BertModel", "BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction",
         "BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering"]  # fmt: skip
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def load(folder, architecture="BertForMaskedLM", **options):
    return getattr(bert_jax, architecture).from_pretrained(folder, **options)


def changed(folder, tmp_path, **tensors):
    """A copy of a folder with other tensors."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    file = copy / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})
    return copy


# ── The parameters ──


def test_each_row_of_an_int8_weight_has_its_own_scale(checkpoint):
    folder = checkpoint("BertForMaskedLM")
    tensors = load_file(folder / "model.safetensors")
    model = load(folder, dtype="int8")
    for held, name in [
        (model.bert.layers[0].attention.query, QUERY),
        (model.bert.layers[1].intermediate, "bert.encoder.layer.1.intermediate.dense.weight"),
        (model.bert.embeddings.word_embeddings, "bert.embeddings.word_embeddings.weight"),
    ]:
        weight, scale = np.asarray(held.weight[...]), np.asarray(held.scale[...])
        assert (weight.dtype, scale.dtype) == (np.int8, np.float32)
        np.testing.assert_allclose(scale, np.abs(tensors[name]).max(axis=1) / 127, rtol=1e-6)
        assert np.abs(weight).max(axis=1).tolist() == [127] * len(weight)
        np.testing.assert_allclose(held.total[...], (weight * scale[:, None]).sum(axis=1), atol=1e-6)
        assert np.all(np.abs(weight * scale[:, None] - tensors[name]) <= scale[:, None] * 0.5001)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_is_held_in_fewer_bytes(checkpoint, dtype):
    _, skeleton = tree.split(load(checkpoint(), "BertForPreTraining", dtype=dtype))
    small = {path for path, spec in skeleton.specs.items() if spec.dtype == dtype}
    linear = [*(f"attention.{name}" for name in ("query", "key", "value", "output")), "intermediate", "output"]
    layers = range(reference.config(None)["num_hidden_layers"])
    expected = {f"bert.layers.{i}.{name}.weight" for i in layers for name in linear}
    assert small == {"bert.embeddings.word_embeddings.weight", *expected}
    assert {spec.dtype.name for path, spec in skeleton.specs.items() if path not in small} == {"float32"}


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_float16_and_bfloat16_files(checkpoint, tmp_path, kind, dtype):
    folder = checkpoint("BertForMaskedLM")
    short = {name: tensor.astype(kind) for name, tensor in load_file(folder / "model.safetensors").items()}
    long = {name: tensor.astype(np.float32) for name, tensor in short.items()}
    ours, theirs = (
        load(changed(folder, tmp_path / name, **tensors), dtype=dtype)(**reference.inputs()).logits
        for name, tensors in (("short", short), ("long", long))
    )
    assert np.array_equal(ours, theirs)


# ── The outputs ──


def test_the_product_is_exact_but_for_the_rounding_of_x():
    random = np.random.default_rng(0)
    x = (random.standard_normal((3, 5, 64)) * 10.0 ** random.integers(-3, 4, (3, 5, 1))).astype(np.float32)
    weight = random.integers(-127, 128, (32, 64)).astype(np.int8)
    scale = random.uniform(0.1, 1, 32).astype(np.float32)
    x[0, 0] = 0
    x[0, 1], x[0, 2] = 7, abs(x[0, 2])
    low, high = (function(x, axis=-1, keepdims=True) / np.float32(2) for function in (np.min, np.max))
    middle, step = low + high, np.maximum(high - low, np.float32(1e-30)) / 127
    rounded = np.rint((x - middle) * (np.float32(1) / step)).astype(np.float64) * step + middle
    assert np.all(abs(rounded - x) <= 0.501 * step)
    exact = (scale[:, None] * weight).astype(np.float64)
    total = exact.sum(axis=1).astype(np.float32)
    found = jax.jit(quantized_product)(x, weight, scale, total)
    assert np.all(abs(found - rounded @ exact.T) <= 1e-6 * (abs(rounded - middle) + abs(middle)) @ abs(exact.T))
    assert np.isnan(quantized_product(jnp.full((1, 64), jnp.nan), weight, scale, total)).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02), ("int8", 0.05)])
@pytest.mark.parametrize("architecture", HEADS)
def test_outputs_are_near_those_of_float32(checkpoint, architecture, dtype, tolerance):
    exact, rough = (load(checkpoint(architecture), architecture, dtype=held) for held in ("float32", dtype))
    assert (exact.dtype, rough.dtype) == ("float32", dtype)
    for a, b in zip(*(jax.tree.leaves(m(**reference.inputs())) for m in (exact, rough)), strict=True):
        assert np.linalg.norm(a - b.astype(jnp.float32)) < tolerance * np.linalg.norm(a)
        assert not np.array_equal(a, b)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("int8", marks=pytest.mark.slow)])
def test_layers_as_one_loop(checkpoint, dtype):
    # Compiled, because int8 rounds: where products differ by 1e-7, some activations get another level.
    run = nnx.jit(lambda model: model(**reference.inputs()).logits)
    plain, scanned = (run(load(checkpoint("BertForMaskedLM"), dtype=dtype, scan_layers=scan)) for scan in (False, True))
    assert np.linalg.norm(plain - scanned) < (0.02 if dtype == "bfloat16" else 1e-5) * np.linalg.norm(plain)


def test_an_id_out_of_range_gives_nan(checkpoint):
    words = load(checkpoint("BertForMaskedLM"), dtype="int8").bert.embeddings.word_embeddings
    assert np.isnan(jax.jit(lambda ids: words(ids))(jnp.array([10**6]))).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_pipelines_pack_and_batch(dtype):
    pipe = bert_jax.pipeline("fill-mask", "bert-mini-cased", dtype=dtype)
    assert pipe.dtype == dtype
    texts = ["Paris is the [MASK] of France.", "He [MASK] to school."] * 4
    exact = bert_jax.pipeline("fill-mask", "bert-mini-cased")(texts)
    for found, expected in zip(pipe(texts), exact, strict=True):
        assert found[0]["token_str"] == expected[0]["token_str"]
        assert found[0]["score"] == pytest.approx(expected[0]["score"], abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "more"), [("bfloat16", 0.01), ("int8", 0.05)])
def test_likelihoods_of_masked_tokens(dtype, more):
    texts = ["Paris is the capital of France.", "She went to school, and he stayed at home with the children."] * 5
    exact, rough = (
        held_out.evaluate(["bert-mini-cased"], texts, words="each", resamples=2, dtype=held)["bert-mini-cased"]
        for held in ("float32", dtype)
    )
    assert rough["nll"]["value"] != exact["nll"]["value"]
    assert abs(rough["nll"]["value"] - exact["nll"]["value"]) < more
    assert rough["mrr"]["value"] == pytest.approx(exact["mrr"]["value"], abs=0.05)


def test_a_server_holds_its_models_so(tmp_path):
    served = models.load("m", hub.download("bert-mini-cased"), tasks=["fill-mask", "feature-extraction"], dtype="int8")
    assert [pipe.dtype for pipe in served.pipes.values()] == ["int8", "int8"]
    settings = Serving.from_dict({"dtype": "bfloat16"})
    assert settings.dtype == "bfloat16"


# ── What is refused ──


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16'; expected one of float32, bfloat16, int8"),
        ({"dtype": np.dtype("int8")}, "expected one of float32, bfloat16, int8"),
        ({"dtype": "int8", "attention": "splash"}, "attention is 'splash', which computes in bfloat16; dtype='int8'"),
        (
            {"compute_dtype": "bfloat16"},
            "BertForMaskedLM.from_pretrained has no argument 'compute_dtype'; pass dtype, for inference",
        ),
        ({"dtype": "int8", "new": ["predictions.*"]}, "dtype is 'int8', which is for inference; `new` parameters"),
    ],
)
def test_invalid_options(checkpoint, options, message):
    with pytest.raises(InputError, match=message):
        load(checkpoint("BertForMaskedLM"), **options)


def test_former_names():
    with pytest.raises(InputError, match="pipeline has no argument 'compute_dtype'; pass dtype"):
        bert_jax.pipeline("fill-mask", "bert-mini-cased", compute_dtype="bfloat16")
    with pytest.raises(InputError, match="compute_dtype: the setting is now dtype"):
        Serving.from_dict({"compute_dtype": "bfloat16"})
    for kind in (Settings, Pretraining):
        with pytest.raises(InputError, match="compute_dtype: there is no such setting"):
            kind.from_dict({"compute_dtype": "bfloat16"})
    with pytest.raises(InputError, match="precision: the setting is now dtype"):
        HeldOut.from_dict({"task": "fill-mask", "precision": {"compute_dtype": "bfloat16"}})


def test_a_loaded_model_keeps_its_dtype(checkpoint, tokenizer):
    model = bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased", dtype="int8")
    assert bert_jax.pipeline("fill-mask", model, tokenizer=tokenizer).dtype == "int8"
    assert bert_jax.pipeline("fill-mask", model, tokenizer=tokenizer, dtype="int8").dtype == "int8"
    for options in ({"dtype": "bfloat16"}, {"dtype": "float32"}, {"revision": "main"}, {"ignore": ["x"]}):
        with pytest.raises(InputError, match="but the model is loaded already"):
            bert_jax.pipeline("fill-mask", model, tokenizer=tokenizer, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_only_float32_is_trained_saved_and_resized(checkpoint, tmp_path, dtype):
    model = load(checkpoint("BertForMaskedLM"), dtype=dtype)
    for call, purpose in [
        (lambda: model.save_pretrained(tmp_path / "out"), "save_pretrained"),
        (lambda: model.resize_embeddings(100), "resize_embeddings"),
        (lambda: step.plan(model, optax.sgd(0.1)), "training"),
        (lambda: lora.load_adapters(tmp_path, model), "load_adapters"),
    ]:
        with pytest.raises(InputError, match=f"is loaded in {dtype}, but {purpose} requires float32"):
            call()
    assert not (tmp_path / "out").exists()


def test_the_activations_fit_the_weights(checkpoint):
    for dtype, other in (("float32", "bf16"), ("bfloat16", "float32"), ("int8", "bfloat16")):
        model = load(checkpoint("BertForMaskedLM"), dtype=dtype)
        model.encoder.compute_dtype = other
        with pytest.raises(
            InputError, match=f"compute_dtype is '{other}'; expected .*, because the weights are {dtype}"
        ):
            model(**reference.inputs())


def test_int8_has_no_gradients(checkpoint):
    model = load(checkpoint("BertForMaskedLM"), dtype="int8")
    vectors = jnp.ones((1, 4, model.config.hidden_size))
    with pytest.raises(InputError, match=r"int8 models do not support gradients\. Load the model with dtype='float32'"):
        jax.grad(lambda v: model(inputs_embeds=v).logits.sum())(vectors)
    graph, state = nnx.split(model)
    with pytest.raises(InputError, match="do not support gradients"):
        jax.jvp(lambda v: nnx.merge(graph, state)(inputs_embeds=v).logits, (vectors,), (vectors,))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(checkpoint, tmp_path, value):
    folder = checkpoint("BertForMaskedLM")
    query = load_file(folder / "model.safetensors")[QUERY]
    query[1, 2] = value
    for dtype in ("bfloat16", "int8"):
        with pytest.raises(CheckpointError, match=f"NaN or infinity, in {QUERY}"):
            load(changed(folder, tmp_path / dtype, **{QUERY: query}), dtype=dtype)


def test_zeros_and_tiny_values(checkpoint, tmp_path):
    folder = checkpoint("BertForMaskedLM")
    query = load_file(folder / "model.safetensors")[QUERY]
    query[0], query[1] = 0, 1e-42
    held = load(changed(folder, tmp_path, **{QUERY: query}), dtype="int8").bert.layers[0].attention.query
    assert not np.any(held.weight[...][:2])
    assert np.all(np.asarray(held.scale[...]) > 0)


def test_weights_whose_products_overflow(tmp_path):
    folder = hub.download("bert-mini-cased")
    name = "bert.encoder.layer.0.output.dense.weight"
    tensors = load_file(folder / "model.safetensors")
    weight = tensors[name].astype(np.float32)
    weight[:, 0] = 3e38
    pipe = bert_jax.pipeline("fill-mask", changed(folder, tmp_path, **{name: weight}), dtype="int8")
    with pytest.raises(CheckpointError, match="not finite"):
        pipe("a [MASK]")


# ── What pays ──


@pytest.mark.parametrize(
    ("text", "jaxlib", "bfloat16", "int8"),
    [
        ("flags\t\t: fpu avx512_bf16 avx512_vnni\n", "0.12.1", "should be faster", "should be faster"),
        ("Features\t: fp asimddp bf16\n", "0.13", "should be faster", "should be faster"),
        ("flags : fpu avx512_vnni\n", "0.12.0.1", "this processor has no bfloat16 instructions", "should be faster"),
        (
            "flags : fpu avx512_vnni\n",
            "0.10.2",
            "this processor has no",
            "with jaxlib 0.10.2; install jaxlib 0.12 or newer",
        ),
        ("flags : avx2\n", "0.12", "no bfloat16 instructions", "this processor has no int8 instructions"),
        ("", "0.12", "this processor has no", "this processor has no"),
        (None, "0.12", "may be faster", "may be faster"),
    ],
)
def test_what_is_said_of_a_processor(tmp_path, monkeypatch, caplog, text, jaxlib, bfloat16, int8):
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor.metadata, "version", {"jaxlib": jaxlib}.get)
    if text is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{text}")
    processor.warn_if_slow.cache_clear()
    for dtype, words in (("bfloat16", bfloat16), ("int8", int8)):
        assert words in processor.speed(dtype)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            processor.warn_if_slow(dtype)
            processor.warn_if_slow(dtype)
        slow = not words.startswith(("should be", "may be"))
        assert len(caplog.messages) == slow
    processor.warn_if_slow.cache_clear()
