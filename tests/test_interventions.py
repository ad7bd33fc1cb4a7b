import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bert_jax
from bert_jax import interventions, tree
from bert_jax.errors import InputError
from bert_jax.interventions import SITES

CONFIG = bert_jax.BertConfig(
    vocab_size=99, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
    max_position_embeddings=16, initializer_range=0.3, num_labels=2,
)  # fmt: skip
IDS = np.random.RandomState(0).randint(5, 99, (2, 7))
MASK = np.array([[1] * 7, [1] * 5 + [0] * 2])
ALL = [site.replace("{i}", str(i)) for site, i in itertools.product(SITES, range(3)) if "{i}" in site or i == 0]


@pytest.fixture(scope="module")
def model():
    return bert_jax.BertForSequenceClassification(CONFIG, rngs=nnx.Rngs(0))


def logits(model, functions, **options):
    return model(IDS, MASK, interventions=functions, **options).logits


def test_identity_at_every_site_changes_nothing(model):
    assert np.array_equal(logits(model, {}), logits(model, dict.fromkeys(ALL, lambda x: x)))


@pytest.mark.parametrize("site", ALL)
def test_shapes_and_effect_of_each_site(model, site):
    seen = []

    def halve(x):
        seen.append(x.shape)
        return x / 2

    sizes = {"B": 2, "T": 7, "S": 7, "D": 24, "N": 3, "H": 8, "F": 40}
    before, after = logits(model, {}), logits(model, {site: halve})
    name = next(name for name in SITES if site in [name, *(name.replace("{i}", str(i)) for i in range(3))])
    assert seen == [tuple(sizes[letter] for letter in SITES[name].strip("[]").split(", "))]
    if not site.endswith(".key"):  # halving the keys only makes attention flatter
        assert np.abs(before - after).max() > 1e-4
    flat = jax.jit(lambda functions_scale: logits(model, {site: lambda x: x * functions_scale}))
    assert np.allclose(flat(0.5), after, atol=1e-6)


def test_sites_of_the_output(model):
    """What the output contains of a site is what the site became."""
    out = model(IDS, interventions={"layers.1": jnp.zeros_like, "layers.0.attention.probabilities": jnp.ones_like})
    assert not np.any(out.hidden_states[2])
    assert np.all(out.attentions[0] == 1)


def test_positions_of_the_last_layer():
    model, seen = bert_jax.BertForMaskedLM(CONFIG, rngs=nnx.Rngs(0)), {}
    functions = {site: lambda x, site=site: seen.setdefault(site, x) for site in ALL if site != "pooler"}
    model(IDS, masked_positions=[[3, 4]], interventions=functions)
    assert seen["layers.1.attention.heads"].shape == (2, 7, 3, 8)
    assert seen["layers.2.attention.heads"].shape == seen["layers.2.attention.query"].shape == (2, 2, 3, 8)
    assert seen["layers.2.attention.key"].shape == (2, 7, 3, 8)


def test_gradients_and_vmap(model):
    """The importance of heads (Michel et al. 2019): the gradient of a mask of ones, and all heads removed in turn."""

    def masked(mask):
        return logits(
            model, {f"layers.{i}.attention.heads": lambda x, i=i: x * mask[i][None, None, :, None] for i in range(3)}
        )

    ones = jnp.ones((3, 3))
    gradient = jax.grad(lambda mask: masked(mask)[:, 0].sum())(ones)
    shift = 1e-2
    numeric = (masked(ones.at[1, 2].add(shift)) - masked(ones.at[1, 2].add(-shift)))[:, 0].sum() / (2 * shift)
    assert gradient[1, 2] == pytest.approx(float(numeric), abs=1e-3)
    without = 1 - jnp.eye(9).reshape(9, 3, 3)
    together = jax.jit(jax.vmap(masked))(without)
    assert np.allclose(together[4], masked(without[4]), atol=1e-6)


def test_remat_computes_the_same(model):
    again = bert_jax.BertForSequenceClassification(CONFIG, rngs=nnx.Rngs(0), remat=True)
    functions = {"layers.1.intermediate": lambda x: x * 0.5}
    assert np.allclose(logits(model, functions), logits(again, functions), atol=1e-6)


def test_without_interventions_the_program_is_the_same(model):
    params, skeleton = tree.split(model)

    def text(**options):
        def call(params):
            return tree.merge(skeleton, params)(IDS, MASK, **options).logits

        return jax.jit(call).lower(params).as_text()

    assert text() == text(interventions={}) == text(interventions=dict.fromkeys(ALL, lambda x: x))
    assert text() != text(interventions={"layers.0": lambda x: x * 2})


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"layers.0.attention.context": abs}, r"is not a site; expected one of embeddings, layers\.\{i\}\.attention"),
        ({"layers.{i}": abs}, "is not a site; expected one of"),
        ({"layers.03": abs}, "is not a site; expected one of"),
        ({"layers.\u0661": abs}, "is not a site; expected one of"),
        (None, "interventions is None; expected a dict"),
        ([], r"interventions is \[\]; expected a dict"),
        ({3: abs}, "interventions is .* expected a dict"),
        ({"layers.3": abs}, "the model has the layers 0 to 2"),
        ({"layers.1": 3}, r"interventions\['layers.1'\] is 3; expected a function"),
        ({"layers.1": lambda x: x[:, :1]}, r"at 'layers.1' returned \(2, 1, 24\); expected .* \(2, 7, 24\)"),
        ({"layers.1.output": lambda x: None}, r"at 'layers.1.output' returned None; expected .* \(2, 7, 24\)"),
    ],
)
def test_invalid_interventions(model, functions, message):
    with pytest.raises(InputError, match=message):
        logits(model, functions)


def test_sites_that_cannot_be_reached():
    scanned = bert_jax.BertModel(CONFIG, rngs=nnx.Rngs(0), scan_layers=True, add_pooling_layer=False)
    with pytest.raises(InputError, match=r"'layers.0' cannot be reached, because scan_layers .* scan_layers=False"):
        scanned(IDS, interventions={"layers.0": abs})
    with pytest.raises(InputError, match="'pooler' is not a site of this model"):
        scanned(IDS, interventions={"pooler": abs})
    assert not np.any(scanned(IDS, interventions={"embeddings": jnp.zeros_like}).hidden_states[0])
    with pytest.raises(InputError, match=r"because attention 'splash' does not store .* attention='plain'"):
        interventions.checked_interventions(
            {"layers.0.attention.probabilities": abs}, layers=3, pooler=True, fused="splash", scan=False
        )


# ── inputs_embeds ──


@pytest.mark.parametrize("architecture", ["BertForPreTraining", "BertForMaskedLM", "BertForSequenceClassification",
                                          "BertForTokenClassification", "BertForQuestionAnswering"])  # fmt: skip
def test_embeddings_in_place_of_ids(architecture):
    model = getattr(bert_jax, architecture)(CONFIG, rngs=nnx.Rngs(0))
    vectors = model.encoder.embeddings.word_embeddings(IDS)
    for positions in ({}, {"masked_positions": [[1, 2]]} if hasattr(model, "predictions") else {"positions": [[0]]}):
        expected = jax.tree.leaves(model(IDS, MASK, **positions))
        found = jax.tree.leaves(model(attention_mask=MASK, inputs_embeds=vectors, **positions))
        assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.slow
def test_integrated_gradients_add_up(model):
    """Sundararajan et al. 2017: the attributions add up to the difference of the outputs, for repeated tokens too."""
    ids = np.array([[5, 9, 9, 9, 6]])
    vectors = model.bert.embeddings.word_embeddings(ids)

    def score(vectors):
        return model(inputs_embeds=vectors).logits[0, 1]

    steps = (jnp.arange(64) + 0.5) / 64
    gradients = jax.vmap(lambda step: jax.grad(score)(step * vectors))(steps)
    attributions = (gradients.mean(axis=0) * vectors).sum(axis=-1)[0]
    difference = score(vectors) - score(vectors * 0)
    assert abs(attributions.sum() - difference) <= 0.01 * abs(difference)
    assert len(set(np.asarray(attributions[1:4]).tolist())) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Expected input_ids or inputs_embeds, got neither"),
        ({"input_ids": IDS, "inputs_embeds": np.zeros((2, 7, 24))}, "Expected input_ids or inputs_embeds, got both"),
        (
            {"inputs_embeds": np.zeros((2, 7, 25))},
            r"inputs_embeds has the shape \(2, 7, 25\); expected \[batch, tokens, 24\]",
        ),
        ({"inputs_embeds": np.zeros((2, 17, 24))}, "inputs_embeds has 17 tokens per row; the model has 16 positions"),
        ({"inputs_embeds": np.zeros((2, 6, 24)), "attention_mask": MASK}, r"inputs_embeds has \(2, 6\)"),
    ],
)
def test_invalid_embeddings(model, given, message):
    with pytest.raises(InputError, match=message):
        model(**given)
