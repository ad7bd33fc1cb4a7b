import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from safetensors.numpy import load_file, save_file

from bert_jax import BertConfig, BertForSequenceClassification, tree
from bert_jax.errors import CheckpointError, InputError
from bert_jax.training import lora
from bert_jax.training.lora import LoRA

ADAPTERS = LoRA(rank=3, alpha=12)  # a scale of 4
QUERY = "bert.layers.0.attention.query"
PUBLISHED = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def model():
    config = BertConfig.from_dict(reference.CONFIG | {"num_hidden_layers": 2})
    skeleton = tree.split(nnx.eval_shape(lambda: BertForSequenceClassification(config, rngs=nnx.Rngs(0))))[1]
    random = np.random.RandomState(2)
    params = {
        path: jnp.asarray(random.normal(path.endswith("norm.weight"), 0.5, spec.shape), jnp.float32)
        for path, spec in skeleton.specs.items()
    }
    return tree.merge(skeleton, tree.unflatten(params))


@pytest.fixture(scope="module")
def flat(model):
    return tree.flatten(tree.split(model)[0])


@pytest.fixture(scope="module")
def adapters(model):
    """Adapters as training leaves them: B is not zero."""
    made = lora.init(ADAPTERS, tree.split(model)[1].specs, jax.random.key(0))
    random = np.random.RandomState(0)
    return {
        path: random.normal(size=leaf.shape).astype(np.float32) if path.endswith("_B") else np.asarray(leaf)
        for path, leaf in made.items()
    }


@pytest.fixture(scope="module")
def head():
    random = np.random.RandomState(1)
    return {
        "classifier.weight": random.normal(size=(3, 8)).astype(np.float32),
        "classifier.bias": random.normal(size=3).astype(np.float32),
    }


@pytest.fixture
def folder(tmp_path, adapters, head):
    lora.save_adapters(tmp_path / "adapters", adapters | head, ADAPTERS, "base", "SEQ_CLS")
    return tmp_path / "adapters"


@pytest.fixture(scope="module")
def logits(model):
    """The model's logits with these parameters; one compilation for all tests."""
    skeleton = tree.split(model)[1]
    run = jax.jit(lambda params: tree.merge(skeleton, params)(**reference.inputs()).logits)
    return lambda flat: np.asarray(run(tree.unflatten(flat)))


# ── New adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_init(model):
    options = LoRA(rank=3, targets=r"bert\.layers\.\d+\.(attention\.query|intermediate)\.weight")
    made = lora.init(options, tree.split(model)[1].specs, jax.random.key(0))
    names = [f"bert.layers.{i}.{name}" for i in range(2) for name in ("attention.query", "intermediate")]
    assert made.keys() == {f"{name}.lora_{side}" for name in names for side in "AB"}
    for name in names:
        a, b = made[f"{name}.lora_A"], made[f"{name}.lora_B"]
        assert (a.shape, b.shape) == ((3, 8), (16 if name.endswith("intermediate") else 8, 3))
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(b, 0)
        assert 0.5 * 8**-0.5 < np.abs(a).max() <= 8**-0.5
        assert a.min() < 0 < a.max()
    drawn = [np.asarray(made[f"{name}.lora_A"]) for name in names]
    assert len({array.tobytes() for array in drawn}) == len(drawn)  # each has numbers of its own


def test_new_adapters_change_nothing(model, flat, logits):
    made = lora.init(LoRA(), tree.split(model)[1].specs, jax.random.key(0))
    merged = lora.merge(flat | made, 2.0)
    assert merged.keys() == flat.keys()
    np.testing.assert_array_equal(logits(merged), logits(flat))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (r"bert\.encoder\..*", "matches no parameter; expected paths such as bert.embeddings"),
        ("query", "matches no parameter"),  # a pattern is of the whole path
        (r".*\.query\..*", "matches bert.layers.0.attention.query.bias, which is not the weight of a linear layer"),
        (r".*word_embeddings\.weight", "matches bert.embeddings.word_embeddings.weight, which is not the weight"),
        (r".*output_norm\.weight", "matches bert.layers.0.output_norm.weight, which is not the weight"),
    ],
)
def test_bad_targets(model, targets, message):
    with pytest.raises(InputError, match=rf"^lora\.targets .*{re.escape(message)}"):
        lora.init(LoRA(targets=targets), tree.split(model)[1].specs, jax.random.key(0))


# ── Merging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_merging_is_float32_on_every_device(flat, adapters):
    text = jax.jit(lambda params: lora.merge(params, 0.7)).lower(flat | adapters).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 4
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_merge_is_w_and_scale_b_a(flat, adapters):
    merged = lora.merge(flat | adapters, 0.7)
    assert merged.keys() == flat.keys()
    adapted = {path.removesuffix(".lora_A") + ".weight" for path in adapters if path.endswith("_A")}
    assert len(adapted) == 4
    for path in flat:
        expected = np.asarray(flat[path], np.float64)
        if path in adapted:
            a, b = (adapters[path.replace("weight", f"lora_{side}")].astype(np.float64) for side in "AB")
            assert np.abs(b @ a).max() > 0.1
            expected = expected + 0.7 * b @ a
            np.testing.assert_allclose(merged[path], expected, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(merged[path], expected)


def test_a_gradient_reaches_both_sides(flat, adapters):
    def loss(adapters):
        return lora.merge(flat | adapters, 2.0)[f"{QUERY}.weight"].sum()

    gradients = jax.grad(loss)(adapters)
    a, b = adapters[f"{QUERY}.lora_A"], adapters[f"{QUERY}.lora_B"]
    np.testing.assert_allclose(gradients[f"{QUERY}.lora_A"], 2 * np.tile(b.sum(0)[:, None], (1, 8)), rtol=1e-5)
    np.testing.assert_allclose(gradients[f"{QUERY}.lora_B"], 2 * np.tile(a.sum(1), (8, 1)), rtol=1e-5)


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_files_are_pefts(folder, adapters, head):
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = [
        f"base_model.model.bert.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")
    ]
    assert tensors.keys() == {
        *(f"{module}.lora_{side}.weight" for module in modules for side in "AB"),
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    np.testing.assert_array_equal(tensors[f"{PUBLISHED}.lora_A.weight"], adapters[f"{QUERY}.lora_A"])
    np.testing.assert_array_equal(tensors[f"{PUBLISHED}.lora_B.weight"], adapters[f"{QUERY}.lora_B"])
    np.testing.assert_array_equal(tensors["base_model.model.classifier.weight"], head["classifier.weight"])
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "base",
        "revision": None,
        "r": 3,
        "lora_alpha": 12,
        "lora_dropout": 0,
        "bias": "none",
        "target_modules": [
            f"bert.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")
        ],
        "modules_to_save": ["classifier"],
    }


def test_modules_to_save_are_modules_that_were_trained(tmp_path, adapters, flat, head):
    trained = adapters | head | {f"bert.pooler.{name}": flat[f"bert.pooler.{name}"] for name in ("weight", "bias")}
    lora.save_adapters(tmp_path / "adapters", trained, ADAPTERS, "base", "SEQ_CLS")
    saved = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["modules_to_save"]
    # `bert` would be a second copy of all the encoder.
    assert len(saved) == 2
    assert "classifier" in saved
    assert set(saved) & {"pooler", "pooler.dense", "bert.pooler", "bert.pooler.dense"}


def test_round_trip(folder, model, flat, adapters, head, logits):
    loaded = lora.load_adapters(folder, model)
    expected = logits(lora.merge(flat | adapters | head, 4.0))
    np.testing.assert_array_equal(logits(tree.flatten(tree.split(loaded)[0])), expected)
    assert np.abs(expected - logits(flat | head)).max() > 1e-2  # the adapters count
    np.testing.assert_array_equal(logits(tree.flatten(tree.split(model)[0])), logits(flat))  # and the base is as it was


def edit(folder, tensors=None, **config):
    """Changes files of an adapter's folder; a tensor that is None is taken out."""
    path = folder / "adapter_model.safetensors"
    changed = load_file(path) | (tensors or {})
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_files(folder, model, name):
    message = f"^Cannot load adapters from {re.escape(str(folder))}: "
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=message):
        lora.load_adapters(folder, model)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        lora.load_adapters(folder, model)


def test_a_missing_folder(tmp_path, model):
    with pytest.raises(CheckpointError, match="Cannot load adapters"):
        lora.load_adapters(tmp_path / "none", model)


@pytest.mark.parametrize(
    "name",
    [
        f"{PUBLISHED}.lora_magnitude_vector.weight",
        f"{PUBLISHED.replace('layer.0', 'layer.2')}.lora_A.weight",
        "base_model.model.qa_outputs.weight",
    ],
)
def test_a_foreign_tensor(folder, model, name):
    edit(folder, {name: np.zeros((3, 8), np.float32)})
    with pytest.raises(CheckpointError, match=f"has {re.escape(name)}, which this model does not have"):
        lora.load_adapters(folder, model)


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{PUBLISHED}.lora_A.weight": np.zeros((3, 9), np.float32)},
        {f"{PUBLISHED}.lora_A.weight": np.zeros((2, 8), np.float32)},
        {"base_model.model.classifier.weight": np.zeros((2, 8), np.float32)},
        {f"{PUBLISHED}.lora_B.weight": None},
        {f"{PUBLISHED}.lora_A.weight": None},
    ],
)
def test_tensors_that_do_not_fit(folder, model, tensors):
    edit(folder, tensors)
    with pytest.raises(CheckpointError):
        lora.load_adapters(folder, model)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"alpha_pattern": {"query": 3}},
        {"rank_pattern": {"query": 3}},
        {"lora_bias": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"fan_in_fan_out": True},
        {"layer_replication": [[0, 2], [0, 2]]},
        {"trainable_token_indices": [5]},
        {"alora_invocation_tokens": [5]},
        {"use_qalora": True},
        {"a_field_of_tomorrow": "on"},
    ],
)
def test_what_peft_would_do_otherwise_is_refused(folder, model, config):
    edit(folder, **config)
    with pytest.raises(CheckpointError, match=f"sets '{next(iter(config))}', which is not supported"):
        lora.load_adapters(folder, model)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "mica", "tomorrow"])
def test_adapters_of_a_changed_base_are_refused(folder, model, init):
    edit(folder, init_lora_weights=init)
    with pytest.raises(CheckpointError, match=f"init_lora_weights '{init}', which changes the base"):
        lora.load_adapters(folder, model)


@pytest.mark.parametrize(
    "config",
    [
        {"alpha_pattern": {}, "rank_pattern": {}, "use_rslora": False, "layer_replication": None},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "inference_mode": True},
        {"init_lora_weights": False, "loftq_config": {"bits": 4}},
    ],
)
def test_what_changes_no_number_is_taken(folder, model, flat, adapters, head, logits, config):
    edit(folder, **config)
    expected = logits(lora.merge(flat | adapters | head, 4.0))
    np.testing.assert_array_equal(logits(tree.flatten(tree.split(lora.load_adapters(folder, model))[0])), expected)


@pytest.mark.parametrize(
    "config",
    [{"r": 0}, {"r": "3"}, {"r": True}, {"lora_alpha": None}, {"lora_alpha": float("nan")}, {"peft_type": "LOHA"}],
)
def test_numbers_that_are_none(folder, model, config):
    edit(folder, **config)
    with pytest.raises(CheckpointError, match="Cannot load adapters"):
        lora.load_adapters(folder, model)


def test_adapters_that_are_not_finite(folder, model):
    edit(folder, {f"{PUBLISHED}.lora_A.weight": np.full((3, 8), np.nan, np.float32)})
    with pytest.raises(CheckpointError, match=f"NaN or infinity, in {re.escape(PUBLISHED)}"):
        lora.load_adapters(folder, model)


def test_a_head_that_is_not_there(folder, model):
    edit(folder, {"base_model.model.classifier.weight": None, "base_model.model.classifier.bias": None})
    with pytest.raises(CheckpointError, match="lacks classifier, which modules_to_save names"):
        lora.load_adapters(folder, model)


def test_a_config_without_rank(folder, model):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        lora.load_adapters(folder, model)
