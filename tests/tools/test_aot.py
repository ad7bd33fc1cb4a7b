import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bert_jax
from bert_jax.errors import InputError
from bert_jax.tools import aot

HERE = aot.Target("here:8", aot.Chip("cpu", "8", aot.GIB, 1e12, 1e9, 1e9), jax.devices())


@pytest.mark.parametrize("name", ["v9", "v9:2x4", "", ":2x4"])
def test_an_unknown_chip_is_refused_with_the_known_ones(name):
    with pytest.raises(InputError, match=r"expected a chip and a topology such as v5e:2x4, v6e:2x4, v5p:2x2x2, h100:8"):
        aot.get(name)


def test_a_missing_compiler_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, compiler in {"v5e": "libtpu", "h100:2": "jax_cuda13_plugin"}.items():
        with pytest.raises(InputError, match=rf"requires {compiler}: pip install 'bert-jax\[aot\]'"):
            aot.get(name)


@pytest.mark.parametrize("name", ["v5e:8", "v5e:2x", "v5e:0x4", "h100:2x4", "v5p:2x4", "v6e:2x4 "])
def test_a_topology_that_is_none(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(InputError, match=rf"The target '{name}' is unknown; expected a chip and a topology"):
        aot.get(name)


# ── What is read off programs ──


def test_products_are_counted_by_type_and_as_often_as_they_run():
    def function(x, y):
        def body(carry, _):
            return jax.jit(jnp.dot)(carry, y), None

        z, _ = jax.lax.scan(body, x, length=5)
        return jnp.einsum("ij,kj->ik", z.astype(jnp.bfloat16), x.astype(jnp.bfloat16),
                          preferred_element_type=jnp.float32)  # fmt: skip

    check = aot.check(jax.jit(function).trace(jnp.ones((3, 4)), jnp.ones((4, 4))), HERE)
    assert check.products == {
        "float32 × float32 → float32": (5, 5 * 2 * 3 * 4 * 4),
        "bfloat16 × bfloat16 → float32": (1, 2 * 3 * 3 * 4),
    }


def test_collectives_are_counted_with_their_bytes():
    mesh = jax.sharding.Mesh(np.array(HERE.devices), ("x",), axis_types=(AxisType.Auto,))
    whole, shared = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("x"))

    @jax.jit
    def function(x, w):
        def body(w, _):
            return w - jax.lax.with_sharding_constraint(x.T @ (x @ w), whole), None

        return jax.lax.scan(body, w, length=3)[0]

    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=shared)
    w = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=whole)
    check = aot.check(function.trace(x, w), HERE)
    assert check.collectives == {"all-reduce": (3, 3 * 32 * 8 * 4)}
    assert check.fits
    assert "all-reduce (3, 0.0 MB)" in str(check)


def test_what_is_donated_is_aliased():
    x = jnp.ones((1000, 1000))
    plain, donated = (aot.check(jax.jit(lambda x: x + 1, donate_argnums=donate).trace(x), HERE) for donate in ((), 0))
    assert (plain.aliased, donated.aliased) == (0, x.nbytes)
    assert (plain.resident, donated.resident) == (2 * x.nbytes, x.nbytes)


def test_bytes_of_shapes():
    assert aot._bytes("(f32[2,3]{1,0:T(8,128)}, bf16[4]{0}, pred[], s32[]{:T(128)}, /*index=5*/f8e4m3fn[10])") == 47


# ── Searching ──


def a_check(memory, resident=100, limit=1000):
    chip = aot.Chip("cpu", "1", limit, 1, 1, 1)
    target = aot.Target("", chip, jax.devices()[:1])
    return aot.Check(target, memory <= limit, memory, resident, 0, 0, {}, {}, {})


@pytest.mark.parametrize(
    "need",
    [
        lambda n: 100 + 3 * n,
        lambda n: 100 + n**2 // 50,
        lambda n: 100 + 7 * n + n**2 // 90,
        lambda n: 100 + 9 * n if n < 95 else 930 + n // 4,  # as where a compiler saves memory near the limit
    ],
)
@pytest.mark.parametrize("first", [1, 4, 60, 1000])
def test_the_largest_is_found_in_few_programs(need, first):
    tried = []

    def try_out(n):
        tried.append(n)
        return a_check(need(n))

    found = aot.largest(try_out, first, a_check(need(first)))
    best = max(n for n in range(2000) if need(n) <= 1000)
    assert best - max(1, best // 8) <= found <= best
    assert len(tried) <= 8


def test_nothing_fits():
    assert aot.largest(lambda n: a_check(2000), 8, a_check(2000)) == 0


# ── On paper ──


def test_the_formula_and_the_bound():
    config = bert_jax.BertConfig.base_cased()
    flops = aot.train_flops(config, 256, 128)
    assert flops == pytest.approx(6 * 256 * 128 * 12 * (4 * 768**2 + 2 * 768 * 3072 + 2 * 128 * 768))
    check = aot.Check(HERE, True, 0, 6, 2, 0, {"a": (3, 8e12)}, {"all-reduce": (1, 100), "all-gather": (1, 80)}, {})
    assert aot.bound(check) == pytest.approx({"products": 1.0, "memory": 8e-9, "links": (175 + 70) * 1e-9})
