"""The recipe of docs/export.md for ONNX, whose programs ONNX Runtime runs."""

import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import bert_jax

onnxruntime = pytest.importorskip("onnxruntime")

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
(RECIPE,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "torch.onnx" in code]
CONFIG = bert_jax.BertConfig(
    vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=2,
    initializer_range=0.25,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "outputs"),
    [("BertForSequenceClassification", ["logits"]), ("BertForQuestionAnswering", ["start_logits", "end_logits"])],
)
def test_onnx(tmp_path, monkeypatch, close, one_torch_thread, name, outputs):
    monkeypatch.chdir(tmp_path)
    model = getattr(bert_jax, name)(CONFIG, rngs=nnx.Rngs(0))
    recipe = RECIPE.replace("BertForSequenceClassification", name).replace('["logits"]', repr(outputs))
    exec(recipe, {"model": model})
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    random = np.random.RandomState(0)
    for batch, length in [(1, 1), (3, 512), (8, 7)]:
        mask = random.randint(0, 2, (batch, length))
        mask[:, 0] = 1
        inputs = {"input_ids": random.randint(0, 60, (batch, length)), "attention_mask": mask}
        inputs["token_type_ids"] = random.randint(0, 2, (batch, length))
        found, own = session.run(outputs, inputs), model(**inputs)
        for output, array in zip(outputs, found, strict=True):
            assert np.abs(array).max() > 0.1
            close(f"ONNX Runtime, {name}", getattr(own, output), array)
