"""An example of fine-tuning in Python, without `bert-jax finetune`. It trains a text classifier on your files.

    pip install "bert-jax[train]"
    python scripts/finetune.py train.jsonl validation.jsonl my-model

Each row of the files has the form {"text": …, "label": …}.
"""

import sys

from flax import nnx
from rich.console import Console

from bert_jax import BertForSequenceClassification, Tokenizer
from bert_jax.data import sources
from bert_jax.tasks.sequence_classification import SequenceClassification
from bert_jax.training import memory, optim
from bert_jax.training.loop import train


def main(train_file: str, validation_file: str, folder: str, model_id: str = "google-bert/bert-base-cased") -> None:
    memory.keep_freed()  # before JAX starts; saves a third of a step's time on CPU
    rows = {"train": list(sources.read(train_file)), "validation": list(sources.read(validation_file))}
    labels = sorted({str(row["label"]) for row in rows["train"]})
    tokenizer = Tokenizer.from_pretrained(model_id)
    model = BertForSequenceClassification.from_pretrained(
        model_id, new=[r"classifier\..*"], rngs=nnx.Rngs(0), num_labels=len(labels), id2label=labels
    )
    task = SequenceClassification(tokenizer, model.config, max_length=128)
    examples = {split: task.featurize(found) for split, found in rows.items()}
    steps = 2 * -(-len(examples["train"]) // 16)  # two epochs
    optimizer = optim.adamw(optim.schedule("linear", 3e-5, steps))
    trained = train(
        model, task, examples["train"], optimizer, steps=steps, batch_size=16, validation=examples["validation"],
        folder=f"{folder}/run", console=Console(),
    )  # fmt: skip
    trained.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
