"""Evaluation of a pretrained model against a direct computation in PyTorch transformers, on 200 texts."""

import json
import pydoc_data.topics

import numpy as np
import pytest
import torch
import transformers

from bert_jax import hub, recipes
from bert_jax.evaluation import held_out
from bert_jax.settings import HeldOut

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TEXTS = [part for topic in sorted(pydoc_data.topics.topics) for part in pydoc_data.topics.topics[topic].split("\n\n")
         if len(part) > 100][:200]  # fmt: skip


@pytest.mark.parametrize("words", ["random", "each"])
def test_measures(tmp_path, words):
    texts = TEXTS if words == "random" else TEXTS[:4]
    assert len(texts) == (200 if words == "random" else 4)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = HeldOut.from_dict(
        {"task": "fill-mask", "data": {"test": str(tmp_path / "texts.jsonl")}, "masking": {"words": words}}
    )
    ours = recipes.evaluate_held_out(["bert-mini-cased"], settings, "test")["bert-mini-cased"]
    folder = hub.EMBEDDED / "bert-mini-cased"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    pipe = held_out.pipeline("fill-mask", "bert-mini-cased")
    task = held_out.HiddenTokens(pipe.tokenizer, pipe.config, 128)
    nll, rank = [], []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=128)["input_ids"]
        for row in next(task.hide(text, settings.masking.words, settings.masking.share, settings.seed)):
            # What is hidden is ours to choose; what the rest says comes from transformers' own tokens.
            masked = torch.tensor([ids])
            masked[0, row.masked_positions] = tokenizer.mask_token_id
            with torch.no_grad():
                hidden = model.bert(masked).last_hidden_state[0, row.masked_positions]
                log_p = torch.log_softmax(model.cls(hidden), -1).numpy()
            for p, position in zip(log_p, row.masked_positions, strict=True):
                nll.append(-p[ids[position]])
                rank.append(1 + np.sum(p > p[ids[position]]))
    assert ours["tokens"] == len(nll)
    assert ours["nll"]["value"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert ours["mrr"]["value"] == pytest.approx(np.mean(1 / np.array(rank)), rel=1e-5)
    for k in (1, 5, 10):
        assert ours[f"accuracy@{k}"]["value"] == np.mean(np.array(rank) <= k)
