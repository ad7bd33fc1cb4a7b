import functools
import json
import math
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bert_jax
from bert_jax import evaluation, sharding, training, tree
from bert_jax.data.loader import Loader, Shape, one_a_row
from bert_jax.errors import InputError, Interrupted, TrainingError
from bert_jax.settings import Mesh, Settings
from bert_jax.tasks.sequence_classification import SequenceClassification

WORDS = ["good", "bad", "fine", "poor", "nice", "awful", "great", "dull", "happy", "sad"]


def rows(n, seed=0):
    """Texts whose first word decides the label."""
    random = np.random.default_rng(seed)
    texts = [random.choice(WORDS, random.integers(1, 13)).tolist() for _ in range(n)]
    return [{"text": " ".join(words), "label": "no" if WORDS.index(words[0]) % 2 else "yes"} for words in texts]


def make_settings(folder, **sections):
    # One of the eight devices, except where a test is about them.
    base = {"task": "text-classification", "output": {"folder": str(folder)}, "mesh": {"data": 1}}
    return Settings.from_dict(base | sections)


@pytest.fixture(scope="module")
def make(tokenizer):
    def make(layers=2, width=8, **config):
        config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | config
        shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
        config = bert_jax.BertConfig(**shape, intermediate_size=2 * width, id2label=("no", "yes"), **config)
        # A dozen layers compile in time as one.
        model = bert_jax.BertForSequenceClassification(config, rngs=nnx.Rngs(0), scan_layers=layers > 2)
        return model, SequenceClassification(tokenizer, config, 32)

    return make


def run_steps(make, settings, batches, steps=3, options=None, mesh=None, **config):
    """Losses of some steps on the same batch, and the parameters after them."""
    model, task = make(**config)
    if options:
        params, _ = tree.split(model)
        model = bert_jax.BertForSequenceClassification(model.config, rngs=nnx.Rngs(0), **options)
        model = tree.merge(tree.split(model)[1], params)
    plan = training.plan(model, settings, 100)
    state, put = training.init_state(plan, 0), lambda batch: batch
    if mesh:
        state = jax.device_put(state, sharding.replicated(mesh))
        put = functools.partial(sharding.put_batch, mesh=mesh)
    step = training.make_step(task, plan, accumulation=settings.training.accumulation)
    losses = []
    for n in range(steps):
        state, metrics = step(state, plan.frozen, put(batches[n % len(batches)]))
        losses.append(float(metrics["loss"]))
    return losses, {path: np.asarray(leaf) for path, leaf in state.params.items()}, step


# ── The step ──


def test_overfits_eight_examples(make, tmp_path):
    settings = make_settings(
        tmp_path, optimizer={"learning_rate": 3e-3}, training={"max_steps": 100, "batch_size": 8, "evaluate_every": 100}
    )
    model, task = make(width=32)
    before = jax.tree.map(np.array, tree.split(model)[0])
    examples = task.featurize(rows(8))
    trained = training.train(task, model, examples, None, settings)
    jax.tree.map(np.testing.assert_array_equal, tree.split(model)[0], before)  # what was given stays as it was
    result = evaluation.evaluate(
        task,
        evaluation.program(task, tree.split(trained.model)[1]),
        tree.split(trained.model)[0],
        examples,
        batch_size=8,
        packing=512,
        mesh=sharding.mesh(settings.mesh),
    )
    assert result.metrics["loss"] < 0.01
    assert result.metrics["accuracy"] == 1.0


@pytest.mark.parametrize(
    "variant",
    [
        {"settings": {"training": {"accumulation": 4}}},
        {"options": {"remat": True}},
        {"options": {"scan_layers": True}},
        {"mesh": True},
        {"mesh": True, "settings": {"training": {"accumulation": 2}}},
        {"padding": 8},
        {"examples": 13, "settings": {"training": {"accumulation": 4}}},  # the last part has fewer than the others
    ],
    ids=str,
)
def test_ways_to_compute_a_step_agree(make, tmp_path, variant):
    _, task = make()
    examples = task.featurize(rows(16))
    indices = np.arange(variant.get("examples", 16))
    whole = [examples.batch(one_a_row(indices, 16, 32))]
    expected, params, _ = run_steps(make, make_settings(tmp_path), whole)
    settings = make_settings(tmp_path, **variant.get("settings", {}))
    batches = [examples.batch(one_a_row(indices, 16 + variant.get("padding", 0), 32))]
    mesh = sharding.mesh(Mesh()) if variant.get("mesh") else None
    losses, other, _ = run_steps(make, settings, batches, options=variant.get("options"), mesh=mesh)
    np.testing.assert_allclose(losses, expected, rtol=2e-6)
    for path, leaf in params.items():
        np.testing.assert_allclose(other[path], leaf, atol=2e-5, err_msg=path)


def test_dropout_differs_from_step_to_step_and_repeats_from_run_to_run(make, tmp_path):
    _, task = make()
    batch = task.featurize(rows(16)).batch(one_a_row(np.arange(16), 16, 32))
    frozen = make_settings(tmp_path, optimizer={"learning_rate": 1e-30})  # the parameters stay
    losses, _, _ = run_steps(make, frozen, [batch], hidden_dropout_prob=0.5)
    again, _, _ = run_steps(make, frozen, [batch], hidden_dropout_prob=0.5)
    assert losses == again
    assert len(set(losses)) == 3


def test_each_part_of_a_batch_drops_with_a_key_of_its_own(make, tmp_path):
    model, task = make(hidden_dropout_prob=0.5)
    twice = task.featurize([row for row in rows(8) for _ in range(2)])  # both parts are the same eight examples
    batch = twice.batch(one_a_row(np.arange(16), 16, 32))
    settings = make_settings(tmp_path, training={"accumulation": 2})
    losses, _, _ = run_steps(make, settings, [batch], steps=1, hidden_dropout_prob=0.5)
    half = jax.tree.map(lambda array: array[::2], batch)
    state = training.init_state(training.plan(model, settings, 100), 0)
    keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), 0), 2)
    loss = jax.jit(lambda key: task.loss(model, half, key)[0])
    first, second = (float(loss(key)) for key in keys)
    assert abs(first - second) > 1e-4
    assert losses[0] == pytest.approx((first + second) / 2, rel=1e-5)


def test_the_gradients_norm_is_that_before_clipping(make, tmp_path):
    model, task = make()
    batch = task.featurize(rows(16)).batch(one_a_row(np.arange(16), 16, 32))
    params, skeleton = tree.split(model)
    gradient = jax.jit(jax.grad(lambda params: task.loss(tree.merge(skeleton, params), batch, None)[0]))(params)
    expected = np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(gradient)))
    assert expected > 1e-2
    plan = training.plan(model, make_settings(tmp_path, optimizer={"max_grad_norm": 1e-3}), 100)
    _, metrics = training.make_step(task, plan)(training.init_state(plan, 0), plan.frozen, batch)
    assert float(metrics["grad_norm"]) == pytest.approx(expected, rel=1e-5)


def test_frozen_parameters_stay_and_cost_no_state(make, tmp_path):
    settings = make_settings(tmp_path, optimizer={"frozen": [r"bert\.embeddings\..*", r"bert\.layers\.0\..*"]})
    model, task = make()
    plan = training.plan(model, settings, 10)
    before = tree.flatten(tree.split(model)[0])
    batch = task.featurize(rows(8)).batch(one_a_row(np.arange(8), 8, 32))
    _, params, _ = run_steps(make, settings, [batch])
    assert {path for path in before if path not in params} == set(plan.frozen)
    assert all(path.startswith(("bert.embeddings.", "bert.layers.0.")) for path in plan.frozen)
    state = training.init_state(plan, 0)
    assert {leaf.size for leaf in jax.tree.leaves(state.opt_state)} <= {1, *(leaf.size for leaf in params.values())}
    changed = [path for path, leaf in params.items() if not np.array_equal(leaf, before[path])]
    assert "bert.layers.1.output.weight" in changed
    assert "classifier.weight" in changed


def test_lora_trains_adapters_and_head_alone(make, tmp_path):
    settings = make_settings(tmp_path, model={"lora": {"rank": 2}}, optimizer={"learning_rate": 5e-2})
    _, task = make()
    batch = task.featurize(rows(8)).batch(one_a_row(np.arange(8), 8, 32))
    losses, params, _ = run_steps(make, settings, [batch], steps=30)
    assert {path.rpartition(".")[2] for path in params if not path.startswith("classifier.")} == {"lora_A", "lora_B"}
    assert sorted(path for path in params if path.startswith("classifier.")) == ["classifier.bias", "classifier.weight"]
    assert losses[-1] < losses[0] - 0.05
    assert np.abs(params["bert.layers.1.attention.query.lora_B"]).max() > 0


def test_a_partial_batch_makes_no_new_program(make, tmp_path):
    _, task = make()
    examples = task.featurize(rows(19))
    loader = Loader(examples, 8, seed=0)
    batches = [loader.batch_at(step) for step in range(loader.steps_per_epoch)]
    assert sum(batch["weights"].sum() < 8 for batch in batches) == 1
    _, _, step = run_steps(make, make_settings(tmp_path), batches, steps=9)
    assert step._cache_size() == len({batch["inputs"]["input_ids"].shape for batch in batches})


# ── The loop ──


def finish(make, folder, layers=1, **sections):
    """A whole run with dropout: the trained parameters, and the lines of its journal."""
    sections = {"training": {"epochs": 2, "batch_size": 16, "log_every": 2, "evaluate_every": 3}} | sections
    if layers > 2:  # A part of each layer has state enough, and compiles in a third of the time.
        sections |= {"optimizer": {"frozen": [r".*(attention|intermediate|embeddings).*"]}}
    settings = make_settings(folder, **sections)
    model, task = make(layers=layers, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    data, validation = task.featurize(rows(64)), task.featurize(rows(16, seed=1))
    trained = training.train(task, model, data, validation, settings)
    return trained, training.read_journal(folder / training.METRICS)


@pytest.fixture(scope="module")
def unbroken(make, tmp_path_factory):
    @functools.cache
    def unbroken(layers):
        return finish(make, tmp_path_factory.mktemp("unbroken"), layers=layers)

    return unbroken


def equal(a, b):
    a, b = (tree.flatten(tree.split(trained.model)[0]) for trained in (a, b))
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


@pytest.mark.parametrize(
    ("number", "at", "times", "layers"),
    [
        (signal.SIGTERM, 2, 1, 1),
        (signal.SIGINT, 5, 2, 1),
        pytest.param(signal.SIGTERM, 2, 1, 12, marks=pytest.mark.slow),  # paths of a dozen do not sort as strings
    ],
)
def test_a_run_that_is_stopped_goes_on_bit_for_bit(make, tmp_path, unbroken, monkeypatch, number, at, times, layers):
    made = sharding.put_batch
    calls = []

    def stop(batch, mesh):
        calls.append(batch)
        if len(calls) == at:
            for _ in range(times):  # an impatient user
                os.kill(os.getpid(), number)
        return made(batch, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "put_batch", stop)
        with pytest.raises(Interrupted, match="saved") as stopped:
            finish(make, tmp_path, layers)
    assert stopped.value.signal == number
    trained, journal = finish(make, tmp_path, layers)
    expected, lines = unbroken(layers)
    assert equal(trained, expected)
    without_time = [{k: v for k, v in line.items() if k != "examples_per_second"} for line in journal]
    assert without_time == [{k: v for k, v in line.items() if k != "examples_per_second"} for line in lines]
    assert list((tmp_path / training.TENSORBOARD).iterdir())


def test_a_finished_run_gives_the_same_again(make, tmp_path):
    first, _ = finish(make, tmp_path)
    again, _ = finish(make, tmp_path)
    assert equal(first, again)


def test_the_best_checkpoint_is_what_comes_back(make, tmp_path):
    training_section = {"epochs": 4, "batch_size": 16, "evaluate_every": 2, "metric": "loss"}
    training_section |= {"keep": 2, "save_every": 5}
    trained, journal = finish(make, tmp_path, training=training_section, optimizer={"learning_rate": 3e-2})
    assert {int(path.name) for path in (tmp_path / training.CHECKPOINTS).iterdir()} == {trained.step, 15, 16}
    evaluations = {line["step"]: line["validation"]["loss"] for line in journal if "validation" in line}
    assert trained.step == min(evaluations, key=evaluations.get)
    assert trained.metrics["loss"] == evaluations[trained.step]
    _, task = make()
    params, skeleton = tree.split(trained.model)
    mesh = sharding.mesh(make_settings(tmp_path).mesh)
    program, examples = evaluation.program(task, skeleton), task.featurize(rows(16, seed=1))
    again = evaluation.evaluate(task, program, params, examples, batch_size=16, packing=512, mesh=mesh)
    assert again.metrics["loss"] == pytest.approx(evaluations[trained.step], rel=1e-6)


def test_without_the_best_checkpoint_the_last_one_comes_back(make, tmp_path, capsys):
    section = {"epochs": 4, "batch_size": 16, "evaluate_every": 2, "metric": "loss"}
    best, _ = finish(make, tmp_path, training=section, optimizer={"learning_rate": 3e-2})
    assert best.step < best.steps
    for file in (tmp_path / training.CHECKPOINTS / str(best.step)).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:16])
    again, _ = finish(make, tmp_path, training=section, optimizer={"learning_rate": 3e-2})
    assert (again.step, again.metrics, again.outputs) == (best.steps, {}, None)


def test_other_examples_than_the_run_began_with(make, tmp_path):
    model, task = make()
    settings = make_settings(tmp_path, training={"max_steps": 1, "batch_size": 16})
    training.train(task, model, task.featurize(rows(16)), None, settings)
    with pytest.raises(InputError, match=f"not those that the run in {tmp_path} began with"):
        training.train(task, model, task.featurize(rows(16, seed=1)), None, settings)


def test_patience(make, tmp_path):
    section = {"epochs": 50, "batch_size": 16, "evaluate_every": 2, "patience": 2}
    trained, journal = finish(make, tmp_path, training=section, optimizer={"learning_rate": 1e-12})
    assert (trained.step, trained.steps) == (2, 6)  # nothing changes after the first evaluation
    assert max(line["step"] for line in journal) == 6
    again, _ = finish(make, tmp_path, training=section, optimizer={"learning_rate": 1e-12})
    assert (again.step, again.steps) == (2, 6)


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(make, tmp_path):
    section = {"epochs": 3, "batch_size": 16, "save_every": 1}
    model, task = make()
    params, skeleton = tree.split(model)
    params["classifier"]["bias"] = jnp.array([jnp.nan, 0.0])
    settings = make_settings(tmp_path, training=section)
    with pytest.raises(
        TrainingError, match=r"The loss of step 1 is nan, on the examples in rows 1, 2, 3, 4, 5"
    ) as error:
        training.train(task, tree.merge(skeleton, params), task.featurize(rows(16)), None, settings)
    assert "optimizer.learning_rate" in str(error.value)
    assert not list((tmp_path / training.CHECKPOINTS).iterdir())  # nothing of it is saved


def test_a_batch_that_is_too_large_says_what_to_lower(make, tmp_path):
    model, task = make()
    task.max_length = 512
    section = {"batch_size": 50_000, "max_steps": 1}  # 100 GB of attention a layer
    settings = make_settings(tmp_path, training=section, data={"packing": False})
    examples = task.featurize([{"text": " ".join(WORDS * 60), "label": "no"}])
    with pytest.raises(TrainingError, match=r"50000 rows of 512 tokens .* Lower training.batch_size"):
        training.train(task, model, examples, None, settings)


def test_an_evaluation_that_is_too_large_says_what_to_lower(make, tmp_path):
    model, task = make()
    task.max_length = 512
    section = {"batch_size": 1, "max_steps": 1, "evaluation_batch_size": 50_000}
    settings = make_settings(tmp_path, training=section, data={"packing": False})
    examples = task.featurize([{"text": " ".join(WORDS * 60), "label": "no"}])
    with pytest.raises(TrainingError, match=r"50000 rows of 512 tokens .* Lower training.evaluation_batch_size"):
        training.train(task, model, examples, examples, settings)


def test_an_adapter_s_head_that_is_not_there(make, tmp_path):
    with pytest.raises(InputError, match=r"model\.lora\.trained is 'clasifier', which matches no parameter"):
        finish(make, tmp_path, model={"lora": {"trained": "clasifier"}}, training={"max_steps": 1})


def test_a_metric_that_is_not_there(make, tmp_path):
    with pytest.raises(InputError, match=r"training.metric is 'f2'; this task has loss, accuracy, .*, f1\."):
        finish(make, tmp_path, training={"max_steps": 1, "metric": "f2"})
    assert not list(tmp_path.iterdir())


def test_the_journal_has_what_a_curve_needs(unbroken):
    trained, journal = unbroken(1)
    losses = [line for line in journal if "loss" in line]
    assert [line["step"] for line in losses] == [2, 4, 6, 8]
    assert [line["epoch"] for line in losses] == [0.5, 1.0, 1.5, 2.0]
    assert all(math.isfinite(line["grad_norm"]) for line in losses)
    assert losses[0]["learning_rate"] == pytest.approx(2e-5 * 7 / 8)
    assert losses[-1]["learning_rate"] == pytest.approx(2e-5 / 8)
    assert [line["step"] for line in journal if "validation" in line] == [3, 6, 8]
    assert json.dumps(trained.metrics)


def test_a_line_of_the_journal_is_the_mean_of_its_steps(make, tmp_path):
    section = {"epochs": 1, "batch_size": 16, "evaluate_every": 4}
    journals = {
        every: finish(make, tmp_path / str(every), training=section | {"log_every": every})[1] for every in (1, 4)
    }
    for name in ("loss", "grad_norm"):
        steps = [line[name] for line in journals[1] if name in line]
        (mean,) = (line[name] for line in journals[4] if name in line)
        assert len(steps) == 4
        assert len(set(steps)) == 4
        assert mean == pytest.approx(np.mean(steps), rel=1e-6)


def test_another_seed_is_another_run(make, tmp_path):
    model, task = make()
    examples = task.featurize(rows(64))
    runs = []
    for seed in (0, 0, 1):
        settings = make_settings(tmp_path, training={"batch_size": 16, "seed": seed})
        run = training.set_up(task, model, examples, settings)
        runs.append([run.loader.place(step).indices.tolist() for step in range(4)])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    first, second = (training.init_state(run.plan, seed).key.tolist() for seed in (0, 1))
    assert first != second


# ── The program ──


@pytest.fixture(scope="module")
def bfloat16_step(tokenizer):
    """The step of a small model in bfloat16, traced, and its arguments."""
    config = bert_jax.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                 num_labels=2)  # fmt: skip
    settings = make_settings("", precision={"compute_dtype": "bfloat16"})
    model = bert_jax.BertForSequenceClassification(config, rngs=nnx.Rngs(0), compute_dtype="bfloat16")
    task = SequenceClassification(tokenizer, config, 32)
    run = training.set_up(task, model, task.featurize([{"text": "a text", "label": "LABEL_0"}] * 8), settings)
    return run, run.trace(Shape(8, 32, 1))


def test_products_take_bfloat16_and_give_float32(bfloat16_step):
    text = bfloat16_step[1].lower().as_text()
    products = re.findall(
        r"stablehlo.dot_general .* : \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\) -> tensor<[\dx]*(\w+)>", text
    )
    inside = [kinds for kinds in products if "bf16" in kinds]
    assert {tuple(kinds) for kinds in inside} == {("bf16", "bf16", "f32")}
    # The pooler and the head, on a vector a text; forward, and two products backward for each.
    assert products.count(("f32", "f32", "f32")) <= 6
    assert len(inside) >= 3 * 2 * 8 - 2


def test_softmax_layer_norm_and_loss_are_float32(bfloat16_step):
    text = bfloat16_step[1].lower().as_text()
    for operation, shape in {"exponential": "8x2x32x32", "rsqrt": "8x32x1", "log": ""}.items():
        kinds = re.findall(rf"stablehlo\.{operation} .*tensor<{shape}x?(?:\d+x)*(\w+)>\s*$", text, re.MULTILINE)
        assert kinds
        assert set(kinds) == {"f32"}, operation


def test_a_batch_is_computed_in_parts_one_after_another(make, tmp_path):
    model, task = make()
    settings = make_settings(tmp_path, training={"accumulation": 4}, data={"packing": False})
    jaxpr = training.set_up(task, model, task.featurize(rows(16)), settings).trace(Shape(8, 32, 1)).jaxpr
    assert [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"] == [4]
    assert "[2,32,8]" in str(jaxpr)  # activations of two rows
    assert "[8,32,8]" not in str(jaxpr)


def test_the_state_is_overwritten(bfloat16_step):
    run, traced = bfloat16_step
    sizes = traced.lower().compile().memory_analysis()
    state = sum(leaf.size * 4 for leaf in jax.tree.leaves((run.plan.trained,) * 3))
    assert state <= sizes.alias_size_in_bytes <= sizes.output_size_in_bytes < 1.01 * state


def test_a_step_moves_nothing_between_host_and_device(bfloat16_step):
    run, _ = bfloat16_step
    state = jax.device_put(training.init_state(run.plan, 0), run.layout)
    batch = sharding.put_batch(run.loader.batch_at(0), run.mesh)
    with jax.set_mesh(run.mesh), jax.transfer_guard("disallow"):
        state, metrics = run.step(state, {}, batch)
        jax.block_until_ready((state, metrics))
    assert np.isfinite(float(metrics["loss"]))
