"""Writes outputs of `transformers` (PyTorch) to tests/golden, so that the default tests do not need `transformers`.

    pip install -e '.[parity]'
    python scripts/make_golden.py

The files are small_model.json and embedded_fill_mask.json. Outputs of the embedded model (`bert-mini-cased`) are also
written to bert_jax/tools/check.safetensors for `bert-jax check`.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import reference  # noqa: E402

from bert_jax import hub  # noqa: E402

SENTENCES = [
    "Paris is the [MASK] of France.",
    "The president of the United [MASK] spoke to Congress.",
    "Hello I'm a [MASK] model.",
    "Today is a [MASK] day!",
    "[MASK]",
    "He was born in 1809 and [MASK] in 1865.",
    "The [MASK] of the sea is deep, and the ships of the king are many.",
    "In the beginning God created the heaven and the [MASK].",
    "She said that the [MASK] was too expensive; we left without buying anything at all.",
]


def forward(folder: Path, architecture: str, given: dict[str, torch.Tensor], losses: dict[str, dict]) -> dict:
    """Returns the outputs of a model class and, for each entry of `losses`, the loss and the norms of its gradients."""
    model = getattr(transformers, architecture).from_pretrained(folder, attn_implementation="eager").eval()
    out = model(**given, output_hidden_states=True, output_attentions=True)
    found = {
        name: value.detach().numpy().round(7).tolist() for name, value in out.items() if isinstance(value, torch.Tensor)
    }
    if architecture == "BertModel":
        found["hidden_states"] = torch.stack(out.hidden_states).detach().numpy()[:, :, 4].round(7).tolist()
        found["attentions"] = torch.stack(out.attentions).detach().numpy()[:, :, :, 4].round(7).tolist()
    for name, targets in losses.items():
        model.zero_grad()
        model.config.problem_type = targets.pop("problem_type", None)
        loss = model(**given, **targets).loss
        loss.backward()
        norms = {key: float(parameter.grad.norm()) for key, parameter in model.named_parameters()}
        found[f"loss_{name}"] = {"loss": float(loss), "gradient_norms": norms}
    return found


def small_model() -> dict:
    given = {name: torch.tensor(value).long() for name, value in reference.inputs().items()}
    labels = {name: torch.tensor(value) for name, value in reference.labels().items()}
    labels = {name: value if value.is_floating_point() else value.long() for name, value in labels.items()}
    losses: dict[str, dict[str, dict]] = {
        "BertForPreTraining": {"pretraining": {"labels": labels["mlm"], "next_sentence_label": labels["nsp"]}},
        "BertForMaskedLM": {"mlm": {"labels": labels["mlm"]}},
        "BertForNextSentencePrediction": {"nsp": {"labels": labels["nsp"]}},
        "BertForSequenceClassification": {
            "single": {"labels": labels["single"], "problem_type": "single_label_classification"},
            "multi": {"labels": labels["multi"], "problem_type": "multi_label_classification"},
            "regression": {"labels": labels["regression"], "problem_type": "regression"},
        },
        "BertForTokenClassification": {"token": {"labels": labels["token"]}},
        "BertForQuestionAnswering": {"qa": {"start_positions": labels["start"], "end_positions": labels["end"]}},
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for architecture in reference.HEADS:
            reference.write(Path(folder), reference.tensors(architecture), reference.config(architecture))
            found[architecture] = forward(Path(folder), architecture, given, losses.get(architecture, {}))
    return found


def embedded_fill_mask() -> list[dict]:
    folder = hub.download("bert-mini-cased")
    # In float64, because scores that `transformers` computes in float32 have errors of up to 1e-5.
    model = transformers.BertForMaskedLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    filler = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
    return [{"text": text, "ids": tokenizer(text)["input_ids"], "fillings": filler(text)} for text in SENTENCES]


def check() -> dict[str, np.ndarray]:
    """Returns the inputs, outputs, loss and gradients of the embedded model for two rows, for `bert-jax check`."""
    folder = hub.download("bert-mini-cased")
    # In float64, because outputs that `transformers` computes in float32 have errors of up to 1e-5.
    model = transformers.BertForPreTraining.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    model.eval()
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    pairs = [
        ("Paris is the [MASK] of France.", "The city lies on the [MASK] and has many bridges."),
        ("She opened the [MASK].", "It was [MASK]."),
    ]
    given = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    positions = torch.stack([torch.nonzero(row == tokenizer.mask_token_id)[:, 0] for row in given["input_ids"]])
    words = torch.tensor([tokenizer.convert_tokens_to_ids(pair) for pair in (["capital", "river"], ["door", "dark"])])
    labels = torch.full_like(given["input_ids"], -100).scatter(1, positions, words)
    following = torch.tensor([0, 1])
    out = model(**given, labels=labels, next_sentence_label=following, output_hidden_states=True)
    out.loss.backward()
    found = {
        **{name: value.int() for name, value in given.items()},
        "masked_positions": positions.int(),
        "labels": words.int(),
        "next_sentence_label": following.int(),
        "hidden states": torch.stack(out.hidden_states[:-1]),
        "logits of words": torch.stack([row[at] for row, at in zip(out.prediction_logits, positions, strict=True)]),
        "logits of the next sentence": out.seq_relationship_logits,
        "loss": out.loss,
    }
    for name, parameter in model.named_parameters():
        found[f"norm {name}"] = parameter.grad.norm()
        if parameter.ndim == 1:
            found[f"gradient {name}"] = parameter.grad
    arrays = {name: value.detach().numpy() for name, value in found.items()}
    return {name: a.astype(np.float32) if a.dtype == np.float64 else a for name, a in arrays.items()}


def write(name: str, content: object) -> None:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    (ROOT / "tests" / "golden" / name).write_text(json.dumps({"versions": versions, "content": content}) + "\n")


def main() -> None:
    torch.manual_seed(0)
    write("small_model.json", small_model())
    write("embedded_fill_mask.json", embedded_fill_mask())
    save_file(check(), ROOT / "bert_jax" / "tools" / "check.safetensors")


if __name__ == "__main__":
    main()
