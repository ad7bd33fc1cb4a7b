import functools
import io
import json
import math
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sentiments
from flax import nnx
from rich.console import Console

import bert_jax
from bert_jax import sharding, tree
from bert_jax.data.loader import Shape
from bert_jax.errors import InputError, Interrupted, OutOfMemoryError, TrainingError
from bert_jax.evaluation import measure
from bert_jax.tasks.sequence_classification import SequenceClassification
from bert_jax.training import log, loop, optim, step


@pytest.fixture(scope="module")
def make(tokenizer):
    return functools.partial(sentiments.classifier, tokenizer)


def test_overfits_eight_examples(make):
    model, task = make(width=32)
    before = jax.tree.map(np.array, tree.split(model)[0])
    examples = task.featurize(sentiments.rows(8))
    trained = loop.train(model, task, examples, optim.adamw(3e-3), steps=100, batch_size=8, mesh=one_device())
    jax.tree.map(np.testing.assert_array_equal, tree.split(model)[0], before)  # what was given stays as it was
    result = measure.evaluate(
        task,
        measure.program(task, tree.split(trained.model)[1]),
        tree.split(trained.model)[0],
        examples,
        batch_size=8,
        packing=512,
        mesh=one_device(),
    )
    assert result.metrics["loss"] < 0.01
    assert result.metrics["accuracy"] == 1.0


@pytest.mark.slow
def test_any_loss_and_any_metric(make):
    model, task = make()
    examples, validation = task.featurize(sentiments.rows(16)), task.featurize(sentiments.rows(8, seed=1))

    def loss(model, batch, dropout_key):
        mean, divisor = task.loss(model, batch, dropout_key)
        return mean * 0 + jnp.sum((model.classifier.bias - 1) ** 2), divisor

    def yes(outputs, examples):
        answers = [prediction["label"] == "yes" for prediction in task.predictions(outputs, examples)]
        assert len(answers) == len(examples) == 8
        return np.mean(answers) * 7

    options = {"steps": 3, "batch_size": 8, "evaluate_every": 1, "mesh": one_device()}
    trained = loop.train(
        model, task, examples, optax.sgd(0.1), loss=loss, metrics={"sevenfold": yes}, metric="sevenfold",
        validation=validation, **options,
    )  # fmt: skip
    flat = tree.flatten(tree.split(trained.model)[0])
    for path, leaf in tree.flatten(tree.split(model)[0]).items():  # the loss depends on one parameter alone
        assert np.array_equal(flat[path], leaf) == (path != "classifier.bias")
    assert isinstance(trained.metrics["sevenfold"], float)
    assert trained.metrics["loss"] > 0.1  # that of the task
    bad = {"bad": lambda *_: math.nan}
    with pytest.raises(InputError, match="The metric bad is nan at step 0; expected a finite number"):
        loop.train(model, task, examples, optax.sgd(0.1), metrics=bad, validation=validation, **options)
    with pytest.raises(InputError, match="metrics has 'accuracy', which is a metric of the task"):
        loop.train(model, task, examples, optax.sgd(0.1), metrics={"accuracy": yes}, **options)
    with pytest.raises(InputError, match="patience is 0; expected at least 1"):
        loop.train(model, task, examples, optax.sgd(0.1), patience=0, validation=validation, **options)
    with pytest.raises(InputError, match=r"metric is 'eightfold'; expected one of loss, .*, sevenfold"):
        loop.train(model, task, examples, optax.sgd(0.1), metrics={"sevenfold": yes}, metric="eightfold", **options)


def one_device():
    return sharding.mesh(data=1)


def finish(make, folder, layers=1, learning_rate=2e-5, **options):
    """A whole run with dropout: the trained parameters, and the lines of its journal."""
    options = {"steps": 8, "log_every": 2, "evaluate_every": 3} | options
    if layers > 2:  # A part of each layer has state enough, and compiles in a third of the time.
        options |= {"trainable": [r"(?!.*(attention|intermediate|embeddings)).*"]}
    model, task = make(layers=layers, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    data, validation = task.featurize(sentiments.rows(64)), task.featurize(sentiments.rows(16, seed=1))
    schedule = optim.schedule("linear", learning_rate, options["steps"])
    trained = loop.train(
        model, task, data, optim.adamw(schedule), batch_size=16, validation=validation, folder=folder,
        schedule=schedule, mesh=one_device(), **options,
    )  # fmt: skip
    return trained, log.read_journal(folder / log.METRICS) if folder else None


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
        pytest.param(signal.SIGTERM, 2, 1, 1, marks=pytest.mark.slow),
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


def test_a_finished_run_gives_the_same_again(make, tmp_path):
    first, _ = finish(make, tmp_path)
    again, _ = finish(make, tmp_path)
    assert equal(first, again)
    assert first.stopped is None


@pytest.mark.slow
def test_the_best_checkpoint_is_what_comes_back(make, tmp_path):
    options = {"steps": 16, "evaluate_every": 2, "metric": "loss", "learning_rate": 3e-2}
    trained, journal = finish(make, tmp_path, keep=2, save_every=5, **options)
    assert {int(path.name) for path in (tmp_path / loop.CHECKPOINTS).iterdir()} == {trained.step, 15, 16}
    evaluations = {
        line["step"]: line["validation"]["loss"] for line in journal if "validation" in line and line["step"]
    }
    assert trained.step == min(evaluations, key=evaluations.get)
    assert trained.metrics["loss"] == evaluations[trained.step]
    _, task = make()
    params, skeleton = tree.split(trained.model)
    mesh = one_device()
    program, examples = measure.program(task, skeleton), task.featurize(sentiments.rows(16, seed=1))
    again = measure.evaluate(task, program, params, examples, batch_size=16, packing=512, mesh=mesh)
    assert again.metrics["loss"] == pytest.approx(evaluations[trained.step], rel=1e-6)


def test_the_model_before_training_is_reported_but_is_never_the_best(make, tmp_path):
    told = io.StringIO()
    options = {"steps": 4, "evaluate_every": 2, "metric": "loss", "learning_rate": 1.0}  # training makes it worse
    trained, journal = finish(make, tmp_path, console=Console(file=told), **options)
    losses = {line["step"]: line["validation"]["loss"] for line in journal if "validation" in line}
    assert losses[0] < min(losses[2], losses[4])
    assert trained.step in (2, 4)
    assert re.search(r"^step 0: loss 0\.\d+ .*  \(before training\)$", told.getvalue(), re.MULTILINE)


@pytest.mark.slow
def test_a_run_that_is_killed_before_its_first_checkpoint_begins_its_journal_again(make, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop.Checkpoints, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finish(make, tmp_path)
    _, journal = finish(make, tmp_path)
    assert [line["step"] for line in journal] == [0, 2, 3, 4, 6, 6, 8, 8]


@pytest.mark.slow
def test_without_a_folder_nothing_is_written_and_the_best_comes_back_too(make, tmp_path, monkeypatch):
    options = {"steps": 16, "evaluate_every": 2, "metric": "loss", "learning_rate": 3e-2}
    expected, _ = finish(make, tmp_path / "run", **options)
    assert expected.step < expected.steps
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    trained, _ = finish(make, None, **options)
    assert sorted(tmp_path.rglob("*")) == before
    assert (trained.step, trained.steps, trained.metrics) == (expected.step, expected.steps, expected.metrics)
    assert equal(trained, expected)


@pytest.mark.slow
def test_without_the_best_checkpoint_the_last_one_comes_back(make, tmp_path, capsys):
    options = {"steps": 16, "evaluate_every": 2, "metric": "loss", "learning_rate": 3e-2}
    best, _ = finish(make, tmp_path, **options)
    assert best.step < best.steps
    for file in (tmp_path / loop.CHECKPOINTS / str(best.step)).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:16])
    again, _ = finish(make, tmp_path, **options)
    assert (again.step, again.metrics, again.outputs) == (best.steps, {}, None)


@pytest.mark.slow
def test_other_examples_than_the_run_began_with(make, tmp_path):
    model, task = make()
    optimizer, options = optim.adamw(2e-5), {"steps": 1, "batch_size": 16, "folder": tmp_path, "mesh": one_device()}
    loop.train(model, task, task.featurize(sentiments.rows(16)), optimizer, **options)
    with pytest.raises(InputError, match=f"The run in {tmp_path} began with other training examples"):
        loop.train(model, task, task.featurize(sentiments.rows(16, seed=1)), optimizer, **options)


@pytest.mark.slow
def test_patience(make, tmp_path):
    options = {"steps": 200, "evaluate_every": 2, "patience": 2, "learning_rate": 1e-12}
    trained, journal = finish(make, tmp_path, **options)
    assert (trained.step, trained.steps) == (2, 6)  # nothing changes after the first evaluation
    assert trained.stopped == "accuracy was not better in the last 2 evaluations than at step 2"
    assert max(line["step"] for line in journal) == 6
    told = io.StringIO()
    again, _ = finish(make, tmp_path, console=Console(file=told), **options)
    assert (again.step, again.steps, again.stopped) == (2, 6, trained.stopped)
    assert f"stopped early at step 6 of 200: {trained.stopped}\n" in told.getvalue()


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(make, tmp_path):
    model, task = make()
    params, skeleton = tree.split(model)
    params["classifier"]["bias"] = jnp.array([jnp.nan, 0.0])
    model, examples = tree.merge(skeleton, params), task.featurize(sentiments.rows(16))
    with pytest.raises(TrainingError, match=r"The loss of step 1 is nan, for rows 1, 2, 3, 4, 5") as error:
        loop.train(
            model, task, examples, optim.adamw(2e-5), steps=3, batch_size=16, save_every=1, folder=tmp_path,
            mesh=one_device(),
        )  # fmt: skip
    assert "learning rate" in str(error.value)
    assert not list((tmp_path / loop.CHECKPOINTS).iterdir())  # nothing of it is saved


def test_a_batch_that_is_too_large_says_what_to_lower(make):
    model, task = make()
    task.max_length = 512
    options = {"steps": 1, "batch_size": 50_000, "packing": False}  # 100 GB of attention a layer
    examples = task.featurize([{"text": " ".join(sentiments.WORDS * 60), "label": "no"}])
    with pytest.raises(OutOfMemoryError, match=r"50000 rows of 512 tokens .* Lower batch_size"):
        loop.train(model, task, examples, optim.adamw(2e-5), mesh=one_device(), **options)


def test_an_evaluation_that_is_too_large_says_what_to_lower(make):
    model, task = make()
    task.max_length = 512
    options = {"steps": 1, "batch_size": 1, "evaluation_batch_size": 50_000, "packing": False}
    examples = task.featurize([{"text": " ".join(sentiments.WORDS * 60), "label": "no"}])
    with pytest.raises(OutOfMemoryError, match=r"50000 rows of 512 tokens .* Lower evaluation_batch_size"):
        loop.train(model, task, examples, optim.adamw(2e-5), validation=examples, mesh=one_device(), **options)


def test_a_metric_that_is_not_there(make, tmp_path):
    with pytest.raises(InputError, match=r"metric is 'f2'; expected one of loss, accuracy, .*, f1\."):
        finish(make, tmp_path, steps=1, metric="f2")
    assert not list(tmp_path.iterdir())


def test_the_journal_has_what_a_curve_needs(unbroken):
    trained, journal = unbroken(1)
    losses = [line for line in journal if "loss" in line]
    assert [line["step"] for line in losses] == [2, 4, 6, 8]
    assert [line["epoch"] for line in losses] == [0.5, 1.0, 1.5, 2.0]
    assert all(math.isfinite(line["grad_norm"]) for line in losses)
    assert losses[0]["learning_rate"] == pytest.approx(2e-5 * 7 / 8)
    assert losses[-1]["learning_rate"] == pytest.approx(2e-5 / 8)
    assert [line["step"] for line in journal if "validation" in line] == [0, 3, 6, 8]
    assert json.dumps(trained.metrics)


@pytest.mark.slow
def test_a_line_of_the_journal_is_the_mean_of_its_steps(make, tmp_path):
    journals = {
        every: finish(make, tmp_path / str(every), steps=4, evaluate_every=4, log_every=every)[1] for every in (1, 4)
    }
    for name in ("loss", "grad_norm"):
        steps = [line[name] for line in journals[1] if name in line]
        (mean,) = (line[name] for line in journals[4] if name in line)
        assert len(steps) == 4
        assert len(set(steps)) == 4
        assert mean == pytest.approx(np.mean(steps), rel=1e-6)


def test_another_seed_is_another_run(make):
    model, task = make()
    examples = task.featurize(sentiments.rows(64))
    runs = []
    for seed in (0, 0, 1):
        run = loop.set_up(model, task, examples, optim.adamw(2e-5), batch_size=16, seed=seed, mesh=one_device())
        runs.append([run.loader.place(n).indices.tolist() for n in range(4)])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    first, second = (step.init_state(run.plan, seed).key.tolist() for seed in (0, 1))
    assert first != second


# ── The program ──


@pytest.fixture(scope="module")
def bfloat16_step(tokenizer):
    """The step of a small model in bfloat16, traced, and its arguments."""
    config = bert_jax.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                 num_labels=2)  # fmt: skip
    model = bert_jax.BertForSequenceClassification(config, rngs=nnx.Rngs(0), compute_dtype="bfloat16")
    task = SequenceClassification(tokenizer, config, 32)
    examples = task.featurize([{"text": "a text", "label": "LABEL_0"}] * 8)
    run = loop.set_up(model, task, examples, optim.adamw(2e-5), mesh=one_device())
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


def test_a_batch_is_computed_in_parts_one_after_another(make):
    model, task = make()
    examples, options = task.featurize(sentiments.rows(16)), {"accumulation": 4, "packing": False}
    run = loop.set_up(model, task, examples, optim.adamw(2e-5), mesh=one_device(), **options)
    jaxpr = run.trace(Shape(8, 32, 1)).jaxpr
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
    state = jax.device_put(step.init_state(run.plan, 0), run.layout)
    batch = sharding.put_batch(run.loader.batch_at(0), run.mesh)
    with jax.set_mesh(run.mesh), jax.transfer_guard("disallow"):
        state, metrics = run.step(state, {}, batch)
        jax.block_until_ready((state, metrics))
    assert np.isfinite(float(metrics["loss"]))


def test_the_second_signal_restores_all_handlers(tmp_path):
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]
    with loop._signals(Console(quiet=True), tmp_path) as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert not set(before) & {signal.getsignal(number) for number in signals}
        os.kill(os.getpid(), signal.SIGINT)
        assert [signal.getsignal(number) for number in signals] == before


def test_without_a_folder_nothing_is_said_to_be_saved():
    assert str(Interrupted(3, None, signal.SIGTERM)) == "stopped at step 3, not saved: there is no folder."
