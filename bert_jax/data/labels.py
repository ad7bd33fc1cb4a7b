"""Reads labels for text classification. Labels may be names, numbers, class ids, lists or 0/1 vectors."""

import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bert_jax.data.formats import literal
from bert_jax.errors import InputError, listed, quoted

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
"""The problem types, that is, the possible values of the `problem_type` field of `config.json`."""
UNKNOWN = -1
"""The label id of an unlabeled example. The GLUE test sets use the same id. In float targets, NaN is used instead."""


def read_lists(labels: dict[str, Any], problem_type: str | None) -> None:
    """Parses labels that are lists written as strings, for example in the cells of a CSV file.

    If `problem_type` is None and any string represents a list, every other string must also represent a list or be
    blank. If `problem_type` is `MULTI`, every bracketed string must represent a list.

    Args:
        labels: The label of each row, keyed by the row's location, such as `data.train: row 1`; modified in place.
        problem_type: None or `MULTI`.

    Raises:
        InputError: If a string must represent a list but does not. The message gives the row number.
    """
    found = False  # whether any string is a list; if not, and if `problem_type` is None, brackets are part of names
    for where, label in labels.items():
        if isinstance(label, str) and re.fullmatch(r"\s*\[.*\]\s*", label, re.S):
            try:
                labels[where], found = list(literal(label)), True
            except InputError as error:
                if problem_type == MULTI:
                    raise InputError(f"{where}: the label {error}") from None
    for where, label in labels.items():
        if found and problem_type is None and isinstance(label, str) and label.strip():
            raise InputError(
                f"{where}: the label is {quoted(label)}; expected a list, as in other rows. If it is a name, set "
                "data.problem_type."
            )


def check_label(where: str, label: Any, names: Collection[str]) -> None:
    """Raises `InputError` if a label, or an item of a list of labels, is invalid."""
    for part in label if isinstance(label, list) else [label]:
        invalid = isinstance(part, list | tuple | set | Mapping | bytes | None)
        if invalid or (not isinstance(part, int) and not math.isfinite(as_number(part) or 0) and part not in names):
            raise InputError(
                f"{where}: a label is {quoted(part)}; expected a name, a finite number, or an empty cell. "
                "A name such as 'nan' must be in data.labels."
            )


def read_ids(labels: dict[str, Any], names: tuple[str, ...]) -> str:
    """If the labels are class ids, replaces them in place with class names. Returns a note for the user.

    Labels are class ids if each label is an integer or "" and no label is in `names`. The id -1 and the empty string
    become None. If `names` is empty, no labels are replaced.
    """
    whole = [re.fullmatch("-1|[0-9]{1,9}", str(label)) for label in labels.values() if label != ""]
    if not names or not whole or not all(whole) or any(str(label) in names for label in labels.values()):
        return ""
    for where, label in labels.items():
        id = UNKNOWN if label == "" else int(label)
        if id >= len(names):
            raise InputError(f"{where}: the class id is {id}; data.labels has {len(names)} names. Add a name for it.")
        labels[where] = None if id == UNKNOWN else names[id]
    return "labels: class ids"


def read_sets(labels: dict[str, Any], names: tuple[str, ...]) -> str:
    """Converts labels in place to lists of names or to 0/1 vectors. Returns a note for the user.

    Raises:
        InputError: If a label is neither a list nor a string, if the lists differ in form, or if their form is
            ambiguous. The message gives the number of one such row.
    """
    blank = {where for where, label in labels.items() if isinstance(label, str) and not label.strip()}
    for where, label in labels.items():
        if isinstance(label, str):
            labels[where] = names_of(label)
            check_label(where, labels[where], names)
        elif not isinstance(label, list):
            raise InputError(f"{where}: the label is {quoted(label)}; expected a list of labels.")
    lists = {where: label for where, label in labels.items() if where not in blank}
    parts = [part for label in lists.values() for part in label]
    # Whether the lists contain 0 and 1 as strings that are not label names.
    digits = {"0", "1"}.issuperset(parts) and not set(names).issuperset(parts)
    if not digits and all(isinstance(part, str) for part in parts):
        return ""
    binary = digits or {0, 1}.issuperset(parts)
    lengths = {len(label) for label in lists.values()}
    if binary and len(lengths) == 1 and (lengths == {len(names)} if names else lengths != {1}):
        for where, label in lists.items():
            vector = [int(part) for part in label]
            # If names are given, they replace the vector, because a model with another label order would misread it.
            labels[where] = list(itertools.compress(names, vector)) if names else vector
        labels.update(dict.fromkeys(blank))
        return f"labels: 0/1 vectors over {listed(names or numbered(*lengths))}"
    ids = all(type(part) is int and 0 <= part < (len(names) or math.inf) for part in parts)
    repeated = any(len(set(label)) < len(label) for label in lists.values())
    vectors = any(len(label) == len(names) and {0, 1}.issuperset(label) for label in lists.values())
    if ids and not repeated and not vectors and (names or not binary):
        for where, label in lists.items():
            labels[where] = [names[part] if names else str(part) for part in label]
        return "labels: class ids"
    first, *others = lists
    other = max(
        others or [first],
        key=lambda where: (len(lists[where]) != len(lists[first]), not {0, 1}.issuperset(lists[where])),
    )
    raise InputError(
        f"{other}: the label is {quoted(lists[other])}, and that of {first} is {quoted(lists[first])}; expected "
        f"names, 0/1 vectors of {f'length {len(names)}' if names else 'equal length'}, or class ids of data.labels."
    )


def numbered(count: int) -> tuple[str, ...]:
    """The default names of `count` labels, which are the same as in `transformers`."""
    return tuple(f"LABEL_{i}" for i in range(count))


def is_vector(label: Any) -> bool:
    """Whether a label is a list of numbers."""
    return isinstance(label, list) and bool(label) and isinstance(label[0], int)


def as_number(label: Any) -> float | None:
    """Converts a label, which may be a string, to a number. If the label is not a number, the result is None."""
    try:
        return float(label)
    except OverflowError:  # an integer too large for float64
        return math.inf
    except (TypeError, ValueError):
        return None


def names_of(label: Any) -> list[str]:
    """Converts the label of a multi-label row to a list of names. The label is a list or a comma-separated string."""
    parts = label.split(",") if isinstance(label, str) else label or []
    return [str(part).strip() for part in parts if str(part).strip()]


def label_set(labels: Sequence[Any], problem_type: str | None) -> tuple[str, tuple[str, ...]]:
    """Infers the problem type (unless it is given) and the sorted label names from the labels of training examples.

    Lists imply multi-label classification. Numbers imply regression if at least one is not an integer. All other labels
    imply single-label classification. If labels are 0/1 vectors, the label names are LABEL_0, LABEL_1, …
    """
    if problem_type is None:
        several = any(isinstance(label, list | tuple) for label in labels)
        numbers = [as_number(label) for label in labels]  # numbers may be strings
        fractions = None not in numbers and any(number % 1 for number in numbers if number and math.isfinite(number))
        problem_type = MULTI if several else REGRESSION if fractions else SINGLE
    if problem_type == REGRESSION:
        return REGRESSION, ("LABEL_0",)
    if problem_type == MULTI and (vectors := [label for label in labels if is_vector(label)]):
        return MULTI, numbered(len(vectors[0]))
    found = {name for label in labels for name in (names_of(label) if problem_type == MULTI else [str(label)])}
    numeric = all(name.isascii() and name.isdigit() for name in found)  # if so, names are sorted by value
    width = max(map(len, found), default=0) if numeric else 0
    return problem_type, tuple(sorted(found, key=lambda name: (name.zfill(width), name)))
