import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bert_jax
from bert_jax import sharding, tree
from bert_jax.data.loader import Examples
from bert_jax.errors import InputError
from bert_jax.tasks.sequence_classification import SequenceClassification
from bert_jax.training import loop, optim, step
from bert_jax.training.checkpoint import Checkpoints

LAYOUTS = [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 1, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]


def test_mesh_takes_all_devices_or_as_many_as_asked():
    assert sharding.mesh().shape == {"data": 8, "fsdp": 1, "tensor": 1}
    assert sharding.mesh(data=2).shape == {"data": 2, "fsdp": 1, "tensor": 1}
    assert sharding.mesh(fsdp=2, tensor=2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    wrong = [{"data": 9}, {"data": 0}, {"data": 4, "fsdp": 4}, {"tensor": 3}, {"data": -2}, {"fsdp": 0}, {"tensor": -1}]
    for sizes in [*wrong, {"fsdp": -1, "tensor": -1}, {"fsdp": 16}]:
        with pytest.raises(InputError, match=r"mesh is {data: .*}; there are 8 devices. Expected sizes of at least 1"):
            sharding.mesh(**sizes)


def test_a_batch_is_shared_out_and_parameters_are_whole_everywhere():
    mesh = sharding.mesh()
    batch = sharding.put_batch({"inputs": {"input_ids": np.arange(32).reshape(16, 2)}}, mesh)
    ids = batch["inputs"]["input_ids"]
    assert [shard.data.shape for shard in ids.addressable_shards] == [(2, 2)] * 8
    np.testing.assert_array_equal(ids, np.arange(32).reshape(16, 2))
    weight = jax.device_put(np.ones(3), sharding.replicated(mesh))
    assert [shard.data.shape for shard in weight.addressable_shards] == [(3,)] * 8


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def run(tokenizer):
    """Ten steps of a small model in some layout: losses, the state after them, its shardings, and the step."""
    config = bert_jax.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, num_labels=2,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    source = np.random.default_rng(0)
    ids = [source.integers(1000, 20000, n).astype(np.int32) for n in source.integers(3, 30, 64)]
    labels = {"labels": np.array([len(row) % 2 for row in ids], np.int32)}
    examples = Examples(ids, [np.zeros_like(row) for row in ids], labels)
    done = {}

    def steps(packing=True, scan_layers=False, **mesh):
        key = (packing, scan_layers, *mesh.items())
        if key in done:
            return done[key]
        model = bert_jax.BertForSequenceClassification(config, rngs=nnx.Rngs(0), scan_layers=scan_layers)
        task, devices = SequenceClassification(tokenizer, config, 32), sharding.mesh(**mesh)
        optimizer = optim.adamw(optim.schedule("linear", 1e-3, 10))
        plan = step.plan(model, optimizer)
        state = step.init_state(plan, 0)
        layout = sharding.placements(devices, state)
        state = jax.device_put(state, layout)
        train_step = step.make_step(task, plan, out_shardings=(layout, sharding.replicated(devices)))
        # The same batches for all, of rows that eight devices can share.
        eight = sharding.mesh()
        loader = loop.set_up(
            model, task, examples, optimizer, batch_size=16, packing=packing, seed=42, mesh=eight
        ).loader
        losses = []
        kept = jax.config.jax_persistent_cache_min_compile_time_secs
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # from the cache, they can deadlock
        with jax.set_mesh(devices):
            text = (
                train_step.lower(state, plan.frozen, sharding.put_batch(loader.batch_at(0), devices))
                .compile()
                .as_text()
            )
            for n in range(10):
                state, metrics = train_step(state, plan.frozen, sharding.put_batch(loader.batch_at(n), devices))
                losses.append(float(metrics["loss"]))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", kept)
        done[key] = losses, state, layout, text
        return done[key]

    return steps


@pytest.mark.slow  # of compiling
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_agree_with_one_device(run, layout):
    losses, state, *_ = run(data=1)
    found, other, shardings, _ = run(**layout)
    assert max(losses) - min(losses) > 0.01
    np.testing.assert_allclose(found, losses, rtol=1e-6)
    for path, leaf in state.params.items():
        np.testing.assert_allclose(other.params[path], leaf, atol=1e-5, err_msg=path)
    jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim) or pytest.fail(str(place)),
                 other, shardings)  # fmt: skip


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2, 1), (2, 4, 1)])
def test_no_array_is_replicated_to_change_its_layout(sizes, capfd):
    config = bert_jax.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    mesh = sharding.mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    params, skeleton = tree.split(bert_jax.BertForMaskedLM(config, rngs=nnx.Rngs(0)))
    flat = tree.flatten(params)
    params = tree.unflatten(sharding.put(flat, sharding.placements(mesh, flat)))
    ids = sharding.put_batch({"input_ids": np.ones((8, 4), np.int32)}, mesh)

    def loss(params, ids):
        return (tree.merge(skeleton, params)(**ids).logits ** 2).mean()

    with jax.set_mesh(mesh):
        jax.jit(jax.grad(loss)).lower(params, ids).compile()
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.slow
def test_scanned_layers_and_unpacked_rows_agree_too(run):
    for options in ({"scan_layers": True}, {"packing": False}):
        losses, *_ = run(data=1, **options)
        found, *_ = run(data=2, fsdp=2, tensor=2, **options)
        np.testing.assert_allclose(found, losses, rtol=1e-6)


@pytest.mark.slow
def test_parameters_and_the_optimizers_state_are_shared_out(run):
    _, state, *_ = run(data=2, fsdp=2, tensor=2)
    query, output = (f"bert.layers.1.attention.{name}.weight" for name in ("query", "output"))
    for leaves in (state.params, state.opt_state[1].mu, state.opt_state[1].nu):
        assert leaves[query].sharding.spec == PartitionSpec("tensor", "fsdp")
        assert leaves[output].sharding.spec == PartitionSpec("fsdp", "tensor")
        assert {shard.data.shape for shard in leaves[query].addressable_shards} == {(8, 8)}
    assert state.params["bert.layers.0.output_norm.weight"].sharding.is_fully_replicated


def test_every_pattern_is_of_some_parameter():
    config = bert_jax.BertConfig(hidden_size=16, num_hidden_layers=12, num_attention_heads=4, intermediate_size=32)
    _, skeleton = tree.split(bert_jax.BertForPreTraining(config))
    for pattern, spec in sharding.RULES:
        found = tree.select([pattern], skeleton.specs)
        assert found, pattern
        assert all(len(skeleton.specs[path].shape) >= len(spec) for path in found)


def test_an_axis_that_does_not_divide_is_whole():
    mesh = sharding.mesh(data=1, fsdp=1, tensor=8)
    assert sharding.placement(mesh, "bert.embeddings.word_embeddings.weight", (28996, 16)).is_fully_replicated
    assert not sharding.placement(mesh, "bert.embeddings.word_embeddings.weight", (28992, 16)).is_fully_replicated


def collectives(text):
    return set(re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text))


@pytest.mark.slow
def test_data_parallel_steps_only_add_up(run):
    assert collectives(run(data=1)[3]) == set()
    assert collectives(run(data=8)[3]) == {"all-reduce"}
    assert "all-gather" in collectives(run(data=1, fsdp=8)[3])


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("layout", [{"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_between_layers_each_device_has_its_own_rows(layout, scan_layers):
    # Left to the compiler, every device computes all rows, of a part of the features.
    config = bert_jax.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32
    )
    model = bert_jax.BertModel(config, rngs=nnx.Rngs(0), scan_layers=scan_layers)
    params, skeleton = tree.split(model)
    mesh, flat = sharding.mesh(**layout), tree.flatten(params)

    def hidden_states(flat, inputs):
        return tree.merge(skeleton, tree.unflatten(flat))(**inputs).hidden_states

    flat = sharding.put(flat, sharding.placements(mesh, flat))
    batch = sharding.put_batch({"input_ids": np.zeros((8, 16), np.int32)}, mesh)
    with jax.set_mesh(mesh):
        found = jax.jit(hidden_states).lower(flat, batch).compile().output_shardings
    assert len(found) == 4
    for layer, place in enumerate(found):
        assert place.is_equivalent_to(sharding.by_row(mesh), 3), f"layer {layer}: {place.spec}"


@pytest.mark.slow
def test_a_checkpoint_goes_into_every_layout(run, tmp_path):
    _, state, *_ = run(data=2, fsdp=2, tensor=2)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(10, state, {}, None)
    for layout in (*LAYOUTS, {"data": 1}):
        shardings = run(**layout)[2]
        like = jax.tree.map(lambda leaf, place: jax.device_put(jnp.zeros_like(leaf), place), state, shardings)
        _, restored, _ = checkpoints.restore(like)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, like)
    checkpoints.close()


def test_a_mesh_of_someone_elses_is_left_alone():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jax.jit(sharding.by_rows)(jnp.ones((3, 2))), np.ones((3, 2)))


def test_a_mesh_that_does_not_divide_the_model():
    config = bert_jax.BertConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=6, intermediate_size=32)
    with pytest.raises(InputError, match=r"mesh.tensor is 4, which does not divide num_attention_heads, 6"):
        sharding.check(sharding.mesh(tensor=4), config)


# ── A mesh and a loop of the user's own ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("kind", [bert_jax.BertModel, bert_jax.BertForMaskedLM, bert_jax.BertForSequenceClassification])
def test_any_mesh_gives_the_loss_and_the_gradients_of_one_device(kind):
    config = bert_jax.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, num_labels=3
    )
    params, skeleton = tree.split(kind(config, rngs=nnx.Rngs(0)))
    flat = tree.flatten(params)
    ids = np.random.default_rng(0).integers(1000, 20000, (16, 12)).astype(np.int32)
    attended = np.where(np.arange(12) < 9, 1, 0)[None].repeat(16, 0)

    @jax.jit
    def step(flat, ids, attended):
        def loss(flat):
            out = tree.merge(skeleton, tree.unflatten(flat))(
                attention_mask=attended, position_ids=np.arange(12)[None], input_ids=ids, dropout_key=jax.random.key(0)
            )
            return jnp.square(out.last_hidden_state if kind is bert_jax.BertModel else out.logits).mean()

        return jax.value_and_grad(loss)(flat)

    expected = jax.tree.leaves(step(flat, ids, attended))
    auto = (AxisType.Auto,)
    for mesh in (
        jax.make_mesh((8,), ("rows",)), jax.make_mesh((4, 2), ("x", "y")), jax.make_mesh((8,), ("x",), axis_types=auto)
    ):  # fmt: skip

        def shard(array, axis, mesh=mesh):
            return jax.device_put(array, NamedSharding(mesh, PartitionSpec(axis)))

        rows = mesh.axis_names[0]
        # The user's own rule: the same axis shards the rows of a batch and those of the matrices.
        placed = {path: shard(array, rows if array.ndim == 2 and array.shape[0] % 8 == 0 else None)
                  for path, array in flat.items()}  # fmt: skip
        with jax.set_mesh(mesh):
            found = jax.tree.leaves(step(placed, shard(ids, rows), shard(attended, rows)))
            with pytest.raises(InputError, match="input_ids has the shape"):
                jax.eval_shape(tree.merge(skeleton, tree.unflatten(placed)), ids[0])
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
