"""The base class of all model outputs. The entries of an output can be read by attribute, key or index."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, overload


class ModelOutput(Mapping[str, Any]):
    """The base class of model outputs: `out.logits`, `out["logits"]` and `out[0]` are the same entry.

    As in `transformers`, an output is a mapping from entry names to entries. An entry that is None has neither a key
    nor an index. Subclasses are dataclasses that are registered as pytrees.
    """

    @overload
    def __getitem__(self, key: str | int) -> Any: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, key: str | int | slice) -> Any:
        """Returns the entry with the given name or index, or a tuple of the entries in a slice.

        Raises:
            KeyError: If there is no entry with this name, or if the entry is None.
            IndexError: If the index is out of range.
        """
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in list(self)

    def __iter__(self) -> Iterator[str]:
        names = (field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]  # see the class
        return (name for name in names if getattr(self, name) is not None)

    def __len__(self) -> int:
        return len(self.to_tuple())

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns a tuple of the entries that are not None."""
        return tuple([getattr(self, name) for name in self])
