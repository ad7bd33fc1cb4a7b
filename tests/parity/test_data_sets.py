"""Data sets as the library `datasets` has them, from files: labels by their names."""

import datasets

from bert_jax.data import sources


def test_labels_come_by_their_names(tmp_path):
    names = datasets.ClassLabel(names=["O", "B-PER", "I-PER"])
    features = {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names), "kind": names}
    columns = {"tokens": [["Ada", "Lovelace"], []], "ner_tags": [[1, 2], []], "kind": [1, -1]}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(tmp_path / "train.parquet")
    labels, rows = sources.read_hub(str(tmp_path), None, "train", None)
    assert labels == {"ner_tags": ("O", "B-PER", "I-PER"), "kind": ("O", "B-PER", "I-PER")}
    assert list(rows) == [
        {"tokens": ["Ada", "Lovelace"], "ner_tags": ["B-PER", "I-PER"], "kind": "B-PER"},
        {"tokens": [], "ner_tags": [], "kind": None},
    ]
