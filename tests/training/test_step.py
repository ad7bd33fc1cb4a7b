import functools

import jax
import numpy as np
import optax
import pytest
import sentiments
from flax import nnx

import bert_jax
from bert_jax import sharding, tree
from bert_jax.data.loader import Loader, one_a_row
from bert_jax.errors import InputError
from bert_jax.training import optim, step
from bert_jax.training.lora import LoRA


@pytest.fixture(scope="module")
def make(tokenizer):
    return functools.partial(sentiments.classifier, tokenizer)


def run_steps(make, batches, optimizer=None, steps=3, options=None, mesh=None, accumulation=1, plan=None, **config):
    """Losses of some steps on the same batch, and the parameters after them."""
    model, task = make(**config)
    if options:
        params, _ = tree.split(model)
        model = bert_jax.BertForSequenceClassification(model.config, rngs=nnx.Rngs(0), **options)
        model = tree.merge(tree.split(model)[1], params)
    planned = step.plan(model, optimizer or optim.adamw(2e-5), **(plan or {}))
    state, put = step.init_state(planned, 0), lambda batch: batch
    if mesh:
        state = jax.device_put(state, sharding.replicated(mesh))
        put = functools.partial(sharding.put_batch, mesh=mesh)
    train_step = step.make_step(task, planned, accumulation=accumulation)
    losses = []
    for n in range(steps):
        state, metrics = train_step(state, planned.frozen, put(batches[n % len(batches)]))
        losses.append(float(metrics["loss"]))
    return losses, {path: np.asarray(leaf) for path, leaf in state.params.items()}, train_step


@pytest.mark.parametrize(
    "variant",
    [
        {"accumulation": 4},
        pytest.param({"options": {"remat": True}}, marks=pytest.mark.slow),
        {"options": {"scan_layers": True}},
        pytest.param({"mesh": True}, marks=pytest.mark.slow),
        {"mesh": True, "accumulation": 2},
        pytest.param({"padding": 8}, marks=pytest.mark.slow),
        {"examples": 13, "accumulation": 4},  # the last part has fewer than the others
    ],
    ids=str,
)
def test_ways_to_compute_a_step_agree(make, variant):
    _, task = make()
    examples = task.featurize(sentiments.rows(16))
    indices = np.arange(variant.get("examples", 16))
    whole = [examples.batch(one_a_row(indices, 16, 32))]
    expected, params, _ = run_steps(make, whole)
    batches = [examples.batch(one_a_row(indices, 16 + variant.get("padding", 0), 32))]
    mesh = sharding.mesh() if variant.get("mesh") else None
    losses, other, _ = run_steps(
        make, batches, options=variant.get("options"), mesh=mesh, accumulation=variant.get("accumulation", 1)
    )
    np.testing.assert_allclose(losses, expected, rtol=2e-6)
    for path, leaf in params.items():
        np.testing.assert_allclose(other[path], leaf, atol=2e-5, err_msg=path)


@pytest.mark.slow
def test_parts_of_a_batch_have_the_weighted_mean_of_the_whole(make):
    model, task = make(initializer_range=1.0)
    batch = task.featurize(sentiments.rows(16)).batch(one_a_row(np.arange(16), 16, 32))
    planned = step.plan(model, optax.sgd(0.1))
    loss = functools.partial(task.loss, class_weights=np.array([0.001, 0.03], np.float32))
    found = []
    for accumulation in (1, 4):
        train_step = step.make_step(task, planned, loss=loss, accumulation=accumulation)
        state, metrics = train_step(step.init_state(planned, 0), planned.frozen, batch)
        found.append((float(metrics["loss"]), state.params["classifier.bias"]))
    assert found[0][0] == pytest.approx(float(loss(model, batch, None)[0]), rel=1e-5)
    assert found[0][0] != pytest.approx(float(task.loss(model, batch, None)[0]), rel=1e-2)
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-5)


def test_dropout_differs_from_step_to_step_and_repeats_from_run_to_run(make):
    _, task = make()
    batch = task.featurize(sentiments.rows(16)).batch(one_a_row(np.arange(16), 16, 32))
    optimizer = optim.adamw(1e-30)  # the parameters stay
    losses, _, _ = run_steps(make, [batch], optimizer, hidden_dropout_prob=0.5)
    again, _, _ = run_steps(make, [batch], optimizer, hidden_dropout_prob=0.5)
    assert losses == again
    assert len(set(losses)) == 3


@pytest.mark.slow
def test_each_part_of_a_batch_drops_with_a_key_of_its_own(make):
    model, task = make(hidden_dropout_prob=0.5)
    # Both parts are the same eight examples.
    twice = task.featurize([row for row in sentiments.rows(8) for _ in range(2)])
    batch = twice.batch(one_a_row(np.arange(16), 16, 32))
    losses, _, _ = run_steps(make, [batch], steps=1, accumulation=2, hidden_dropout_prob=0.5)
    half = jax.tree.map(lambda array: array[::2], batch)
    state = step.init_state(step.plan(model, optim.adamw(2e-5)), 0)
    keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), 0), 2)
    loss = jax.jit(lambda key: task.loss(model, half, key)[0])
    first, second = (float(loss(key)) for key in keys)
    assert abs(first - second) > 1e-4
    assert losses[0] == pytest.approx((first + second) / 2, rel=1e-5)


def test_the_gradients_norm_is_that_before_clipping(make):
    model, task = make()
    batch = task.featurize(sentiments.rows(16)).batch(one_a_row(np.arange(16), 16, 32))
    params, skeleton = tree.split(model)
    gradient = jax.jit(jax.grad(lambda params: task.loss(tree.merge(skeleton, params), batch, None)[0]))(params)
    expected = np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(gradient)))
    assert expected > 1e-2
    plan = step.plan(model, optim.adamw(2e-5, max_grad_norm=1e-3))
    _, metrics = step.make_step(task, plan)(step.init_state(plan, 0), plan.frozen, batch)
    assert float(metrics["grad_norm"]) == pytest.approx(expected, rel=1e-5)


def test_frozen_parameters_stay_and_cost_no_state(make):
    model, task = make()
    trainable = [r"bert\.layers\.1\..*", r"bert\.pooler\..*", "classifier.*"]
    plan = step.plan(model, optim.adamw(2e-5), trainable=trainable)
    before = tree.flatten(tree.split(model)[0])
    batch = task.featurize(sentiments.rows(8)).batch(one_a_row(np.arange(8), 8, 32))
    _, params, _ = run_steps(make, [batch], plan={"trainable": trainable})
    assert {path for path in before if path not in params} == set(plan.frozen)
    assert all(path.startswith(("bert.embeddings.", "bert.layers.0.")) for path in plan.frozen)
    state = step.init_state(plan, 0)
    assert {leaf.size for leaf in jax.tree.leaves(state.opt_state)} <= {1, *(leaf.size for leaf in params.values())}
    changed = [path for path, leaf in params.items() if not np.array_equal(leaf, before[path])]
    assert "bert.layers.1.output.weight" in changed
    assert "classifier.weight" in changed


def test_lora_trains_adapters_and_head_alone(make):
    _, task = make()
    batch = task.featurize(sentiments.rows(8)).batch(one_a_row(np.arange(8), 8, 32))
    plan = {"lora": LoRA(rank=2), "trainable": ["classifier.*"]}
    losses, params, _ = run_steps(make, [batch], optim.adamw(5e-2), steps=30, plan=plan)
    assert {path.rpartition(".")[2] for path in params if not path.startswith("classifier.")} == {"lora_A", "lora_B"}
    assert sorted(path for path in params if path.startswith("classifier.")) == ["classifier.bias", "classifier.weight"]
    assert losses[-1] < losses[0] - 0.05
    assert np.abs(params["bert.layers.1.attention.query.lora_B"]).max() > 0


def test_a_partial_batch_makes_no_new_program(make):
    _, task = make()
    examples = task.featurize(sentiments.rows(19))
    loader = Loader(examples, 8, seed=0)
    batches = [loader.batch_at(n) for n in range(loader.steps_per_epoch)]
    assert sum(batch["weights"].sum() < 8 for batch in batches) == 1
    _, _, train_step = run_steps(make, batches, steps=9)
    assert train_step._cache_size() == len({batch["inputs"]["input_ids"].shape for batch in batches})


def test_adapters_alone(make):
    model, _ = make()
    plan = step.plan(model, optim.adamw(2e-5), lora=LoRA())
    assert all(path.endswith((".lora_A", ".lora_B")) for path in plan.trained)
    assert set(plan.frozen) == set(tree.split(model)[1].specs)


@pytest.mark.parametrize("trainable", [["clasifier.*"], ["classifier.*", "bert"]])
def test_a_pattern_that_matches_nothing(make, trainable):
    with pytest.raises(InputError, match=f"trainable has '{trainable[-1]}', which matches no parameter; expected"):
        step.plan(make()[0], optim.adamw(2e-5), trainable=trainable)


def test_nothing_to_train(make):
    with pytest.raises(InputError, match="trainable is empty"):
        step.plan(make()[0], optim.adamw(2e-5), trainable=[])


OPTAX = {
    "lion": optax.lion(1e-2),
    "adafactor": optax.adafactor(1e-2),
    "lamb": optax.lamb(1e-2),
    "masked": optax.chain(
        optax.masked(optax.adam(1e-2), lambda params: {path: "bias" in path for path in params}),
        optax.masked(optax.set_to_zero(), lambda params: {path: "bias" not in path for path in params}),
    ),
    "multi_transform": optax.multi_transform(
        {"head": optax.adam(1e-2), "body": optax.sgd(1e-2)},
        lambda params: {path: "head" if path.startswith("classifier") else "body" for path in params},
    ),
}


@pytest.mark.parametrize("name", OPTAX)
def test_any_transformation_of_optax(make, name):
    _, task = make()
    batch = task.featurize(sentiments.rows(16)).batch(one_a_row(np.arange(16), 16, 32))
    losses, params, _ = run_steps(make, [batch], OPTAX[name], steps=20)
    assert losses[-1] < losses[0]
    assert all(np.isfinite(leaf).all() for leaf in params.values())


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda updates, params: {"all": updates}, "of shape None for"),
        (lambda updates, params: {path: leaf.sum() for path, leaf in updates.items()}, r"of shape \(\) for"),
        (lambda updates, params: list(updates.values()), "of shape None for"),
    ],
)
def test_an_optimizer_that_returns_another_tree(make, update, message):
    with pytest.raises(InputError, match=f"The optimizer returns an update {message}.*expected the structure"):
        step.plan(make()[0], optax.stateless(update))
