"""PyTorch transformers' Trainer on the settings of one of our YAML files: what `bert-jax finetune` is measured against.

    pip install -e ".[parity]"
    python scripts/transformers_trainer.py configs/finetune/emotion_minilm.yaml training.seed=1 output.folder=peer

Same model, data, label ids, recipe, and choice of the best epoch, for text classification with one label and for token
classification, whose features are those of transformers' example `run_ner.py`. Batches are padded to their longest and
grouped by length, or with `--pad` all padded to data.max_length. Prints JSON.
"""

import argparse
import json
import time
from typing import Any

import datasets
import numpy as np
import transformers
from sklearn.metrics import accuracy_score

from bert_jax import metrics, recipes
from bert_jax.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--pad", action="store_true", help="pad all examples to data.max_length")
    parser.add_argument("--accuracy", action="store_true", help="evaluate and keep checkpoints, not only train")
    arguments = parser.parse_args()
    settings = Settings.from_file(arguments.config, arguments.overrides)
    training, optimizer = settings.training, settings.optimizer
    began = time.perf_counter()
    tokens = settings.task == "token-classification"
    splits = {split: recipes.read_split(settings, split) for split in ("train", "validation")}
    task = recipes.TASKS[settings.task]
    task.clean(splits, settings.data)
    names = list(task.config(splits["train"], settings.data)["id2label"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model.id)
    options = {"truncation": True, "max_length": settings.data.max_length,
               "padding": "max_length" if arguments.pad else False}  # fmt: skip

    def featurize(rows: list[dict[str, Any]]) -> datasets.Dataset:
        if tokens:
            encoded = tokenizer([row["tokens"] for row in rows], is_split_into_words=True, **options)
            labels = [tag_ids(encoded.word_ids(i), row["tags"]) for i, row in enumerate(rows)]
        else:
            encoded = tokenizer([row["text"] for row in rows], **options)
            labels = [names.index(row["label"]) for row in rows]
        lengths = [sum(mask) for mask in encoded["attention_mask"]]
        return datasets.Dataset.from_dict({**encoded, "labels": labels, "length": lengths})

    def tag_ids(words: list[int | None], tags: list[str]) -> list[int]:
        before = [None, *words[:-1]]
        return [
            -100 if word is None or word == last else names.index(tags[word])
            for word, last in zip(words, before, strict=True)
        ]

    def compute_metrics(p: Any) -> dict[str, float]:
        best = np.argmax(p.predictions, -1)
        if not tokens:
            return {"accuracy": accuracy_score(p.label_ids, best)}
        kept = [row != -100 for row in p.label_ids]
        truth, found = ([[names[i] for i in row[k]] for row, k in zip(side, kept, strict=True)]
                        for side in (p.label_ids, best))  # fmt: skip
        scores = metrics.tagging(truth, found)
        return {name: scores[name] for name in ("f1", "precision", "recall", "accuracy")}

    data = {split: featurize(rows) for split, rows in splits.items()}
    transformers.set_seed(training.seed)
    network = (
        transformers.AutoModelForTokenClassification if tokens else transformers.AutoModelForSequenceClassification
    )
    model = network.from_pretrained(settings.model.id, num_labels=len(names))
    when = "epoch" if arguments.accuracy else "no"
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=settings.output.folder,
            num_train_epochs=training.epochs,
            max_steps=training.max_steps or -1,
            per_device_train_batch_size=training.batch_size,
            per_device_eval_batch_size=training.evaluation_batch_size,
            learning_rate=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
            adam_epsilon=optimizer.epsilon,
            max_grad_norm=optimizer.max_grad_norm,
            lr_scheduler_type=settings.schedule.name,
            warmup_steps=settings.schedule.warmup_steps or settings.schedule.warmup_ratio,
            train_sampling_strategy="random" if arguments.pad else "group_by_length",
            eval_strategy=when,
            save_strategy=when,
            save_total_limit=1,
            load_best_model_at_end=arguments.accuracy,
            metric_for_best_model="f1" if tokens else "accuracy",
            seed=training.seed,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorForTokenClassification(tokenizer) if tokens else None,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    results = trainer.evaluate()
    print(json.dumps({"seed": training.seed, "seconds": time.perf_counter() - began, **results}))


if __name__ == "__main__":
    main()
