"""The network against PyTorch's golden outputs, and the promises that model.py makes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

import bert_jax
from bert_jax import BertConfig, attention, heads, losses, model, nn, random, tree, weights
from bert_jax.errors import InputError

HEADS = list(reference.HEADS)
SMALL = BertConfig.from_dict(reference.CONFIG)


@pytest.fixture(scope="module")
def golden():
    return reference.golden("small_model.json")


def load(checkpoint, architecture, **options):
    return getattr(bert_jax, architecture).from_pretrained(checkpoint(architecture), **options)


def close(got, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    assert np.shape(got) == expected.shape
    assert np.max(np.abs(got - expected)) <= tolerance * max(1.0, np.max(np.abs(expected)))


# ── Numbers ──


@pytest.mark.parametrize("architecture", HEADS)
def test_outputs_are_pytorchs(checkpoint, golden, architecture):
    out = load(checkpoint, architecture)(**reference.inputs())
    expected = golden[architecture]
    names = {name for name in expected if not name.startswith("loss_")} - {"hidden_states", "attentions"}
    assert names
    for name in names:
        close(getattr(out, name), expected[name])
    if architecture == "BertModel":
        assert len(out.hidden_states) == 13
        assert len(out.attentions) == 12
        close(np.stack(out.hidden_states)[:, :, 4], expected["hidden_states"])
        close(np.stack(out.attentions)[:, :, :, 4], expected["attentions"])


def objective(name):
    """The loss of a golden entry as a function of a model's output."""
    y = reference.labels()
    return {
        "pretraining": lambda out: (
            losses.cross_entropy(out.prediction_logits, y["mlm"])
            + losses.cross_entropy(out.seq_relationship_logits, y["nsp"])
        ),
        "mlm": lambda out: losses.cross_entropy(out.logits, y["mlm"]),
        "nsp": lambda out: losses.cross_entropy(out.logits, y["nsp"]),
        "single": lambda out: losses.cross_entropy(out.logits, y["single"]),
        "multi": lambda out: losses.binary_cross_entropy(out.logits, y["multi"]),
        "regression": lambda out: losses.squared_error(out.logits, y["regression"]),
        "token": lambda out: losses.cross_entropy(out.logits, y["token"]),
        "qa": lambda out: losses.span_cross_entropy(out.start_logits, out.end_logits, y["start"], y["end"]),
    }[name]


LOSSES = [
    ("BertForPreTraining", "pretraining"),
    ("BertForMaskedLM", "mlm"),
    ("BertForNextSentencePrediction", "nsp"),
    ("BertForSequenceClassification", "single"),
    ("BertForSequenceClassification", "multi"),
    ("BertForSequenceClassification", "regression"),
    ("BertForTokenClassification", "token"),
    ("BertForQuestionAnswering", "qa"),
]


@pytest.mark.parametrize(("architecture", "name"), LOSSES)
def test_losses_and_gradients_are_pytorchs(checkpoint, golden, architecture, name):
    params, skeleton = tree.split(load(checkpoint, architecture))

    def loss(params):
        return objective(name)(tree.merge(skeleton, params)(**reference.inputs()))

    value, gradients = jax.value_and_grad(loss)(params)  # 12 small layers compile faster op by op than as a whole
    expected = golden[architecture][f"loss_{name}"]
    assert abs(value - expected["loss"]) <= 1e-5 * max(1.0, expected["loss"])
    norms = {path: float(jnp.linalg.norm(g)) for path, g in tree.flatten(gradients).items()}
    total = np.sqrt(sum(norm**2 for norm in expected["gradient_norms"].values()))
    table = weights._table(norms)
    assert len(norms) == len(expected["gradient_norms"])
    for published, norm in expected["gradient_norms"].items():
        assert abs(norms[table[published]] - norm) <= 1e-4 * norm + 1e-7 * total, published


# ── Shapes and counts ──


@pytest.mark.parametrize(
    ("config", "encoder", "pretraining"),
    [
        (BertConfig.base_cased(), 108_310_272, 108_932_934),
        (BertConfig.large_cased(), 333_579_264, 334_661_958),
    ],
)
def test_parameter_counts_are_the_published_ones(config, encoder, pretraining):
    def count(model):
        return sum(spec.size for spec in tree.split(model)[1].specs.values())

    assert count(model.BertModel(config)) == encoder
    assert count(heads.BertForPreTraining(config)) == pretraining


@pytest.mark.parametrize("config", [BertConfig.base_cased(), BertConfig.large_cased()])
def test_shapes_of_the_published_sizes(config):
    params, skeleton = tree.split(bert_jax.BertForPreTraining(config))
    ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    positions = jax.ShapeDtypeStruct((2, 76), jnp.int32)
    out = jax.eval_shape(lambda p, i, k: tree.merge(skeleton, p)(i, i, masked_positions=k), params, ids, positions)
    layers, heads, size = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
    assert out.prediction_logits.shape == (2, 76, 28996)
    assert out.seq_relationship_logits.shape == (2, 2)
    # The last layer at [CLS] and the masked positions alone.
    assert [x.shape for x in out.hidden_states] == [(2, 512, size)] * layers + [(2, 77, size)]
    assert [x.shape for x in out.attentions] == [(2, heads, 512, 512)] * (layers - 1) + [(2, heads, 77, 512)]


@pytest.mark.parametrize("architecture", HEADS)
def test_new_parameters_are_drawn_as_bert_does(architecture):
    drawn = getattr(bert_jax, architecture)(SMALL.replace(vocab_size=5000), rngs=nnx.Rngs(0))
    params, skeleton = tree.split(drawn)
    _, same = tree.split(getattr(bert_jax, architecture)(SMALL.replace(vocab_size=5000)))
    assert same == skeleton
    for path, array in tree.flatten(params).items():
        assert array.dtype == jnp.float32
        if path.endswith(".bias"):
            np.testing.assert_array_equal(array, 0, err_msg=path)
        elif "norm" in path:
            np.testing.assert_array_equal(array, 1, err_msg=path)
        else:
            assert 0 < np.abs(array).max() <= 0.04  # cut at two standard deviations
    words = next(array for path, array in tree.flatten(params).items() if "word_embeddings" in path)
    assert abs(np.std(words) - 0.02 * 0.8796) < 2e-4


def test_the_model_holds_nothing_but_params():
    drawn = heads.BertForPreTraining(SMALL, rngs=nnx.Rngs(0))
    assert {type(variable) for _, variable in nnx.iter_graph(drawn) if isinstance(variable, nnx.Variable)} == {
        nnx.Param
    }


# ── Precision ──


def products(lowered):
    """(operand dtypes, result dtype, precision) of each product in a lowered program."""
    found = []
    for line in lowered.as_text().splitlines():
        if "stablehlo.dot_general" in line:
            types = re.search(r": \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\) -> tensor<(?:\d+x)*(\w+)>", line)
            precision = re.search(r"precision = \[(\w+), (\w+)\]", line)
            found.append((*types.groups(), *(precision.groups() if precision else ("DEFAULT", "DEFAULT"))))
    return found


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("gradient", [False, True])
def test_float32_means_float32(architecture, gradient):
    params, skeleton = tree.split(getattr(bert_jax, architecture)(SMALL))

    def forward(params):
        out = tree.merge(skeleton, params)(**reference.inputs())
        return sum(jnp.sum(x) for x in jax.tree.leaves(out))

    found = products(jax.jit(jax.grad(forward) if gradient else forward).lower(params))
    assert len(found) >= 12 * 8
    assert set(found) == {("f32", "f32", "f32", "HIGHEST", "HIGHEST")}


@pytest.mark.parametrize("architecture", HEADS)
def test_bfloat16_products_accumulate_in_float32(architecture):
    params, skeleton = tree.split(getattr(bert_jax, architecture)(SMALL, compute_dtype="bfloat16"))
    found = products(jax.jit(lambda p: tree.merge(skeleton, p)(**reference.inputs())).lower(params))
    in_bfloat16 = [entry for entry in found if entry[:3] == ("bf16", "bf16", "f32")]
    rest = [entry for entry in found if entry not in in_bfloat16]  # pooler and classifiers, over float32
    assert len(in_bfloat16) >= 12 * 8
    assert len(rest) <= 3
    assert set(rest) <= {("f32", "f32", "f32", "HIGHEST", "HIGHEST")}


@pytest.mark.parametrize("architecture", HEADS)
def test_bfloat16_is_near_float32(checkpoint, architecture):
    exact = load(checkpoint, architecture)(**reference.inputs())
    rough = load(checkpoint, architecture, dtype="bfloat16")(**reference.inputs())
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rough), strict=True):
        assert np.max(np.abs(a - b.astype(jnp.float32))) < 0.3
    if hasattr(rough, "logits"):
        assert rough.logits.dtype == jnp.float32
    assert rough.hidden_states[0].dtype == jnp.bfloat16
    assert rough.attentions[0].dtype == jnp.float32


# ── Programs ──


@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_keeps_each_layers_input_alone(scan_layers):
    rows, tokens, size, layers = 2, 24, 8, 5

    def kept(remat):
        """Bytes that the backward pass takes over from the forward pass, parameters aside, and their shapes."""
        config = SMALL.replace(num_hidden_layers=layers)
        params, skeleton = tree.split(model.BertModel(config, remat=remat, scan_layers=scan_layers))
        ids = jnp.ones((rows, tokens), jnp.int32)

        def backward(params):
            return jax.vjp(lambda params: tree.merge(skeleton, params)(ids).pooler_output, params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, params))
        return sum(leaf.size * 4 for leaf in leaves), {leaf.shape[-3:] for leaf in leaves}

    (whole, shapes), (less, others) = kept(False), kept(True)
    attention = (SMALL.num_attention_heads, tokens, tokens)
    assert attention in shapes
    assert attention not in others
    assert whole - less > layers * 10 * rows * tokens * size * 4


def test_scanned_layers_are_compiled_once():
    def count(layers, **options):
        network = model.BertModel(SMALL.replace(num_hidden_layers=layers), **options)
        params, skeleton = tree.split(network)
        forward = jax.jit(lambda params: tree.merge(skeleton, params)(**reference.inputs()).last_hidden_state)
        return len(products(forward.lower(params)))

    assert count(12, scan_layers=True) == count(2, scan_layers=True) == 8
    assert count(12) == 12 * 8


# ── Masks, packing, positions ──


def test_padding_changes_nothing(checkpoint):
    bert = load(checkpoint, "BertModel")
    given = reference.inputs()
    alone = bert(**{name: value[2:, :7] for name, value in given.items()})
    padded = bert(**given)
    close(padded.last_hidden_state[2:, :7], alone.last_hidden_state)
    given["input_ids"][2, 7:] = 5
    close(bert(**given).last_hidden_state[2, :7], alone.last_hidden_state[0])


def test_a_row_without_tokens_is_finite(checkpoint):
    given = reference.inputs()
    given["attention_mask"][1] = 0
    out = load(checkpoint, "BertForPreTraining")(**given)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


def test_packed_rows_equal_separate_ones(checkpoint):
    bert = load(checkpoint, "BertForMaskedLM")
    ids = reference.inputs()["input_ids"]
    packed = bert(
        np.concatenate([ids[0, :6], ids[1, :10], ids[2, :4], [0, 0]])[None],
        attention_mask=np.array([[1] * 20 + [0] * 2]),
        position_ids=np.array([[*range(6), *range(10), *range(4), 0, 0]]),
        document_ids=np.array([[1] * 6 + [2] * 10 + [3] * 4 + [0, 3]]),  # of padding, the mask decides
    ).logits[0]
    close(packed[:6], bert(ids[:1, :6]).logits[0])
    close(packed[6:16], bert(ids[1:2]).logits[0])
    close(packed[16:20], bert(ids[2:, :4]).logits[0])


def test_chosen_positions_equal_all(checkpoint):
    positions = np.array([[2, 9], [0, 0], [6, 1]])
    for architecture, name in [("BertForMaskedLM", "logits"), ("BertForPreTraining", "prediction_logits")]:
        network = load(checkpoint, architecture)
        everywhere = getattr(network(**reference.inputs()), name)
        chosen = getattr(network(**reference.inputs(), masked_positions=positions), name)
        assert chosen.shape == (3, 2, 60)
        close(chosen, np.take_along_axis(np.asarray(everywhere), positions[..., None], axis=1))


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(options, marks=pytest.mark.slow) for options in ({"scan_layers": True}, {"remat": True}))],
)
def test_the_last_layer_at_chosen_positions_is_the_whole_layer_there(checkpoint, options):
    given = reference.inputs() | {"document_ids": np.array([[0] * 4 + [1] * 6] * 3)}
    network = load(checkpoint, "BertModel", **options)
    params, skeleton = tree.split(network)
    for positions in ([[0]], [[0, 3], [0, 9], [0, 4]]):
        everywhere, chosen = network(**given), network(**given, positions=np.array(positions))
        rows = np.broadcast_to(positions, (3, len(positions[0])))
        close(
            chosen.last_hidden_state, np.take_along_axis(np.asarray(everywhere.last_hidden_state), rows[..., None], 1)
        )
        assert chosen.pooler_output.shape == (3, len(positions[0]), 8)
        close(chosen.pooler_output[:, 0], everywhere.pooler_output)
        attention = np.asarray(everywhere.attentions[-1])
        close(chosen.attentions[-1], np.take_along_axis(attention, rows[:, None, :, None], 2))
        assert len(chosen.hidden_states) == 13
        close(np.stack(chosen.hidden_states[:-1]), np.stack(everywhere.hidden_states[:-1]))
        close(np.stack(chosen.attentions[:-1]), np.stack(everywhere.attentions[:-1]))

    def pooled(params, positions):
        return jnp.sum(tree.merge(skeleton, params)(**given, positions=positions).pooler_output ** 2)

    gradients = [tree.flatten(jax.grad(pooled)(params, positions)) for positions in (None, heads.FIRST)]
    for path, expected in gradients[0].items():
        close(gradients[1][path], expected)


def test_many_tokens_and_few_are_multiplied_alike(checkpoint):
    # Above 128 tokens a product takes its operands the other way round.
    bert = load(checkpoint, "BertModel")
    given = reference.inputs()
    many = bert(**{name: np.tile(value, (6, 1)) for name, value in given.items()})
    close(many.last_hidden_state[:3], bert(**given).last_hidden_state)


def test_first_positions_alone_choose_the_next_sentence_logits(checkpoint):
    network, given = load(checkpoint, "BertForPreTraining"), reference.inputs()
    first, everything = np.array([[0, 4], [0, 6], [0, 3]]), np.broadcast_to(np.arange(10), (3, 10))
    alone, beside = (
        network(**given, first_positions=first),
        network(**given, first_positions=first, masked_positions=everything),
    )
    assert alone.seq_relationship_logits.shape == (3, 2, 2)
    close(alone.seq_relationship_logits, beside.seq_relationship_logits)
    close(alone.seq_relationship_logits[:, 0], network(**given).seq_relationship_logits)
    close(alone.prediction_logits, network(**given).prediction_logits)
    with pytest.raises(InputError, match=r"expected \[batch, tokens\]"):
        network(given["input_ids"][0], first_positions=first)


@pytest.mark.parametrize("architecture", ["BertForPreTraining", "BertForMaskedLM"])
def test_positions_of_one_row_are_those_of_all_and_others_are_refused(checkpoint, architecture):
    network, given = load(checkpoint, architecture), reference.inputs()
    names = ["masked_positions", "first_positions"][: 2 if architecture == "BertForPreTraining" else 1]
    for name in names:
        one, three = (network(**given, **{name: np.tile([[0, 4]], (rows, 1))}) for rows in (1, 3))
        for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(three), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        with pytest.raises(InputError, match=rf"^{name} has the shape \(2, 2\); input_ids has \(3, 10\)"):
            network(**given, **{name: np.zeros((2, 2), int)})
        with pytest.raises(InputError, match=rf"^{name}\[0, 1\] is 10; expected 0 to 9"):
            network(**given, **{name: np.array([[0, 10]])})


def test_defaults_are_no_padding_first_text_counting_positions(checkpoint):
    bert = load(checkpoint, "BertModel")
    ids = reference.inputs()["input_ids"]
    explicit = bert(ids, np.ones_like(ids), np.zeros_like(ids), np.tile(np.arange(10), (3, 1)))
    np.testing.assert_allclose(bert(ids).last_hidden_state, explicit.last_hidden_state, atol=1e-6)


def test_what_padding_looks_up_learns_nothing():
    # As torch.nn.Embedding(padding_idx=…): the padding's row of the table has no gradient, wherever the id stands.
    ids = np.array([[5, 0, 7, 0]], np.int32)

    def learning(pad_token_id):
        """Rows of the table that have a gradient."""
        embeddings = model.BertEmbeddings(SMALL.replace(pad_token_id=pad_token_id), nnx.Rngs(0))
        params, skeleton = tree.split(embeddings)

        def loss(params):
            return jnp.sum(jnp.sin(tree.merge(skeleton, params)(ids, 0 * ids, np.arange(4)[None])))

        table = tree.flatten(jax.grad(loss)(params))["word_embeddings.weight"]
        return np.flatnonzero(np.abs(table).max(-1)).tolist()

    assert learning(0) == [5, 7]
    assert learning(None) == [0, 5, 7]


# ── Dropout ──


@pytest.mark.parametrize("architecture", HEADS)
def test_dropout_if_and_only_if_a_key(checkpoint, architecture):
    network = load(checkpoint, architecture)
    given = reference.inputs()

    def first(key=None):
        return np.asarray(jax.tree.leaves(network(**given, dropout_key=key))[0])

    np.testing.assert_array_equal(first(), first())
    np.testing.assert_array_equal(first(jax.random.key(1)), first(jax.random.key(1)))
    assert not np.array_equal(first(jax.random.key(1)), first(jax.random.key(2)))
    assert not np.array_equal(first(jax.random.key(1)), first())


def test_each_place_drops_at_its_rate_with_a_key_of_its_own(monkeypatch):
    """The places are those of transformers' modeling_bert.py."""
    found, drop = [], nn.dropout

    def watched(x, rate, key):
        found.append((x.shape, rate, None if key is None else tuple(np.asarray(jax.random.key_data(key)).tolist())))
        return drop(x, rate, key)

    for module in (attention, heads, model):
        monkeypatch.setattr(module, "dropout", watched)
    config = SMALL.replace(
        num_hidden_layers=2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, classifier_dropout=0.3
    )
    hidden, probabilities = ((3, 10, 8), 0.1), ((3, 2, 10, 10), 0.2)
    encoder = [hidden, *[probabilities, hidden, hidden] * 2]
    of_head = {"BertForSequenceClassification": [((3, 8), 0.3)], "BertForTokenClassification": [((3, 10, 8), 0.3)]}
    for architecture in HEADS:
        found.clear()
        getattr(bert_jax, architecture)(config, rngs=nnx.Rngs(0))(**reference.inputs(), dropout_key=jax.random.key(0))
        assert [entry[:2] for entry in found] == [*encoder, *of_head.get(architecture, [])], architecture
        keys = {entry[2] for entry in found}
        assert None not in keys
        assert len(keys) == len(found), architecture


@pytest.mark.parametrize(
    ("equation", "x", "y"),
    [
        ("ni,oi->on", (6, 4), (5, 4)),
        ("ni,oi->no", (3, 4), (5, 4)),
        ("nd,vd->nv", (6, 4), (5, 4)),
        ("bnth,bnsh->bnts", (2, 3, 4, 5), (2, 3, 6, 5)),
        ("bnts,bnsh->bnth", (2, 3, 4, 5), (2, 3, 5, 6)),
    ],
)
def test_gradients_of_products_in_bfloat16(equation, x, y):
    x, y = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate((x, y)))

    def gradients(x, y):
        def loss(x, y):
            return jnp.sum(jnp.sin(nn.product(equation, x, y)))

        return jax.grad(loss, argnums=(0, 1))(x, y)

    low = gradients(x.astype(jnp.bfloat16), y)
    assert [leaf.dtype for leaf in low] == [jnp.bfloat16, jnp.float32]  # a weight's is not rounded
    rounded = x.astype(jnp.bfloat16).astype(jnp.float32), y.astype(jnp.bfloat16).astype(jnp.float32)
    for found, expected in zip(low, gradients(*rounded), strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("shape", [(4, 8), (3, 5, 7), (2, 3, 6, 6)])
def test_random_bits_of_any_shape(shape):
    bits = np.asarray(random.random_bits(jax.random.key(7), shape))
    assert bits.shape == shape
    assert len(np.unique(bits)) > 0.99 * bits.size


def test_tpus_draw_bits_with_their_own_generator():
    traced = jax.jit(lambda key: random.random_bits(key, (8, 4, 16))).trace(jax.random.key(0))
    text = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu", "cuda")}
    assert "rng_bit_generator" in text["tpu"]
    assert "xor" not in text["tpu"]  # the written-out one's
    for platform in ("cpu", "cuda"):
        assert "rng_bit_generator" not in text[platform]


def test_no_layer_drops_as_another():
    # All layers alike, no attention dropout: were two keys the same, two masks would be.
    keys = [nn.split_key(jax.random.fold_in(jax.random.key(0), i), 3) for i in range(12)]
    data = {tuple(np.asarray(jax.random.key_data(key))) for layer in keys for key in layer}
    assert len(data) == 36


def test_fused_attention_refuses_dropout_and_gives_no_maps(checkpoint, monkeypatch):
    def fused(query, key, value, mask, rate, dropout_key):
        return attention.plain_attention(query, key, value, mask, rate, dropout_key)[0], None

    monkeypatch.setitem(attention.ATTENTION, "fused", fused)
    network = load(checkpoint, "BertModel", attention="fused")
    out = network(**reference.inputs())
    assert out.attentions == (None,) * 12
    with pytest.raises(InputError, match=r"attention_probs_dropout_prob 0\.1"):
        network(**reference.inputs(), dropout_key=jax.random.key(0))


# ── Many rows ──


@pytest.mark.parametrize("width", [3, 8])
def test_forty_thousand_rows_are_reduced_rightly(width):
    """jaxlib 0.10.2 reduces products with vectors of three wrongly from row 32,769 on (jax issue 39103)."""
    n, random = 40_000, np.random.default_rng(0)
    x = random.normal(1, 1, (n, width)).astype(np.float32)
    linear, norm = nn.Linear(width, width, 1.0, nnx.Rngs(0)), nn.LayerNorm(width, 0.1, nnx.Rngs(0))
    labels = np.where(random.random(n) < 0.9, random.integers(0, width, n), losses.IGNORE)
    weights = (random.random(n) < 0.9).astype(np.float32)
    attended = attention.Attended(jnp.ones((n // 4, 1), jnp.int32), jnp.asarray(random.integers(0, 2, (n // 4, 4))))

    def loss(x):
        return losses.cross_entropy(linear(x), labels)

    def probabilities(x):
        one_head = x.reshape(n // 4, 4, 1, width)
        return attention.plain_attention(one_head, one_head, one_head, attended, 0.0, None)[1]

    found = {
        "linear and norm": lambda x: norm(linear(x)),
        "attention": probabilities,
        "cross entropy": loss,
        "binary cross entropy": lambda x: losses.binary_cross_entropy(linear(x), x > 1, weights),
        "squared error": lambda x: losses.squared_error(linear(x), x, weights),
        "span": lambda x: losses.span_cross_entropy(x, linear(x), labels, labels),
        "gradient norm": lambda x: optax.tree.norm(jax.grad(loss)(x)),
    }

    def cross_entropy(logits):
        """Mean nll of the labels, and its gradient."""
        counts, rows = labels != losses.IGNORE, np.arange(n)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        gradient = np.exp(log_p)
        gradient[rows, labels * counts] -= 1
        return -log_p[rows, labels * counts][counts].mean(), gradient * counts[:, None] / counts.sum()

    x64, weight = x.astype(np.float64), np.asarray(linear.weight[...], np.float64)
    y = x64 @ weight.T
    centered = y - y.mean(-1, keepdims=True)
    heads = x64.reshape(n // 4, 4, width)
    scores = np.exp(np.where(attended.mask()[:, 0], heads @ heads.swapaxes(1, 2) / np.sqrt(width), -1e30))
    scores[~np.asarray(attended.keys, bool).any(-1)] = 1
    nll, gradient = cross_entropy(y)
    share = weights[:, None] / (weights.sum() * width)
    expected = {
        "linear and norm": centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 0.1),
        "attention": (scores / scores.sum(-1, keepdims=True))[:, None],
        "cross entropy": nll,
        "binary cross entropy": ((np.logaddexp(0, y) - y * (x > 1)) * share).sum(),
        "squared error": ((y - x64) ** 2 * share).sum(),
        "span": (cross_entropy(x64)[0] + nll) / 2,
        "gradient norm": np.linalg.norm(gradient @ weight),
    }
    for name, function in found.items():  # each a program of its own: what XLA fuses with what decides
        np.testing.assert_allclose(jax.jit(function)(x), expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


# ── Bad input ──


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"input_ids": np.full((3, 10), 60)}, r"input_ids\[0, 0\] is 60; expected 0 to 59. Was the text tokenized"),
        ({"input_ids": np.full((3, 10), -1)}, r"input_ids\[0, 0\] is -1"),
        ({"token_type_ids": np.full((3, 10), 2)}, r"token_type_ids\[0, 0\] is 2"),
        ({"position_ids": np.full((3, 10), 32)}, r"position_ids\[0, 0\] is 32"),
        ({"input_ids": np.zeros((3, 33), int)}, "33 tokens per row; the model has 32"),
        ({"input_ids": np.zeros(10, int)}, r"\[batch, tokens\]"),
        ({"attention_mask": np.ones((3, 9))}, r"attention_mask has the shape \(3, 9\)"),
        ({"document_ids": np.ones((1, 10))}, "document_ids"),
        ({"positions": np.full((1, 1), 10)}, r"positions\[0, 0\] is 10; expected 0 to 9"),
        ({"positions": np.zeros((2, 1), int)}, r"positions has the shape \(2, 1\)"),
    ],
)
def test_bad_inputs_are_refused(checkpoint, change, named):
    with pytest.raises(InputError, match=named):
        load(checkpoint, "BertModel")(**(reference.inputs() | change))


def test_an_unseen_bad_id_gives_nan(checkpoint):
    bert = load(checkpoint, "BertModel")
    out = jax.jit(lambda ids: bert(ids).last_hidden_state)(np.array([[1, 60, 2]]))
    assert np.isnan(out).all()  # attention carries it to the whole row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16'; expected float32 or bfloat16"),
        ({"attention": "flash"}, "attention is .flash.; expected one of auto, plain"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        heads.BertForMaskedLM(SMALL, **options)


@pytest.mark.parametrize("name", ["compute_dtype", "attention", "remat", "scan_layers"])
def test_an_option_of_the_encoder_is_not_set_on_a_model_with_a_head(name):
    network = heads.BertForSequenceClassification(SMALL)
    before = getattr(network.encoder, name)
    with pytest.raises(
        InputError, match=rf"^{name} is an option of the encoder; set model\.encoder\.{name} instead\.$"
    ):
        setattr(network, name, before)
    setattr(network.encoder, name, before)
    headless = model.BertModel(SMALL)
    setattr(headless, name, before)
    network.attention = nnx.Linear(1, 1, rngs=nnx.Rngs(0))  # a layer of one's own
    assert network.attention.in_features == 1


@pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM"])
def test_there_is_no_training_mode(architecture):
    network = getattr(bert_jax, architecture)(SMALL)
    message = f"^A {architecture} has no training mode: in each call, dropout is on if `dropout_key` is given.$"
    with pytest.raises(InputError, match=message):
        network.train()
    network.eval()  # as it is


def test_base_class_is_no_network():
    with pytest.raises(TypeError, match="BertPreTrainedModel is not a network"):
        model.BertPreTrainedModel(SMALL)


# ── More tokens ──


def encoded(network, ids):
    return {name: np.asarray(value) for name, value in vars(network(ids)).items() if isinstance(value, jax.Array)}


@pytest.mark.parametrize(
    ("architecture", "initialize"),
    [("BertModel", "mean"), ("BertForMaskedLM", "mean"), ("BertForPreTraining", "normal")],
)
def test_resized_embeddings(checkpoint, tmp_path, architecture, initialize):
    network, before = load(checkpoint, architecture), load(checkpoint, architecture)
    network.resize_embeddings(61, initialize=initialize)
    assert network.config.vocab_size == 61
    ids = reference.inputs()["input_ids"]
    found = encoded(network, ids)
    for name, expected in encoded(before, ids).items():
        ours = found[name]
        np.testing.assert_array_equal(ours[..., :60] if ours.shape[-1] == 61 else ours, expected)
    table, old = (m.encoder.embeddings.word_embeddings.weight[...] for m in (network, before))
    np.testing.assert_array_equal(table[:60], old)
    if initialize == "mean":
        np.testing.assert_allclose(table[60], np.asarray(old).mean(axis=0), atol=1e-6)
    else:
        assert 0 < np.abs(table[60]).max() < 2.3 * SMALL.initializer_range
    if architecture in ("BertForMaskedLM", "BertForPreTraining"):
        bias, old_bias = (np.asarray(m.predictions.bias[...]) for m in (network, before))
        np.testing.assert_allclose(bias, [*old_bias, old_bias.mean() if initialize == "mean" else 0], atol=1e-6)
    assert np.isfinite(np.asarray(network.encoder(np.full_like(ids, 60)).last_hidden_state)).all()
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path)
    assert again.config == network.config
    ours, theirs = (tree.flatten(tree.split(m)[0]) for m in (network, again))
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def test_resizing_to_a_multiple(checkpoint):
    network = load(checkpoint, "BertForMaskedLM")
    network.resize_embeddings(61, multiple_of=64)
    assert network(**reference.inputs()).logits.shape[-1] == network.config.vocab_size == 64
    network.resize_embeddings(64, multiple_of=64)
    assert network.config.vocab_size == 64
    one, other = (load(checkpoint, "BertModel") for _ in range(2))
    one.resize_embeddings(70, initialize="normal", rngs=nnx.Rngs(1))
    other.resize_embeddings(70, initialize="normal")
    assert not np.array_equal(*(m.embeddings.word_embeddings.weight[60:] for m in (one, other)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 59}, "size is 59; expected a whole number of at least 60"),
        ({"size": 61.0}, "size is 61.0"),
        ({"size": True}, "size is True"),
        ({"size": 61, "multiple_of": 0}, "multiple_of is 0; expected a whole number of at least 1"),
        ({"size": 61, "initialize": "zeros"}, "initialize is 'zeros'; expected 'mean' or 'normal'"),
    ],
)
def test_sizes_that_are_refused(checkpoint, arguments, message):
    network = load(checkpoint, "BertModel")
    with pytest.raises(InputError, match=message):
        network.resize_embeddings(**arguments)
    assert network.config.vocab_size == 60


@pytest.mark.slow
@pytest.mark.parametrize("size", [28997, 29000, 29060, 29056])
def test_old_logits_at_the_published_size(size):
    """XLA's order of summation on CPUs depends on the remainder of the size by 16, which is 0 for 29,056 alone."""
    ids = np.random.default_rng(0).integers(0, 28996, (2, 16))
    config = BertConfig(num_hidden_layers=1)
    before, network = (bert_jax.BertForMaskedLM(config, rngs=nnx.Rngs(0)) for _ in range(2))
    network.resize_embeddings(size)
    expected, ours = (jax.jit(lambda ids, m=m: m(ids).logits)(ids) for m in (before, network))
    if size % 16:
        np.testing.assert_array_equal(ours[..., :28996], expected)
    np.testing.assert_allclose(ours[..., :28996], expected, rtol=0, atol=1e-5)
