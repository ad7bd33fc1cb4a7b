"""Reads and validates YAML settings files. A file, one of its variants and the overrides are merged into one tree."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from bert_jax.errors import InputError, listed, quoted
from bert_jax.tree import flatten

VALUES = 100_000
"""The maximum number of values in a settings file.

Without a limit, a small file with nested aliases could exhaust memory.
"""
RENAMED = {"optimizer.rates": "optimizer.lr_multipliers", "queue": "max_queue_tokens", "model": "models",
           "compute_dtype": "dtype", "precision": "dtype", "output.tensorboard": "output.report_to"}  # fmt: skip
"""Maps each setting's name in earlier versions to its current name."""
PROBLEMS = 20
"""The maximum number of problems that one error message lists."""


class Section(BaseModel):
    """A section of settings. Unknown keys are rejected, and each field is described by its docstring."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class SettingsFile(Section):
    """Base class for settings that make up a whole file."""

    @classmethod
    def from_file(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Reads a settings file.

        A file may define variants under `task_names`. If `task_name` is `mrpc`, for example, the settings of the
        `mrpc` variant replace the settings with the same names in the rest of the file.

        Args:
            path: The file.
            overrides: Strings of the form `section.key=value`, where `value` is YAML.

        Raises:
            InputError: If the file cannot be read, if a key is unknown, or if a value is missing or invalid. The
                message lists at most `PROBLEMS` problems and suggests known keys.
        """
        return cls.from_dict(read_tree(path, overrides), source=f"{path} and overrides" if overrides else str(path))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], source: str = "settings") -> Self:
        """Validates a tree of settings.

        Args:
            tree: The settings, keyed by section and then by name.
            source: The name used for the tree in error messages.

        Raises:
            InputError: If a key is unknown, or if a value is missing or invalid; see `from_file`.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            problems = [_problem(cls, entry) for entry in error.errors()[:PROBLEMS]]
            if error.error_count() > PROBLEMS:
                problems.append(f"… and {error.error_count() - PROBLEMS:,} more.")
            raise InputError("\n  ".join([f"{source}:", *problems])) from None

    def to_yaml(self) -> str:
        """Returns all settings, including defaults, as YAML that `from_file` can read."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def differences(self, other: "SettingsFile") -> list[str]:
        """Returns the settings in which `self` and `other` differ, each as `key: value in self, value in other`."""
        mine, theirs = (flatten(settings.model_dump(mode="json")) for settings in (self, other))
        return [
            f"{key}: {quoted(mine.get(key))}, {quoted(theirs.get(key))}"
            for key in mine | theirs
            if mine.get(key) != theirs.get(key)
        ]


class _Loader(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys. PyYAML itself would silently keep only the last of the values."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in given:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1} repeats {quoted(key.value)}; give each key once.")
            given.add(key.value)
        return super().construct_mapping(node, deep)


def _parsed(text: str) -> Any:
    """Parses YAML text.

    Raises:
        ValueError: If the text is not valid YAML, is nested too deeply, or contains more than `VALUES` values.
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
    """Reads a settings file and applies one of its variants and the overrides.

    If the file or an override sets `task_name`, this setting selects a variant from the file's `task_names`. The
    variant's settings replace the settings with the same names in the rest of the file. The overrides take precedence
    over the file and the variant.

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
    """Builds a tree from strings of the form `section.key=value`, where `value` is YAML.

    Raises:
        InputError: If a value is missing or is not valid YAML, or if YAML would read part of a value as a comment.
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


# These tokens come after a trailing comment, so their positions do not show where the value ends.
_ENDS = (yaml.BlockEndToken, yaml.StreamEndToken)


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _laid_over(merged[key], value) if both else value
    return merged


def nearest(given: Any, names: Iterable[str]) -> str | None:
    """Returns the name that is closest to `given`, which may be misspelled; None if no name is close."""
    close = difflib.get_close_matches(given[:100], names, n=1, cutoff=0.5) if isinstance(given, str) else []
    return close[0] if close else None


def _section(kind: Any) -> Any:
    """Returns the section class `X` of an optional section's type, `X | None`. Returns any other type unchanged."""
    return next((arm for arm in get_args(kind) if hasattr(arm, "model_fields")), kind)


def _paths(section: Any, name: str) -> Iterator[str]:
    """Yields the path, relative to the section, of each setting with this name."""
    for key, field in section.model_fields.items():
        if key == name:
            yield key
        if hasattr(inner := _section(field.annotation), "model_fields"):
            yield from (f"{key}.{path}" for path in _paths(inner, name))


def _problem(root: type[BaseModel], entry: Any) -> str:
    """Describes one entry of Pydantic's `ValidationError.errors()` in one line."""
    path = [str(part) for part in entry["loc"]]
    key = listed([".".join(path)])
    if entry["type"] == "extra_forbidden" and RENAMED.get(key, "").partition(".")[0] in root.model_fields:
        return f"{key}: the setting is now {RENAMED[key]}."
    if entry["type"] == "extra_forbidden":
        section: Any = root
        for part in path[:-1]:
            section = _section(section.model_fields[part].annotation)
        near = " or ".join(_paths(root, path[-1])) or nearest(path[-1], section.model_fields)
        hint = f"did you mean {near}?" if near else f"expected one of {', '.join(section.model_fields)}."
        return f"{key}: there is no such setting; {hint}"
    # A message about a whole section does not quote the section, because it may contain an API key.
    given = "" if entry["type"] == "missing" or not path else f", got {quoted(entry['input'])}"
    near = nearest(entry["input"], re.findall("'([^']+)'", entry.get("ctx", {}).get("expected", "")))
    hint = f"; did you mean {near}?" if near else ""
    return f"{key}: {entry['msg'].removeprefix('Value error, ')}{given}{hint}"
