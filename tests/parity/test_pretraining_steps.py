"""Pretraining beside PyTorch: the same losses step by step, rows packed on our side and not on theirs."""

import numpy as np
import pytest
import torch
import transformers

import bert_jax
from bert_jax.data import corpus
from bert_jax.data.loader import Loader, one_a_row
from bert_jax.data.masking import MaskedExamples, Masking
from bert_jax.tasks.pretraining import MaskedLanguageModeling, PreTraining
from bert_jax.training import optim
from bert_jax.training.step import init_state, make_step, plan

pytestmark = pytest.mark.usefixtures("one_torch_thread")

STEPS, BATCH = 20, 16
TEXT = [
    f"The {n}th house stands here. It is {'big ' * (n % 7)}.\nNobody lives in house {n}, they say." for n in range(200)
]
CASES = [
    (PreTraining(), bert_jax.BertForPreTraining, transformers.BertForPreTraining),
    (MaskedLanguageModeling(), bert_jax.BertForMaskedLM, transformers.BertForMaskedLM),
]


@pytest.fixture(scope="module")
def examples(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("\n\n".join(TEXT))
    layout = corpus.Layout(max_length=48, short=0.3)
    shards = corpus.tokenize([folder / "text.txt"], folder / "shards", tokenizer, layout)
    return MaskedExamples.of(shards, tokenizer, Masking(whole_words=True), 0)


def loader(examples, packing):
    return Loader(examples, BATCH, seed=0, packing=packing)


def their_steps(folder, model_class, examples):
    model = model_class.from_pretrained(folder).train()
    plain = {name for name, _ in model.named_parameters() if name.endswith("bias") or "LayerNorm" in name}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in model.named_parameters() if name not in plain], "weight_decay": 0.01},
            {"params": [p for name, p in model.named_parameters() if name in plain], "weight_decay": 0.0},
        ],
        lr=1e-4,
        eps=1e-6,
    )
    packed, found = loader(examples, 96), []
    for step in range(STEPS):
        place = packed.place(step)
        batch = examples.batch(one_a_row(place.indices, len(place.indices), 48)._replace(epoch=place.epoch))
        given = {name: torch.from_numpy(array).long() for name, array in batch["inputs"].items()}
        labels = np.full(batch["inputs"]["input_ids"].shape, -100)
        # Where there is nothing to guess, the first token is ignored, which never is chosen.
        np.put_along_axis(labels, batch["targets"]["masked_positions"], batch["targets"]["labels"], 1)
        given["labels"] = torch.from_numpy(labels)
        if model_class is transformers.BertForPreTraining:
            given["next_sentence_label"] = torch.from_numpy(batch["targets"]["next_sentence_label"][:, 0]).long()
        loss = model(**given).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append((float(loss.detach()), float(norm)))
    return np.array(found)


@pytest.mark.parametrize(("task", "ours", "theirs"), CASES)
def test_20_steps(close, tmp_path, examples, tokenizer, task, ours, theirs):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=96, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.08,
    )  # fmt: skip
    theirs(config).save_pretrained(tmp_path)
    planned = plan(ours.from_pretrained(tmp_path), optim.adamw(1e-4, weight_decay=0.01, eps=1e-6))
    state, train_step = init_state(planned, 0), make_step(task, planned)
    packed, found = loader(examples, 96), []
    for n in range(STEPS):
        batch = packed.batch_at(n)
        assert batch["weights"].shape[1] > 1
        state, metrics = train_step(state, {}, batch)
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    found, expected = np.array(found), their_steps(tmp_path, theirs, examples)
    assert np.ptp(expected[:, 0]) > 0.1
    ones = np.ones(STEPS)
    what = f"20 steps of {theirs.__name__}, packed"
    close(f"{what}: loss, relative", found[:, 0] / expected[:, 0], ones)
    close(f"{what}: norm of the gradients, relative", found[:, 1] / expected[:, 1], ones, tolerance=1e-4)
