import jax
import numpy as np
import pytest
from flax import nnx

from bert_jax import BertConfig, BertForMaskedLM, BertForPreTraining, sharding, tree
from bert_jax.data import corpus
from bert_jax.data.loader import Loader
from bert_jax.data.masking import MaskedExamples, Masking
from bert_jax.evaluation import measure
from bert_jax.losses import IGNORE
from bert_jax.tasks.pretraining import MaskedLanguageModeling, PreTraining

TEXT = [f"The {n}th house stands here. It is {'big' * n}.\nNobody lives in house {n}." for n in range(24)]
TASKS = [(PreTraining(), BertForPreTraining), (MaskedLanguageModeling(), BertForMaskedLM)]


@pytest.fixture(scope="module")
def examples(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("\n\n".join(TEXT))
    layout = corpus.Layout(max_length=32, short=0.5)
    shards = corpus.tokenize([folder / "text.txt"], folder / "shards", tokenizer, layout, processes=1)
    return MaskedExamples.of(shards, tokenizer, Masking(), 0)


@pytest.fixture(scope="module", params=TASKS, ids=["both", "masked tokens alone"])
def case(request, tokenizer):
    task, model_class = request.param
    config = BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, initializer_range=0.5,
    )  # fmt: skip
    return task, model_class(config, rngs=nnx.Rngs(0))


def evaluate(task, model, examples, packing):
    params, skeleton = tree.split(model)
    mesh = sharding.mesh(data=1)
    return measure.evaluate(
        task, measure.program(task, skeleton), params, examples, batch_size=16, packing=packing, mesh=mesh
    )


def by_hand(task, model, batch):
    """Losses and hits of an unpacked batch, from all tokens' logits, in float64."""
    out = jax.jit(lambda inputs: model(**inputs))(batch["inputs"])
    targets = batch["targets"]
    rows, columns = np.nonzero(targets["labels"] != IGNORE)
    positions, labels = targets["masked_positions"][rows, columns], targets["labels"][rows, columns]
    every = np.asarray(out.prediction_logits if isinstance(task, PreTraining) else out.logits)
    logits = every[rows, positions].astype(np.float64)
    log_p = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(labels)), labels]
    result = {"mlm": -log_p, "mlm_right": logits.argmax(-1) == labels}
    if isinstance(task, PreTraining):
        logits = np.asarray(out.seq_relationship_logits, np.float64)
        there, label = batch["weights"][:, 0] > 0, targets["next_sentence_label"][:, 0]
        log_p = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(label)), label]
        result |= {"nsp": -log_p[there], "nsp_right": (logits.argmax(-1) == label)[there]}
    return result


def test_loss_is_both_means(case, examples):
    task, model = case
    batch = Loader(examples, 16, seed=0, share=7).batch_at(0)  # with rows of padding
    loss, count = jax.jit(lambda batch: task.loss(model, batch, None))(batch)
    expected = by_hand(task, model, batch)
    assert float(loss) == pytest.approx(sum(expected[name].mean() for name in ("mlm", "nsp") if name in expected), 1e-5)
    assert float(count) == len(expected["mlm"])


def test_metrics_are_those_of_all_examples(case, examples):
    task, model = case
    metrics = evaluate(task, model, examples, None).metrics
    loader = Loader(examples, 16, seed=0)
    found = [by_hand(task, model, loader.batch_at(step)) for step in range(loader.steps_per_epoch)]
    every = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    assert metrics["mlm_loss"] == pytest.approx(every["mlm"].mean(), 1e-5)
    assert metrics["mlm_accuracy"] == pytest.approx(every["mlm_right"].mean(), 1e-6)
    assert metrics["pseudo_perplexity"] == pytest.approx(np.exp(every["mlm"].mean()), 1e-4)
    if "nsp" in every:
        assert metrics["nsp_loss"] == pytest.approx(every["nsp"].mean(), 1e-5)
        assert metrics["nsp_accuracy"] == pytest.approx(every["nsp_right"].mean(), 1e-6)


def test_packed_rows_give_the_same(case, examples):
    task, model = case
    one, packed = (evaluate(task, model, examples, packing) for packing in (None, 64))
    assert Loader(examples, 16, seed=0, packing=64).place(0).shape.examples > 1
    for name, column in one.outputs.items():
        np.testing.assert_allclose(packed.outputs[name], column, rtol=2e-5, atol=1e-5)
    assert packed.metrics["mlm_loss"] == pytest.approx(one.metrics["mlm_loss"], rel=1e-6)


def test_gradients_reach_everything(case, examples):
    task, model = case
    params, skeleton = tree.split(model)
    batch = Loader(examples, 16, seed=0, packing=64).batch_at(0)

    def loss(params):
        return task.loss(tree.merge(skeleton, params), batch, jax.random.key(0))[0]

    gradients = tree.flatten(jax.jit(jax.grad(loss))(params))
    assert [path for path, g in gradients.items() if not np.any(g)] == []


@pytest.mark.parametrize("task", [task for task, _ in TASKS])
def test_nothing_masked_has_no_metrics_of_masked_tokens(task):
    zeros = {name: np.zeros(3, np.float32) for name in ("masked", "mlm_nll", "mlm_correct")}
    found = task.evaluate(zeros | {"nsp_nll": np.ones(3), "nsp_correct": np.ones(3)}, None)
    assert found == ({"nsp_loss": 1.0, "nsp_accuracy": 1.0} if isinstance(task, PreTraining) else {})
