"""Packed rows give what rows of one example give: outputs, losses, gradients, for every task that is trained."""

import random

import jax
import numpy as np
import pytest
from flax import nnx

import bert_jax
from bert_jax import sharding, tree
from bert_jax.data.loader import Loader
from bert_jax.evaluation import measure
from bert_jax.tasks.base import ReadOptions
from bert_jax.tasks.question_answering import AnswerOptions, QuestionAnswering
from bert_jax.tasks.sequence_classification import SequenceClassification
from bert_jax.tasks.token_classification import TokenClassification

WORDS = ("The", "weather", "in", "Paris", "is", "nice", "today", "Unbelievably", ",", "kangaroos", "jump")
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LONGEST = 40


def rows(task_class, count=21):
    source = random.Random(0)
    found = []
    for n in range(count):
        words = [source.choice(WORDS) for _ in range(source.randint(1, 25))]
        text = " ".join(words)
        if task_class is TokenClassification:
            found.append({"tokens": words, "tags": [source.choice(["O", "B-X"]) for _ in words]})
        elif task_class is QuestionAnswering:
            place = text.rindex(words[-1])
            answers = {"text": words[-1:], "answer_start": [place]} if n % 3 else {"text": [], "answer_start": []}
            found.append({"question": "Which ?", "context": text, "answers": answers})
        else:
            found.append({"text": text, "label": ["no", "yes"][n % 2]})
    found = task_class.clean({"train": found}, ReadOptions())[0]["train"]
    return found


@pytest.fixture(scope="module", params=[SequenceClassification, TokenClassification, QuestionAnswering])
def trained(request, tokenizer):
    """A task, a model for it, and examples."""
    labels = ("O", "B-X", "I-X") if request.param is TokenClassification else ("no", "yes")
    config = bert_jax.BertConfig(**SHAPE, id2label=labels, num_labels=len(labels))
    model = request.param.model_class(config, rngs=nnx.Rngs(0))
    # Larger weights, so that a wrong token or mask shows.
    params, skeleton = tree.split(model)
    params = jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim == 2 else leaf, params)
    options = {"answers": AnswerOptions(stride=8)} if request.param is QuestionAnswering else {}
    task = request.param(tokenizer, config, LONGEST, **options)
    return task, tree.merge(skeleton, params), task.featurize(rows(request.param))


@pytest.mark.parametrize(("devices", "batch_size"), [pytest.param(1, 8, marks=pytest.mark.slow), (2, 16)])
def test_packed_and_unpacked_outputs_agree(trained, devices, batch_size):
    task, model, examples = trained
    params, skeleton = tree.split(model)
    mesh = sharding.mesh(data=devices)
    params = jax.device_put(params, sharding.replicated(mesh))
    program = measure.program(task, skeleton)
    one, packed = (
        measure.evaluate(task, program, params, examples, batch_size=batch_size, packing=packing, mesh=mesh)
        for packing in (None, 128)
    )
    assert program._cache_size() >= 2
    for name, column in one.outputs.items():
        assert len(column) == len(packed.outputs[name]) == len(examples)
        for i, (a, b) in enumerate(zip(column, packed.outputs[name], strict=True)):
            assert a.shape == b.shape
            if task.per_token:
                assert len(a) == examples.lengths[i]
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=f"{name} of {i}")
    assert np.ptp(np.concatenate([np.ravel(column[0]) for column in one.outputs.values()])) > 0.05
    assert one.metrics["loss"] == pytest.approx(packed.metrics["loss"], rel=1e-6)


def test_packed_and_unpacked_gradients_agree(trained):
    task, model, examples = trained
    params, skeleton = tree.split(model)
    gradient = jax.jit(
        jax.value_and_grad(lambda params, batch: task.loss(tree.merge(skeleton, params), batch, None)[0])
    )
    sums = []
    for packing in (None, 128):
        loader = Loader(examples, len(examples), seed=0, packing=packing)
        assert loader.steps_per_epoch == 1
        batch = loader.batch_at(0)
        assert ("document_ids" in batch["inputs"]) == bool(packing)
        sums.append(gradient(params, batch))
    (loss, expected), (packed_loss, found) = sums
    assert float(packed_loss) == pytest.approx(float(loss), rel=1e-6)
    found = tree.flatten(found)
    for path, leaf in tree.flatten(expected).items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-5 * max(1, np.abs(leaf).max()), err_msg=path)
