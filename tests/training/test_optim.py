import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from bert_jax import BertConfig, BertForSequenceClassification, tree
from bert_jax.errors import InputError
from bert_jax.settings import Optimizer, Rate, Schedule
from bert_jax.training import optim


@pytest.fixture(scope="module")
def paths():
    config = BertConfig.from_dict(reference.CONFIG)  # 12 layers
    model = nnx.eval_shape(lambda: BertForSequenceClassification(config, rngs=nnx.Rngs(0)))
    return list(tree.split(model)[1].specs)


# ── Rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_by_default_all_is_trained_alike(paths):
    rules = optim.rules(Optimizer(), paths)
    assert list(rules) == paths
    assert all(rule.trained and rule.factor == 1 and rule.weight_decay == 0 for rule in rules.values())


def test_biases_and_norms_do_not_decay(paths):
    rules = optim.rules(Optimizer(weight_decay=0.01), paths)
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
    rules = optim.rules(Optimizer(weight_decay=0.5, no_decay=(r".*embeddings\.weight",)), paths)
    assert {path for path, rule in rules.items() if not rule.weight_decay} == {
        f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")
    }


def test_a_pattern_of_no_decay_that_matches_nothing(paths):
    with pytest.raises(InputError, match=r"optimizer\.no_decay has 'nrom.*', which matches no parameter"):
        optim.rules(Optimizer(no_decay=("nrom.*",)), paths)


def test_frozen(paths):
    patterns = (r"bert\.embeddings\..*", r"bert\.layers\.[0-9]\..*")
    rules = optim.rules(Optimizer(frozen=patterns, weight_decay=0.1), paths)
    frozen = {path for path, rule in rules.items() if not rule.trained}
    # A pattern matches whole paths: layers 10 and 11 are none of [0-9].
    assert frozen == {
        path for path in paths if ".embeddings." in path or (".layers." in path and int(path.split(".")[2]) < 10)
    }
    assert rules["bert.layers.3.output.weight"] == optim.Rule(False, 0.0, 0.0, (f"frozen: {patterns[1]}",))
    assert str(rules["bert.layers.3.output.weight"]) == f"frozen (frozen: {patterns[1]})"


def test_the_first_rate_counts(paths):
    rates = [(r"classifier\.weight", 10.0), (r"classifier\..*", 5.0), (r".*\.weight", 0.5)]
    rules = optim.rules(Optimizer(rates=tuple(Rate(parameters=p, factor=f) for p, f in rates)), paths)
    assert rules["classifier.weight"].factor == 10
    assert rules["classifier.bias"].factor == 5
    assert rules["bert.pooler.weight"].factor == 0.5
    assert rules["bert.pooler.bias"].factor == 1
    assert str(rules["classifier.bias"]) == (
        r"weight decay 0, learning rate × 5 (no_decay: .*\bbias; rates: classifier\..*)"
    )


def test_the_first_of_equal_rates_counts(paths):
    rates = (Rate(parameters="classifier.*", factor=2), Rate(parameters="classifier.*", factor=3))
    assert optim.rules(Optimizer(rates=rates), paths)["classifier.bias"].factor == 2


def test_layer_decay(paths):
    rules = optim.rules(Optimizer(layer_decay=0.5), paths)
    expected = {"bert.embeddings.": 0.5**13, "bert.pooler.": 1.0, "classifier.": 1.0}
    expected |= {f"bert.layers.{i}.": 0.5 ** (12 - i) for i in range(12)}
    for prefix, factor in expected.items():
        found = {rule.factor for path, rule in rules.items() if path.startswith(prefix)}
        assert found == {factor}, prefix
    assert rules["bert.layers.11.output.weight"].reasons == ("layer_decay",)


def test_a_rate_goes_before_layer_decay(paths):
    rates = (Rate(parameters=r"bert\.layers\.0\..*", factor=3),)
    rules = optim.rules(Optimizer(layer_decay=0.5, rates=rates), paths)
    assert rules["bert.layers.0.output.weight"].factor == 3
    assert rules["bert.layers.1.output.weight"].factor == 0.5**11


@pytest.mark.parametrize("name", ["frozen", "rates"])
def test_patterns_that_match_nothing(paths, name):
    pattern = r"bert\.encoder\..*"
    patterns = (r"bert\..*", pattern)
    if name == "rates":
        patterns = tuple(Rate(parameters=each, factor=1) for each in patterns)
    with pytest.raises(InputError, match=rf"^optimizer\.{name} has '.*encoder.*', which matches no parameter; "):
        optim.rules(Optimizer(**{name: patterns}), paths)


def test_something_is_left_to_train(paths):
    with pytest.raises(InputError, match="nothing is left to train"):
        optim.rules(Optimizer(frozen=(".*",)), paths)


# ── AdamW ────────────────────────────────────────────────────────────────────────────────────────────────────────────

STEPS = 5
RULES = {
    "a.weight": optim.Rule(True, 0.3, 1.0, ()),
    "a.bias": optim.Rule(True, 0.0, 0.25, ()),
    "b.weight": optim.Rule(True, 0.2, 2.0, ()),
}
SHAPES = {"a.weight": (3, 4), "a.bias": (3,), "b.weight": (2, 2)}


def rate(step):
    return 0.02 * (step + 1) / 4


def written_out(params, gradients, settings):
    """AdamW in float64, an array at a time."""
    params = {path: array.astype(np.float64) for path, array in params.items()}
    m = {path: np.zeros_like(array) for path, array in params.items()}
    v = {path: np.zeros_like(array) for path, array in params.items()}
    clipped = []
    for t, step_gradients in enumerate(gradients, 1):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in step_gradients.values()))
        limit = settings.max_grad_norm
        clipped.append(limit is not None and norm > limit)
        for path, rule in RULES.items():
            g = step_gradients[path].astype(np.float64) * (limit / norm if clipped[-1] else 1)
            m[path] = settings.beta1 * m[path] + (1 - settings.beta1) * g
            v[path] = settings.beta2 * v[path] + (1 - settings.beta2) * g**2
            m_hat, v_hat = m[path], v[path]
            if settings.bias_correction:
                m_hat, v_hat = m_hat / (1 - settings.beta1**t), v_hat / (1 - settings.beta2**t)
            change = m_hat / (np.sqrt(v_hat) + settings.epsilon) + rule.weight_decay * params[path]
            params[path] = params[path] - rate(t - 1) * rule.factor * change
    return params, clipped


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("max_grad_norm", [3.0, None])
def test_adamw_is_what_is_written_out(bias_correction, max_grad_norm):
    # An epsilon and decays that show in the result.
    settings = Optimizer(
        bias_correction=bias_correction, max_grad_norm=max_grad_norm, epsilon=0.01, beta1=0.8, beta2=0.95
    )
    random = np.random.RandomState(0)
    params = {path: random.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    gradients = [
        {path: (scale * random.normal(size=shape)).astype(np.float32) for path, shape in SHAPES.items()}
        for scale in (2.0, 0.1, 5.0, 0.3, 1.5)
    ]
    expected, clipped = written_out(params, gradients, settings)
    assert len(set(clipped)) == (1 if max_grad_norm is None else 2)  # some steps are clipped, some are not

    optimizer = optim.adamw(settings, rate, RULES)
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
    optimizer = optim.adamw(Optimizer(), rate, {"w": optim.Rule(True, 0.1, 0.0, ())})
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
    "constant": ({}, {0: 2, 1: 2, 6: 2, 10: 2}),  # has no warm-up, as transformers'
    "constant_with_warmup": ({}, {0: 0, 1: 1, 2: 2, 6: 2, 10: 2}),
}


@pytest.mark.parametrize("name", POINTS)
def test_schedules(name):
    options, points = POINTS[name]
    rate = optim.schedule(Schedule(name=name.split(",")[0], warmup_steps=2, **options), 2.0, 10)
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
    rate = optim.schedule(Schedule(**options), 1.0, 10)
    rates = [float(rate(step)) for step in range(10)]
    assert int(np.argmax(rates)) == warmup
    assert rates[warmup] == 1
    np.testing.assert_allclose(rates[:warmup], np.arange(warmup) / max(1, warmup), rtol=1e-6)


def test_warm_up_longer_than_the_run():
    rate = optim.schedule(Schedule(warmup_steps=20), 1.0, 10)
    assert [float(rate(step)) for step in (0, 5, 10)] == pytest.approx([0, 0.25, 0.5])
