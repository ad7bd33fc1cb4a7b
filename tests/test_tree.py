import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from bert_jax import BertConfig, BertModel, tree

CONFIG = BertConfig.from_dict(reference.CONFIG)  # 12 layers


@pytest.fixture(scope="module")
def model():
    return BertModel(CONFIG, rngs=nnx.Rngs(0))


def test_split_and_merge_are_inverse(model):
    params, skeleton = tree.split(model)
    merged = tree.merge(skeleton, params)
    ids = reference.inputs()["input_ids"]
    np.testing.assert_array_equal(merged(ids).last_hidden_state, model(ids).last_hidden_state)


def test_paths_are_the_modules(model):
    flat = tree.flatten(tree.split(model)[0])
    assert flat["layers.11.attention.query.weight"] is not None
    np.testing.assert_array_equal(
        flat["layers.11.attention.query.weight"], model.layers[11].attention.query.weight[...]
    )
    assert (
        tree.unflatten(flat)["layers"][11]["attention"]["query"]["weight"] is flat["layers.11.attention.query.weight"]
    )


def test_string_layer_keys_keep_their_order(model):
    params, skeleton = tree.split(model)
    # Sorted as strings, "10" and "11" come before "2".
    as_strings = dict(params) | {"layers": {key: params["layers"][int(key)] for key in sorted(map(str, range(12)))}}
    merged = tree.merge(skeleton, as_strings)
    for i in range(12):
        np.testing.assert_array_equal(merged.layers[i].output.weight[...], model.layers[i].output.weight[...])


@pytest.mark.parametrize(
    ("path", "change", "named"),
    [
        ("layers.3.output.weight", None, "missing: layers.3.output.weight"),
        ("layers.12.output.weight", jnp.zeros((8, 16)), "unexpected: layers.12.output.weight"),
        ("pooler.weight", jnp.zeros((8, 9)), r"pooler.weight: float32\[8, 9\]; expected float32\[8, 8\]"),
        ("pooler.weight", jnp.zeros((8, 8), jnp.bfloat16), r"bfloat16\[8, 8\]; expected float32"),
    ],
)
def test_merge_refuses_another_tree(model, path, change, named):
    params, skeleton = tree.split(model)
    flat = tree.flatten(params) | {path: change}
    if change is None:
        del flat[path]
    with pytest.raises(ValueError, match=named):
        tree.merge(skeleton, tree.unflatten(flat))


def test_merge_refuses_a_renamed_key_which_nnx_does_not(model):
    params, skeleton = tree.split(model)
    flat = tree.flatten(params)
    flat["pooler.wait"] = flat.pop("pooler.weight")
    with pytest.raises(ValueError, match=r"missing: pooler.weight\n  unexpected: pooler.wait"):
        tree.merge(skeleton, tree.unflatten(flat))


def test_merge_under_jit(model):
    params, skeleton = tree.split(model)
    ids = reference.inputs()["input_ids"]
    jitted = jax.jit(lambda p, i: tree.merge(skeleton, p)(i).pooler_output)
    np.testing.assert_allclose(jitted(params, ids), model(ids).pooler_output, atol=1e-6)


def test_select():
    paths = ["bert.layers.1.output.weight", "bert.layers.11.output.weight", "classifier.weight", "classifier.bias"]
    assert tree.select([r"classifier\..*"], paths) == paths[2:]
    assert tree.select([r".*layers\.1\..*", r".*bias"], paths) == [paths[0], paths[3]]
    assert tree.select([r"classifier"], paths) == []
