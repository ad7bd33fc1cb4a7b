"""The models that a server loads."""

import jax
import pytest

import bert_jax
from bert_jax import tree
from bert_jax.inference.server import models

INPUTS = {
    "fill-mask": "good [MASK]",
    "next-sentence-prediction": ("good", "bad"),
    "feature-extraction": "good",
    "pseudo-log-likelihood": "good",
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_tasks_share_what_they_have_in_common(folder, dtype):
    served = models.load("small", folder, tasks=tuple(INPUTS), dtype=dtype)
    arrays = {id(array) for pipe in served.pipes.values() for array in jax.tree.leaves(pipe.params)}
    whole = bert_jax.BertForPreTraining.from_pretrained(folder, dtype=dtype)
    assert len(arrays) == len(jax.tree.leaves(tree.split(whole)[0]))
    for task, given in INPUTS.items():
        assert str(served.pipes[task](given)) == str(bert_jax.pipeline(task, folder, dtype=dtype)(given))
