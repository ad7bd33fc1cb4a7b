"""Fine-tunes a model with `transformers.Trainer` as configured in a YAML file, for comparison with `bert-jax finetune`.

    pip install -e ".[parity]"
    python scripts/transformers_trainer.py configs/finetune/emotion_minilm.yaml training.seed=1 output.folder=peer

The model, data, label ids and recipe are the same as in our runs. The task is single-label text classification, token
classification or question answering. For the last two, examples are prepared as in the `run_ner.py` and `run_qa.py`
scripts of `transformers`, and answers are extracted from logits as in `run_qa.py`.

By default, each batch contains examples of similar length and is padded to the longest one. With `--random`, the order
of the examples is random. With `--pad`, the order is random and all examples are padded to data.max_length. With
`--accuracy`, classifiers keep the checkpoint of the best epoch, as our runs do. Question answering keeps the last
checkpoint, as `run_qa.py` does (and as our runs do if `training.evaluate_every` is not less than the number of steps).

Results are printed as JSON. They are also written to output.folder, together with a journal and the model, in the same
format as in our runs, so that `scripts/compare_runs.py` can compare both.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from sklearn.metrics import accuracy_score

from bert_jax.evaluation import metrics
from bert_jax.recipes import preparation, runs
from bert_jax.settings import Settings
from bert_jax.tasks import registry
from bert_jax.training.log import METRICS

Features = dict[str, list[Any]]


def classified(rows: list[dict[str, Any]], tokenizer: Any, names: list[str], settings: Settings) -> Features:
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=settings.data.max_length)
    return {**encoded, "labels": [names.index(row["label"]) for row in rows]}


def tagged(rows: list[dict[str, Any]], tokenizer: Any, names: list[str], settings: Settings) -> Features:
    """Returns the same features for token classification as `tokenize_and_align_labels` in run_ner.py."""
    encoded = tokenizer(
        [row["tokens"] for row in rows], is_split_into_words=True, truncation=True, max_length=settings.data.max_length
    )
    labels = []
    for i, row in enumerate(rows):
        words = encoded.word_ids(i)
        labels.append([
            -100 if word is None or word == last else names.index(row["tags"][word])
            for word, last in zip(words, [None, *words[:-1]], strict=True)
        ])  # fmt: skip
    return {**encoded, "labels": labels}


def asked(rows: list[dict[str, Any]], tokenizer: Any, names: list[str], settings: Settings) -> Features:
    """Returns the same features for question answering as `prepare_train_features` in run_qa.py, and token offsets."""
    encoded = tokenizer(
        [row["question"].lstrip() for row in rows], [row["context"] for row in rows], truncation="only_second",
        max_length=settings.data.max_length, stride=settings.answers.stride or settings.data.max_length // 3,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    features: Features = {**encoded, "start_positions": [], "end_positions": []}
    features["row"] = features.pop("overflow_to_sample_mapping")
    offset_mapping = features.pop("offset_mapping")
    features["offsets"] = [
        [place if sequence == 1 else None for place, sequence in zip(offsets, encoded.sequence_ids(i), strict=True)]
        for i, offsets in enumerate(offset_mapping)
    ]
    for i, offsets in enumerate(offset_mapping):
        cls_index = features["input_ids"][i].index(tokenizer.cls_token_id)
        start = end = cls_index
        answers = rows[features["row"][i]]["answers"]
        if answers["text"]:
            start_char = answers["answer_start"][0]
            end_char = start_char + len(answers["text"][0])
            sequence_ids = encoded.sequence_ids(i)
            token_start, token_end = sequence_ids.index(1), len(sequence_ids) - 1 - sequence_ids[::-1].index(1)
            if offsets[token_start][0] <= start_char and offsets[token_end][1] >= end_char:
                while token_start < len(offsets) and offsets[token_start][0] <= start_char:
                    token_start += 1
                while offsets[token_end][1] >= end_char:
                    token_end -= 1
                start, end = token_start - 1, token_end + 1
        features["start_positions"].append(start)
        features["end_positions"].append(end)
    return features


def answers(rows: list[dict[str, Any]], features: Any, logits: Any, settings: Settings) -> list[str]:
    """Returns the same answers as `postprocess_qa_predictions` in utils_qa.py of `transformers`."""
    by_row: dict[int, list[int]] = {}
    for i, row in enumerate(features["row"]):
        by_row.setdefault(row, []).append(i)
    found = []
    for n, row in enumerate(rows):
        null, candidates = np.inf, []
        for i in by_row[n]:
            start, end, offsets = logits[0][i], logits[1][i], features["offsets"][i]
            null = min(null, start[0] + end[0])
            for a in np.argsort(start)[: -settings.answers.n_best - 1 : -1].tolist():
                for b in np.argsort(end)[: -settings.answers.n_best - 1 : -1].tolist():
                    inside = b < len(offsets) and a <= b < a + settings.answers.max_answer_length
                    if inside and offsets[a] and offsets[b]:
                        text = row["context"][offsets[a][0] : offsets[b][1]]
                        candidates.append((start[a] + end[b], text))
        best = max(((score, text) for score, text in candidates if text), default=(-np.inf, ""))
        no_answer = settings.answers.unanswerable and null - best[0] > settings.answers.null_threshold
        found.append("" if no_answer else best[1])
    return found


TASKS: dict[str, tuple[Any, Callable[..., Features], str]] = {
    "text-classification": (transformers.AutoModelForSequenceClassification, classified, "accuracy"),
    "token-classification": (transformers.AutoModelForTokenClassification, tagged, "f1"),
    "question-answering": (transformers.AutoModelForQuestionAnswering, asked, ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--pad", action="store_true", help="pad all examples to data.max_length")
    parser.add_argument("--random", action="store_true", help="do not group examples by length")
    parser.add_argument("--accuracy", action="store_true", help="evaluate and keep checkpoints, not only train")
    arguments = parser.parse_intermixed_args()
    settings = Settings.from_file(arguments.config, arguments.overrides)
    training, optimizer = settings.training, settings.optimizer
    began = time.perf_counter()
    network, featurize, metric = TASKS[settings.task]
    loaded = {split: preparation.read_split(settings, split) for split in ("train", "validation", "test")}
    splits = {split: found.rows for split, found in loaded.items() if found.rows}
    task = registry.TASKS[settings.task]
    options = preparation.read_options(settings)
    splits, _ = task.clean(splits, options)
    names = list(task.config(splits["train"], options, loaded["train"].labels).get("id2label", ()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model.id)
    data = {}
    for split, rows in splits.items():
        features = featurize(rows, tokenizer, names, settings)
        data[split] = datasets.Dataset.from_dict(features | {"length": [len(ids) for ids in features["input_ids"]]})

    def compute_metrics(p: Any) -> dict[str, float]:
        best = np.argmax(p.predictions, -1)
        if settings.task == "text-classification":
            return {"accuracy": accuracy_score(p.label_ids, best)}
        kept = [row != -100 for row in p.label_ids]
        truth, found = ([[names[i] for i in row[k]] for row, k in zip(side, kept, strict=True)]
                        for side in (p.label_ids, best))  # fmt: skip
        scores = metrics.tagging(truth, found)
        return {name: scores[name] for name in ("f1", "precision", "recall", "accuracy")}

    transformers.set_seed(training.seed)
    options = {"num_labels": len(names)} if names else {}
    model = network.from_pretrained(settings.model.id, **options)
    when = "epoch" if arguments.accuracy and metric else "no"
    pad = {"padding": "max_length", "max_length": settings.data.max_length} if arguments.pad else {}
    collator = (
        transformers.DataCollatorForTokenClassification(tokenizer, **pad)
        if settings.task == "token-classification"
        else transformers.DataCollatorWithPadding(tokenizer, **pad)
    )
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
            adam_epsilon=optimizer.epsilon or 1e-8,
            max_grad_norm=optimizer.max_grad_norm,
            lr_scheduler_type=settings.schedule.name,
            warmup_steps=settings.schedule.warmup_steps or settings.schedule.warmup_ratio,
            train_sampling_strategy="random" if arguments.pad or arguments.random else "group_by_length",
            eval_strategy=when,
            save_strategy=when,
            save_total_limit=1,
            load_best_model_at_end=when == "epoch",
            metric_for_best_model=metric or None,
            seed=training.seed,
            report_to=[],
            disable_tqdm=True,
            logging_steps=training.log_every,
            use_cpu=True,
        ),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=collator,
        compute_metrics=compute_metrics if metric else None,
    )
    trainer.train()
    trainer.save_model()
    results: dict[str, Any] = {"seed": training.seed}
    for split in data.keys() - {"train"}:
        if metric:
            found = trainer.evaluate(data[split], metric_key_prefix=split)
            results[split] = {name.removeprefix(f"{split}_"): value for name, value in found.items()}
        else:
            trainer.args.train_sampling_strategy = "random"  # group_by_length would also reorder predictions
            predicted = trainer.predict(data[split])
            assert (predicted.label_ids[0] == data[split]["start_positions"]).all()
            found = answers(splits[split], data[split], predicted.predictions, settings)
            results[split] = metrics.answering([row["answers"]["text"] for row in splits[split]], found)
    results["seconds"] = time.perf_counter() - began
    folder = Path(settings.output.folder)
    with (folder / METRICS).open("w", encoding="utf-8") as file:
        for line in trainer.state.log_history:
            scores = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
            entry = {"validation": scores} if scores else {"loss": line["loss"]} if "loss" in line else {}
            if entry:
                file.write(json.dumps({"step": line["step"], **entry}) + "\n")
    (folder / runs.RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
