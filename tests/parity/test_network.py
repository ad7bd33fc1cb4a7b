"""Seeded random models of the published shapes, saved in the published naming: submodules, heads, gradients.

`small` has the 12 layers of base at a 12th of its width: quick enough to be run again for each mutation.
"""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
import transformers
from safetensors.torch import save_file

import bert_jax
from bert_jax import losses, tree, weights
from bert_jax.attention import Attended

SHAPES = {
    # Weights as much wider as the layers are narrower, so that activations are of the size of base's.
    "small": {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 256}
    | {"initializer_range": 0.07},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
HEADS = list(reference.HEADS)


@pytest.fixture(scope="module", params=SHAPES)
def shape(request):
    return request.param


@pytest.fixture(scope="module")
def folder(shape, tmp_path_factory):
    """One file with the encoder and all heads, by the names of the published checkpoints."""
    path = tmp_path_factory.mktemp(shape)
    config = transformers.BertConfig(
        vocab_size=2000 if shape == "small" else 28996, num_labels=3, layer_norm_eps=1e-12, **SHAPES[shape]
    )
    torch.manual_seed(0)
    state = transformers.BertForPreTraining(config).state_dict()
    for name in ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"):
        state.pop(name, None)
    for name, outputs in [("classifier", 3), ("qa_outputs", 2)]:
        state[f"{name}.weight"] = torch.randn(outputs, config.hidden_size) * 0.02
        state[f"{name}.bias"] = torch.zeros(outputs)
    published = {}
    for name, tensor in state.items():
        if name.endswith(".bias") or ".LayerNorm." in name:
            tensor = tensor + 0.1 * torch.randn_like(tensor)
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        published[name] = tensor.contiguous().clone()
    save_file(published, path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(path)
    yield path
    shutil.rmtree(path)


@functools.lru_cache(maxsize=1)
def theirs(folder, architecture):
    options = {"num_labels": 2} if architecture == "BertForQuestionAnswering" else {}
    model = getattr(transformers, architecture)
    return model.from_pretrained(folder, attn_implementation="eager", **options).eval()


@functools.lru_cache(maxsize=1)
def ours(folder, architecture, scan_layers=False):
    return getattr(bert_jax, architecture).from_pretrained(folder, scan_layers=scan_layers)


def inputs(config, rows, tokens):
    """Texts and pairs, the later rows padded more and more."""
    random = np.random.RandomState(tokens)
    mask, types = np.ones((2, rows, tokens), np.int32)
    for row in range(rows):
        mask[row, tokens - row * tokens // (2 * rows) :] = 0
        types[row, : tokens // 2 if row % 2 else tokens] = 0
    ids = random.randint(5, config.vocab_size, (rows, tokens)).astype(np.int32) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def as_torch(given):
    return {name: torch.tensor(value).long() for name, value in given.items()}


def numpy(tensor):
    return tensor.detach().numpy()


# ── Submodules: each is given what PyTorch's was given, so that errors do not add up ──


@torch.no_grad()
def test_submodules(folder, shape, close):
    reference_model, bert = theirs(folder, "BertModel"), ours(folder, "BertModel")
    given = inputs(bert.config, 3, 24)
    seen = {}

    def keep(name):
        def hook(module, arguments, keywords, output):
            first = arguments[0] if arguments else keywords.get("hidden_states")
            seen[name] = (first, output[0] if isinstance(output, tuple) else output)

        return hook

    for name, module in reference_model.named_modules():
        module.register_forward_hook(keep(name), with_kwargs=True)
    out = reference_model(**as_torch(given), output_attentions=True)
    keys = jnp.asarray(given["attention_mask"])
    attended = Attended(jnp.ones_like(keys[:, :1]), keys)
    close(
        f"{shape} embeddings",
        bert.embeddings(given["input_ids"], given["token_type_ids"], np.arange(24)[None]),
        numpy(seen["embeddings"][1]),
    )
    for i, layer in enumerate(bert.layers):
        for part, module, arguments in [
            ("attention.self.query", layer.attention.query, ()),
            ("attention.self.key", layer.attention.key, ()),
            ("attention.self.value", layer.attention.value, ()),
            ("attention.output.dense", layer.attention.output, ()),
            ("attention.output.LayerNorm", layer.attention_norm, ()),
            ("intermediate.dense", layer.intermediate, ()),
            ("intermediate", lambda x, layer=layer: bert_jax.nn.ACTIVATIONS["gelu"](layer.intermediate(x)), ()),
            ("output.dense", layer.output, ()),
            ("output.LayerNorm", layer.output_norm, ()),
            ("", lambda x, layer=layer: layer(x, attended)[0], ()),
        ]:
            x, y = seen[f"encoder.layer.{i}.{part}".rstrip(".")]
            close(f"{shape} layer {part}".strip(), module(jnp.asarray(x.numpy()), *arguments), numpy(y))
        x, _ = seen[f"encoder.layer.{i}"]
        close(f"{shape} layer attention maps", layer(jnp.asarray(x.numpy()), attended)[1], numpy(out.attentions[i]))
    x, y = seen["pooler"]
    close(f"{shape} pooler", jnp.tanh(bert.pooler(jnp.asarray(x.numpy())[:, 0])), numpy(y))
    theirs.cache_clear()  # its hooks hold on to every activation


# ── Heads ──


# Every head at the shapes of small and base; large's pretraining heads reach all that is wider there.
@pytest.mark.parametrize(
    ("shape", "architecture"),
    [(shape, head) for shape in SHAPES for head in HEADS if shape != "large" or head == "BertForPreTraining"],
    indirect=["shape"],
)
@torch.no_grad()
def test_heads(folder, shape, close, architecture):
    model = ours(folder, architecture)
    params, skeleton = tree.split(model)
    given = inputs(model.config, 4, 32)
    expected = theirs(folder, architecture)(**as_torch(given), output_hidden_states=True, output_attentions=True)
    out = jax.jit(lambda p, i: tree.merge(skeleton, p)(**i))(params, given)
    names = [name for name in expected if hasattr(out, name) and name not in ("hidden_states", "attentions")]
    assert names
    for name in names:
        close(f"{shape} {architecture} {name}", getattr(out, name), numpy(expected[name]))
    for ours_, theirs_ in zip(out.hidden_states, expected.hidden_states, strict=True):
        close(f"{shape} hidden states", ours_, numpy(theirs_))
    for ours_, theirs_ in zip(out.attentions, expected.attentions, strict=True):
        close(f"{shape} attention maps", ours_, numpy(theirs_))


# The small shape and base have every length. Large has one, with its layers as one loop. With one token, attention
# would be trivial; up to 128 tokens, products have another order.
@pytest.mark.parametrize(
    ("shape", "tokens"),
    [(shape, n) for shape in SHAPES for n in (1, 2, 15, 64, 129, 512) if shape != "large" or n == 129],
    indirect=["shape"],
)
@torch.no_grad()
def test_lengths(folder, shape, close, tokens):
    model = ours(folder, "BertForPreTraining", scan_layers=shape == "large")
    given = inputs(model.config, 2, tokens)
    expected = theirs(folder, "BertForPreTraining")(**as_torch(given))
    params, skeleton = tree.split(model)
    out = jax.jit(lambda p, i: tree.merge(skeleton, p)(**i))(params, given)
    close(f"{shape} MLM logits, 1 to 512 tokens", out.prediction_logits, numpy(expected.prediction_logits))
    close(f"{shape} NSP logits, 1 to 512 tokens", out.seq_relationship_logits, numpy(expected.seq_relationship_logits))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02), ("int8", 0.06)])
@torch.no_grad()
def test_lower_precision(folder, shape, close, dtype, tolerance):
    model = bert_jax.BertForPreTraining.from_pretrained(folder, dtype=dtype)
    given = inputs(model.config, 4, 32)
    expected = theirs(folder, "BertForPreTraining")(**as_torch(given))
    params, skeleton = tree.split(model)
    out = jax.jit(lambda p, i: tree.merge(skeleton, p)(**i))(params, given)
    for name in ("prediction_logits", "seq_relationship_logits"):
        close(f"{shape} {dtype} {name}", getattr(out, name), numpy(expected[name]), tolerance)


# ── Gradients ──


def targets(config, name):
    """Labels of a loss as PyTorch takes them, and the loss as a function of our output."""
    random = np.random.RandomState(3)
    mlm = np.where(random.rand(2, 16) < 0.3, random.randint(5, config.vocab_size, (2, 16)), -100)
    nsp, classes, token = np.array([0, 1]), np.array([2, 0]), random.randint(0, 3, (2, 16))
    token[1, 12:] = -100
    several, real = np.array([[1.0, 0, 1], [0, 1, 1]], np.float32), random.randn(2, 3).astype(np.float32)
    return {
        "pretraining": (
            {"labels": mlm, "next_sentence_label": nsp},
            lambda out: (
                losses.cross_entropy(out.prediction_logits, mlm)
                + losses.cross_entropy(out.seq_relationship_logits, nsp)
            ),
        ),
        "mlm": ({"labels": mlm}, lambda out: losses.cross_entropy(out.logits, mlm)),
        "nsp": ({"labels": nsp}, lambda out: losses.cross_entropy(out.logits, nsp)),
        "single_label_classification": ({"labels": classes}, lambda out: losses.cross_entropy(out.logits, classes)),
        "multi_label_classification": (
            {"labels": several},
            lambda out: losses.binary_cross_entropy(out.logits, several),
        ),
        "regression": ({"labels": real}, lambda out: losses.squared_error(out.logits, real)),
        "token": ({"labels": token}, lambda out: losses.cross_entropy(out.logits, token)),
        "qa": (
            {"start_positions": np.array([1, 3]), "end_positions": np.array([4, 9])},
            lambda out: losses.span_cross_entropy(out.start_logits, out.end_logits, np.array([1, 3]), np.array([4, 9])),
        ),
    }[name]


LOSSES = [
    ("BertForPreTraining", "pretraining"),
    ("BertForMaskedLM", "mlm"),
    ("BertForNextSentencePrediction", "nsp"),
    ("BertForSequenceClassification", "single_label_classification"),
    ("BertForSequenceClassification", "multi_label_classification"),
    ("BertForSequenceClassification", "regression"),
    ("BertForTokenClassification", "token"),
    ("BertForQuestionAnswering", "qa"),
]


# Every loss at one shape. Pretraining's, at the published shapes too, reaches all there is: embeddings, layers, pooler,
# a head of the first token and a head of all tokens.
@pytest.mark.parametrize(
    ("shape", "architecture", "name"),
    [(shape, *case) for shape in SHAPES for case in LOSSES if shape == "small" or case[1] == "pretraining"],
    indirect=["shape"],
)
def test_gradients(folder, shape, close, architecture, name):
    model = ours(folder, architecture, scan_layers=shape == "large")
    reference_model = theirs(folder, architecture)
    given = inputs(model.config, 2, 16)
    labels, objective = targets(model.config, name)
    params, skeleton = tree.split(model)
    loss, gradients = jax.jit(jax.value_and_grad(lambda p: objective(tree.merge(skeleton, p)(**given))))(params)
    reference_model.zero_grad()
    reference_model.config.problem_type = name if "_" in name or name == "regression" else None
    labels = {key: torch.tensor(value) for key, value in labels.items()}
    expected = reference_model(**as_torch(given), **labels).loss
    expected.backward()
    close(f"{shape} loss {name}", loss, numpy(expected))
    flat = tree.flatten(gradients)
    table = weights._table(flat)
    found = {key: parameter.grad for key, parameter in reference_model.named_parameters()}
    assert len(found) == len(flat)
    total = float(torch.sqrt(sum(torch.sum(g.double() ** 2) for g in found.values())))
    worst = 0.0
    for key, g in found.items():
        difference = float(np.linalg.norm((np.asarray(flat[table[key]]) - g.numpy()).ravel()))
        norm = float(g.norm())
        worst = max(worst, difference / (1e-4 * norm + 1e-7 * total))
        assert difference <= 1e-4 * norm + 1e-7 * total, f"{key}: {difference:.1e} of {norm:.1e}, in all {total:.1e}"
    close(f"{shape} gradients, share of what is allowed", worst, 0.0, tolerance=1.0)
    reference_model.zero_grad()
