"""Reads YAML files of settings. A file, one of its variants and overrides are merged into one tree."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from bert_jax.errors import InputError, listed, quoted

VALUES = 100_000
"""Maximum number of values in a settings file. Without a limit, a small file of nested aliases could fill memory."""


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys. PyYAML itself would silently drop the first value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in given:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1} repeats {quoted(key.value)}; give each key once.")
            given.add(key.value)
        return super().construct_mapping(node, deep)


def _parsed(text: str) -> Any:
    """Parses a YAML text.

    Raises:
        ValueError: If the text is not valid YAML, is nested too deeply, or holds more than `VALUES` values.
    """
    try:
        found = yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply.") from None
    except yaml.YAMLError as error:
        raise ValueError(error) from None
    values = [found]
    for value in values:  # the loop also reaches the values that its body appends
        values += value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        if len(values) > VALUES:
            raise ValueError(f"it contains more than {VALUES:,} values, including those of aliases.")
    return found


def read_tree(path: str | Path, overrides: Iterable[str]) -> dict[str, Any]:
    """Reads a file of settings, and merges one of its variants and the overrides into it.

    If the file or an override sets `task_name`, this is the name of a variant in the file's `task_names`. The settings
    of the variant replace settings of the same names in the rest of the file. The overrides replace settings of both.

    Raises:
        InputError: If the file, the variant or an override cannot be used.
    """
    try:
        tree = _parsed(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise InputError(f"{path} is not YAML: {listed([error])}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} contains a {type(tree).__name__}; expected a tree of settings.")
    changes, variants = assignments(overrides), tree.pop("task_names", None) or {}
    name = changes.pop("task_name", tree.pop("task_name", None))
    if name is not None:
        if not isinstance(variants, dict) or not isinstance(name, str) or not isinstance(variants.get(name), dict):
            raise InputError(f"task_name is {quoted(name)}; {path} has these variants: {listed(variants) or 'none'}.")
        tree = _laid_over(tree, variants[name])
    return _laid_over(tree, changes)


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """Converts texts of the form `section.key=value`, with the value in YAML, to a tree.

    Raises:
        InputError: If a value is missing or is not valid YAML, or if part of a value would be lost as a YAML comment.
    """
    changes: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not value.strip():
            raise InputError(f"{quoted(text)} has no value; expected key=value, or key=null to unset it.")
        try:
            given = _parsed(value)
            end = max(token.end_mark.index for token in yaml.scan(value) if not isinstance(token, _ENDS))
            for part in reversed(key.split(".")):
                given = {part: given}
            changes = _laid_over(changes, given)
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: invalid YAML or an invalid date
            raise InputError(f"{quoted(text)}: the value is not valid YAML; put text in single quotes.") from None
        if lost := value[end:].strip():
            raise InputError(f"{quoted(text)}: {quoted(lost)} is a YAML comment; quote it: {listed([key])}='…'.")
    return changes


# These tokens come after a trailing comment, so their positions do not tell where the value ends.
_ENDS = (yaml.BlockEndToken, yaml.StreamEndToken)


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _laid_over(merged[key], value) if both else value
    return merged


def nearest(given: Any, names: Iterable[str]) -> str | None:
    """The name that is closest to `given`, which may be mistyped; None if no name is close."""
    close = difflib.get_close_matches(given[:100], names, n=1, cutoff=0.5) if isinstance(given, str) else []
    return close[0] if close else None
