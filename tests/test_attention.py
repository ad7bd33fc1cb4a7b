import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bert_jax
from bert_jax import attention, model, sharding
from bert_jax.attention import Attended, plain_attention
from bert_jax.errors import InputError

TOKENS = 256
INTERPRETED = {name: functools.partial(attention.ATTENTION[name], interpret=True) for name in ("splash", "triton")}


def operands(rows=2, heads=4, size=16, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (rows, TOKENS, heads, size), dtype) for key in keys]


def attended(kind, rows=2):
    lengths = np.linspace(TOKENS, 3, rows).astype(int)
    keys = (np.arange(TOKENS)[None] < lengths[:, None]).astype(np.int32)
    if kind == "padded":
        return Attended(jnp.ones((rows, 1), jnp.int32), jnp.asarray(keys))
    documents = jnp.asarray(keys * (1 + np.arange(TOKENS)[None] // 50))
    return Attended(documents, documents) if kind == "packed" else None


@pytest.mark.parametrize("name", INTERPRETED)
@pytest.mark.parametrize("kind", ["full", "padded", "packed"])
def test_a_fused_kernel_is_plain_attention_and_so_are_its_gradients(kind, name):
    real = 1 if (who := attended(kind)) is None else (who.keys > 0)[:, :, None, None]

    def loss(kernel, *arrays):
        context = kernel(*arrays, who, 0.0, None)[0] * real  # nobody reads the contexts of padding
        return jnp.sum(jnp.sin(context)), context

    results = [
        jax.jit(jax.value_and_grad(functools.partial(loss, kernel), argnums=(0, 1, 2), has_aux=True))(*operands())
        for kernel in (plain_attention, INTERPRETED[name])
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERPRETED)
def test_a_fused_kernel_in_bfloat16(name):
    def loss(kernel, *arrays):
        return jnp.sum(jnp.sin(kernel(*arrays, attended("packed"), 0.0, None)[0].astype(jnp.float32)))

    halves = operands(dtype=jnp.bfloat16)
    found = jax.grad(functools.partial(loss, INTERPRETED[name]), argnums=(0, 1, 2))(*halves)
    whole = [array.astype(jnp.float32) for array in halves]
    expected = jax.grad(functools.partial(loss, plain_attention), argnums=(0, 1, 2))(*whole)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(np.asarray(a, np.float32) - b).max() <= 2e-2 * np.abs(b).max()


@pytest.mark.parametrize("name", INTERPRETED)
def test_a_fused_kernel_takes_rows_and_heads_where_they_live(name):
    mesh = sharding.mesh(data=2, fsdp=2, tensor=2)
    arrays, who = operands(rows=4), attended("packed", rows=4)
    expected, _ = plain_attention(*arrays, who, 0.0, None)
    with jax.set_mesh(mesh):
        program = jax.jit(lambda *arrays: INTERPRETED[name](*arrays, who, 0.0, None)[0]).lower(*arrays).compile()
        real = np.asarray(who.keys > 0)
        np.testing.assert_allclose(np.asarray(program(*arrays))[real], expected[real], rtol=1e-5, atol=1e-5)


def test_a_mask_of_numbers():
    who = Attended(jnp.array([[1], [1]]), jnp.array([[1, 1, 0], [1, 0, 0]]))
    np.testing.assert_array_equal(who.mask(), np.array([[[[1, 1, 0]]], [[[1, 0, 0]]]], bool))


@pytest.mark.parametrize("name", INTERPRETED)
@pytest.mark.parametrize("options", [{}, {"remat": True, "scan_layers": True}], ids=str)
def test_a_model_with_a_fused_kernel_is_the_model(monkeypatch, options, name):
    """Packed rows, and a last layer that computes the first tokens alone."""
    monkeypatch.setitem(attention.ATTENTION, name, INTERPRETED[name])
    monkeypatch.setattr(model, "check", lambda *_, **__: None)
    config = bert_jax.BertConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        attention_probs_dropout_prob=0.0,
    )
    ids = np.random.default_rng(0).integers(1000, 20000, (2, 128))
    inputs = {"document_ids": np.arange(128)[None] // [[30], [50]], "positions": np.array([[0, 30], [0, 50]])}
    logits = [
        bert_jax.BertForSequenceClassification(config, rngs=nnx.Rngs(0), attention=name, **options)(
            ids, **inputs, dropout_key=jax.random.key(1)
        ).logits
        for name in ("plain", name)
    ]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


# ── The choice ──


@pytest.mark.parametrize(
    ("facts", "kernel", "why"),
    [
        ({"platform": "tpu"}, "splash", "the devices are TPUs"),
        ({"platform": "gpu"}, "triton", "the devices are NVIDIA GPUs"),
        ({"platform": "gpu", "length": 256}, "triton", "the devices are NVIDIA GPUs"),
        ({"platform": "gpu", "length": 200}, "plain", "triton requires rows of a multiple of 128 tokens"),
        ({"platform": "cpu"}, "plain", "there is no fused kernel for cpu devices"),
        ({"platform": "gpu", "compute_dtype": "float32"}, "plain", "not in float32"),
        ({"platform": "tpu", "dropout_rate": 0.1}, "plain", "attention_probs_dropout_prob is 0.1"),
    ],
    ids=str,
)
def test_auto(facts, kernel, why):
    facts = {"compute_dtype": "bfloat16"} | facts
    found, reason = attention.choose("auto", **facts)
    assert found == kernel
    assert why in reason
    if kernel != "plain":  # what is chosen is not refused, for rows of any kind
        for packed in (True, False):
            attention.check(kernel, packed=packed, **facts)


@pytest.mark.parametrize(
    ("capability", "version", "fused"), [("9.0", "cuda 13", True), ("7.5", "cuda 13", False), ("9.0", "ROCm 7", False)]
)
def test_auto_leaves_old_gpus_and_amds_alone(monkeypatch, capability, version, fused):
    gpu = SimpleNamespace(compute_capability=capability, client=SimpleNamespace(platform_version=version))
    monkeypatch.setattr(jax, "devices", lambda platform: [gpu])
    found, _ = attention.choose("auto", platform="gpu", compute_dtype="bfloat16")
    assert found == ("triton" if fused else "plain")


def test_auto_leaves_other_names_alone():
    assert attention.choose("splash", platform="cpu", compute_dtype="bfloat16")[0] == "splash"


def test_a_model_with_auto_is_the_model():
    config = bert_jax.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ids = np.arange(8)[None]
    auto, plain = (
        bert_jax.BertModel(config, rngs=nnx.Rngs(0), attention=name)(ids, dropout_key=jax.random.key(0))
        for name in ("auto", "plain")
    )
    np.testing.assert_array_equal(auto.last_hidden_state, plain.last_hidden_state)


# ── Refused ──


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("splash", {"platform": "cpu"}, "a fused kernel for TPUs; these devices are cpu"),
        ("splash", {"platform": "gpu"}, "a fused kernel for TPUs; these devices are gpu"),
        ("cudnn", {"platform": "tpu"}, "a fused kernel for NVIDIA GPUs; these devices are tpu"),
        ("splash", {"compute_dtype": "float32"}, "computes in bfloat16; compute_dtype is float32"),
        ("cudnn", {"compute_dtype": "float32"}, "computes in bfloat16; compute_dtype is float32"),
        ("triton", {"length": 200}, "a multiple of 128 tokens; these have 200"),
        ("triton", {"platform": "tpu"}, "a fused kernel for NVIDIA GPUs; these devices are tpu"),
        ("cudnn", {"packed": True}, "Set data.packing to false"),
        ("splash", {"length": 200}, "a multiple of 128 tokens; these have 200"),
    ],
)
def test_where_a_kernel_would_be_wrong(name, changes, message):
    right = {"platform": attention.FUSED[name][1], "compute_dtype": "bfloat16", "packed": False, "length": 256}
    attention.check(name, **right)
    with pytest.raises(InputError, match=message):
        attention.check(name, **(right | changes))


@pytest.mark.parametrize("name", attention.FUSED)
def test_models_refuse_on_cpu_also_under_jit(name):
    config = bert_jax.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    network = bert_jax.BertModel(config, rngs=nnx.Rngs(0), attention=name, compute_dtype="bfloat16")
    for call in (network, jax.jit(lambda ids: network(ids).last_hidden_state)):
        with pytest.raises(InputError, match="these devices are cpu"):
            call(np.ones((1, 128), np.int32))


def test_cudnn_wants_padding_on_the_right():
    query, key, value = operands(dtype=jnp.bfloat16)
    left = Attended(jnp.ones((2, 1), jnp.int32), attended("padded").keys[:, ::-1])
    with pytest.raises(InputError, match="attention_mask has it before tokens"):
        attention.cudnn(query, key, value, left, 0.0, None)
