import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from bert_jax import BertConfig, BertForSequenceClassification, tree
from bert_jax.errors import InputError
from bert_jax.training import optim


@pytest.fixture(scope="module")
def paths():
    config = BertConfig.from_dict(reference.CONFIG)  # 12 layers
    model = nnx.eval_shape(lambda: BertForSequenceClassification(config, rngs=nnx.Rngs(0)))
    return list(tree.split(model)[1].specs)


# ── Rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_by_default_all_is_trained_alike(paths):
    rules = optim.rules(paths)
    assert list(rules) == paths
    assert all((rule.weight_decay, rule.lr_multiplier) == (0, 1) for rule in rules.values())


def test_biases_and_norms_do_not_decay(paths):
    rules = optim.rules(paths, weight_decay=0.01)
    free = {path for path, rule in rules.items() if rule.weight_decay == 0}
    assert free == {path for path in paths if path.endswith(("bias", "norm.weight"))}
    norms = {path for path in free if path.endswith("weight")}
    assert norms == {
        "bert.embeddings.layer_norm.weight",
        *(f"bert.layers.{i}.{name}_norm.weight" for i in range(12) for name in ("attention", "output")),
    }
    assert len(free) == 2 * 25 + 12 * 6 + 2
    assert all(rules[path].weight_decay == 0.01 for path in paths if path not in free)
    assert rules["classifier.bias"].reasons == (r"no_decay: .*\bbias",)


def test_no_decay_is_a_setting(paths):
    rules = optim.rules(paths, weight_decay=0.5, no_decay=(r".*embeddings\.weight",))
    assert {path for path, rule in rules.items() if not rule.weight_decay} == {
        f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")
    }


def test_a_pattern_of_no_decay_that_matches_nothing(paths):
    with pytest.raises(InputError, match=r"^no_decay has 'nrom.*', which matches no parameter"):
        optim.rules(paths, no_decay=("nrom.*",))


def test_the_first_multiplier_that_matches_counts(paths):
    multipliers = {r"classifier\.weight": 10.0, r"classifier\..*": 5.0, r".*\.weight": 0.5}
    rules = optim.rules(paths, lr_multipliers=multipliers)
    assert rules["classifier.weight"].lr_multiplier == 10
    assert rules["classifier.bias"].lr_multiplier == 5
    assert rules["bert.pooler.weight"].lr_multiplier == 0.5
    assert rules["bert.pooler.bias"].lr_multiplier == 1
    assert str(rules["classifier.bias"]) == (
        r"weight decay 0, learning rate × 5 (no_decay: .*\bbias; lr_multipliers: classifier\..*)"
    )


def test_layer_decay(paths):
    rules = optim.rules(paths, layer_decay=0.5)
    expected = {"bert.embeddings.": 0.5**13, "bert.pooler.": 1.0, "classifier.": 1.0}
    expected |= {f"bert.layers.{i}.": 0.5 ** (12 - i) for i in range(12)}
    for prefix, factor in expected.items():
        found = {rule.lr_multiplier for path, rule in rules.items() if path.startswith(prefix)}
        assert found == {factor}, prefix
    assert rules["bert.layers.11.output.weight"].reasons == ("layer_decay",)


def test_a_multiplier_takes_precedence_over_layer_decay(paths):
    rules = optim.rules(paths, layer_decay=0.5, lr_multipliers={r"bert\.layers\.0\..*": 3})
    assert rules["bert.layers.0.output.weight"].lr_multiplier == 3
    assert rules["bert.layers.1.output.weight"].lr_multiplier == 0.5**11


def test_multipliers_that_match_nothing(paths):
    multipliers = {r"bert\..*": 1, r"bert\.encoder\..*": 1}
    with pytest.raises(InputError, match=r"^lr_multipliers has '.*encoder.*', which matches no parameter; "):
        optim.rules(paths, lr_multipliers=multipliers)
    with pytest.raises(InputError, match="lr_multipliers"):  # before the first step
        optim.adamw(1e-3, lr_multipliers=multipliers).init({"bert.layers.0.output.weight": jnp.ones(2)})


def test_nested_parameters_have_the_same_paths():
    flat = {"bert.layers.0.output.bias": jnp.ones(2), "classifier.weight": jnp.ones((2, 2))}
    optimizer = optim.adamw(1e-2, weight_decay=0.5, lr_multipliers={"classifier.*": 3.0})
    nested = tree.unflatten(flat)
    expected, _ = optimizer.update(flat, optimizer.init(flat), flat)
    found, _ = optimizer.update(nested, optimizer.init(nested), nested)
    assert expected["classifier.weight"][0, 0] != 3 * expected["bert.layers.0.output.bias"][0]  # it decays
    jax.tree.map(np.testing.assert_array_equal, tree.flatten(found), expected)


# ── AdamW ────────────────────────────────────────────────────────────────────────────────────────────────────────────

STEPS = 5
DECAY = 0.3
MULTIPLIERS = {"a.weight": 1.0, "a.bias": 0.25, "b.weight": 2.0}
SHAPES = {"a.weight": (3, 4), "a.bias": (3,), "b.weight": (2, 2)}


def rate(step):
    return 0.02 * (step + 1) / 4


def written_out(params, gradients, *, b1, b2, eps, bias_correction, max_grad_norm):
    """AdamW in float64, an array at a time."""
    params = {path: array.astype(np.float64) for path, array in params.items()}
    m = {path: np.zeros_like(array) for path, array in params.items()}
    v = {path: np.zeros_like(array) for path, array in params.items()}
    clipped = []
    for t, step_gradients in enumerate(gradients, 1):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in step_gradients.values()))
        clipped.append(max_grad_norm is not None and norm > max_grad_norm)
        for path, multiplier in MULTIPLIERS.items():
            g = step_gradients[path].astype(np.float64) * (max_grad_norm / norm if clipped[-1] else 1)
            m[path] = b1 * m[path] + (1 - b1) * g
            v[path] = b2 * v[path] + (1 - b2) * g**2
            m_hat, v_hat = m[path], v[path]
            if bias_correction:
                m_hat, v_hat = m_hat / (1 - b1**t), v_hat / (1 - b2**t)
            change = m_hat / (np.sqrt(v_hat) + eps) + (0 if path.endswith("bias") else DECAY) * params[path]
            params[path] = params[path] - rate(t - 1) * multiplier * change
    return params, clipped


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("max_grad_norm", [3.0, None])
def test_adamw_is_what_is_written_out(bias_correction, max_grad_norm):
    # An epsilon and decays that show in the result.
    options = {"bias_correction": bias_correction, "max_grad_norm": max_grad_norm, "eps": 0.01, "b1": 0.8, "b2": 0.95}
    random = np.random.RandomState(0)
    params = {path: random.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    gradients = [
        {path: (scale * random.normal(size=shape)).astype(np.float32) for path, shape in SHAPES.items()}
        for scale in (2.0, 0.1, 5.0, 0.3, 1.5)
    ]
    expected, clipped = written_out(params, gradients, **options)
    assert len(set(clipped)) == (1 if max_grad_norm is None else 2)  # some steps are clipped, some are not

    optimizer = optim.adamw(rate, weight_decay=DECAY, lr_multipliers=MULTIPLIERS, **options)
    got = {path: jnp.asarray(array) for path, array in params.items()}
    state = optimizer.init(got)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        updates, state = update(gradients[step], state, got)
        got = {path: got[path] + updates[path] for path in got}
    for path in SHAPES:
        assert np.abs(expected[path] - params[path]).min() > 1e-4
        np.testing.assert_allclose(got[path], expected[path], rtol=2e-6, atol=1e-6)


def test_a_factor_of_zero_changes_nothing():
    optimizer = optim.adamw(rate, weight_decay=0.1, lr_multipliers={"w": 0.0})
    params = {"w": jnp.ones(3)}
    updates, _ = optimizer.update({"w": jnp.ones(3)}, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["w"], 0)


# ── Schedules ────────────────────────────────────────────────────────────────────────────────────────────────────────

ROOT = 2**-0.5
# A peak of 2, 10 steps, 2 of them warm-up: 8 are left, of which step 4 is a quarter and step 6 the half.
POINTS = {
    "linear": ({}, {0: 0, 1: 1, 2: 2, 4: 1.5, 6: 1, 9: 0.25, 10: 0, 11: 0}),
    "cosine": ({}, {0: 0, 1: 1, 2: 2, 4: 1 + ROOT, 6: 1, 8: 1 - ROOT, 10: 0}),
    "cosine, one wave": ({"cycles": 1}, {1: 1, 2: 2, 4: 1, 6: 0, 8: 1, 10: 2}),
    "cosine_with_restarts": ({}, {0: 0, 1: 1, 2: 2, 4: 1 + ROOT, 6: 1, 10: 0, 11: 0}),
    "cosine_with_restarts, two": ({"cycles": 2}, {1: 1, 2: 2, 4: 1, 5: 1 - ROOT, 6: 2, 8: 1, 10: 0}),
    "polynomial": ({"final_learning_rate": 0}, {0: 0, 1: 1, 2: 2, 4: 1.5, 10: 0}),
    "polynomial, square": (
        {"power": 2, "final_learning_rate": 0.5},
        {0: 0, 1: 1, 2: 2, 4: 1.5 * 0.5625 + 0.5, 6: 0.875, 10: 0.5, 12: 0.5},
    ),
    "constant": ({"warmup_steps": 0}, {0: 2, 1: 2, 6: 2, 10: 2}),
    "constant_with_warmup": ({}, {0: 0, 1: 1, 2: 2, 6: 2, 10: 2}),
}


@pytest.mark.parametrize("name", POINTS)
def test_schedules(name):
    options, points = POINTS[name]
    rate = optim.schedule(name.split(",")[0], 2.0, 10, **{"warmup_steps": 2} | options)
    for step, expected in points.items():
        assert float(rate(jnp.asarray(step))) == pytest.approx(expected, abs=1e-6), step
    assert rate(jnp.asarray(3)).dtype == jnp.float32
    assert float(jax.jit(rate)(3)) == pytest.approx(float(rate(3)), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "warmup"),
    [
        ({}, 0),
        ({"warmup_ratio": 0.2}, 2),
        ({"warmup_ratio": 0.11}, 2),  # rounded up
        ({"warmup_steps": 5, "warmup_ratio": 0.2}, 5),
        ({"warmup_steps": 0, "warmup_ratio": 0.2}, 0),
    ],
)
def test_warm_up(options, warmup):
    rate = optim.schedule("linear", 1.0, 10, **options)
    rates = [float(rate(step)) for step in range(10)]
    assert int(np.argmax(rates)) == warmup
    assert rates[warmup] == 1
    np.testing.assert_allclose(rates[:warmup], np.arange(warmup) / max(1, warmup), rtol=1e-6)


def test_warm_up_longer_than_the_run():
    rate = optim.schedule("linear", 1.0, 10, warmup_steps=20)
    assert [float(rate(step)) for step in (0, 5, 10)] == pytest.approx([0, 0.25, 0.5])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("constant", {"warmup_steps": 2}, "constant has no warm-up. Leave it out, or use .*constant_with_warmup"),
        ("constant", {"warmup_ratio": 0.1}, "constant has no warm-up"),
        ("linear", {"cycles": 2}, "linear has no cycles. Leave it out, or use cosine, cosine_with_restarts"),
        ("cosine", {"power": 2.0}, "cosine has no power"),
        ("linear", {"final_learning_rate": 1e-6}, "linear has no final_learning_rate"),
    ],
)
def test_arguments_that_a_schedule_does_not_have(name, options, message):
    with pytest.raises(InputError, match=message):
        optim.schedule(name, 1.0, 10, **options)


@pytest.mark.parametrize("options", [{"warmup_steps": 1}, {"warmup_ratio": 0.1}])
def test_a_run_of_one_step_has_no_warm_up(options):
    with pytest.raises(
        InputError, match=r"^The run has 1 step, .* warm-up is 0, so nothing would be trained\. Take more"
    ):
        optim.schedule("linear", 1.0, 1, **options)
    assert optim.schedule("linear", 1.0, 1)(0) == 1
    assert optim.schedule("linear", 1.0, 2, **options)(1) == 1


def test_an_unknown_schedule():
    with pytest.raises(InputError, match="The schedule 'liner' is unknown; expected one of linear, cosine"):
        optim.schedule("liner", 1.0, 10)
