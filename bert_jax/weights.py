"""Published tensor names <-> parameter paths: one table, used for loading and for saving.

This module maps a folder and a model's shapes to a dict of arrays, and back. It does not depend on any model class.
"""

import contextlib
import itertools
import json
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  makes the name bfloat16 known to numpy, and so to safetensors
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bert_jax import tree
from bert_jax.errors import CheckpointError
from bert_jax.hub import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, read_index, replacing

# Tensor in the published checkpoints (google-bert/bert-base-cased) -> parameter. Parameters are held as stored; the
# weight of a linear layer is [out, in].
TABLE = {
    "bert.embeddings.word_embeddings.weight": "bert.embeddings.word_embeddings.weight",
    "bert.embeddings.position_embeddings.weight": "bert.embeddings.position_embeddings.weight",
    "bert.embeddings.token_type_embeddings.weight": "bert.embeddings.token_type_embeddings.weight",
    "bert.embeddings.LayerNorm.weight": "bert.embeddings.layer_norm.weight",
    "bert.embeddings.LayerNorm.bias": "bert.embeddings.layer_norm.bias",
    "bert.encoder.layer.{i}.attention.self.query.weight": "bert.layers.{i}.attention.query.weight",
    "bert.encoder.layer.{i}.attention.self.query.bias": "bert.layers.{i}.attention.query.bias",
    "bert.encoder.layer.{i}.attention.self.key.weight": "bert.layers.{i}.attention.key.weight",
    "bert.encoder.layer.{i}.attention.self.key.bias": "bert.layers.{i}.attention.key.bias",
    "bert.encoder.layer.{i}.attention.self.value.weight": "bert.layers.{i}.attention.value.weight",
    "bert.encoder.layer.{i}.attention.self.value.bias": "bert.layers.{i}.attention.value.bias",
    "bert.encoder.layer.{i}.attention.output.dense.weight": "bert.layers.{i}.attention.output.weight",
    "bert.encoder.layer.{i}.attention.output.dense.bias": "bert.layers.{i}.attention.output.bias",
    "bert.encoder.layer.{i}.attention.output.LayerNorm.weight": "bert.layers.{i}.attention_norm.weight",
    "bert.encoder.layer.{i}.attention.output.LayerNorm.bias": "bert.layers.{i}.attention_norm.bias",
    "bert.encoder.layer.{i}.intermediate.dense.weight": "bert.layers.{i}.intermediate.weight",
    "bert.encoder.layer.{i}.intermediate.dense.bias": "bert.layers.{i}.intermediate.bias",
    "bert.encoder.layer.{i}.output.dense.weight": "bert.layers.{i}.output.weight",
    "bert.encoder.layer.{i}.output.dense.bias": "bert.layers.{i}.output.bias",
    "bert.encoder.layer.{i}.output.LayerNorm.weight": "bert.layers.{i}.output_norm.weight",
    "bert.encoder.layer.{i}.output.LayerNorm.bias": "bert.layers.{i}.output_norm.bias",
    "bert.pooler.dense.weight": "bert.pooler.weight",
    "bert.pooler.dense.bias": "bert.pooler.bias",
    "cls.predictions.transform.dense.weight": "predictions.transform.weight",
    "cls.predictions.transform.dense.bias": "predictions.transform.bias",
    "cls.predictions.transform.LayerNorm.weight": "predictions.layer_norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "predictions.layer_norm.bias",
    "cls.predictions.bias": "predictions.bias",
    "cls.seq_relationship.weight": "seq_relationship.weight",
    "cls.seq_relationship.bias": "seq_relationship.bias",
    "classifier.weight": "classifier.weight",
    "classifier.bias": "classifier.bias",
    "qa_outputs.weight": "qa_outputs.weight",
    "qa_outputs.bias": "qa_outputs.bias",
}

# Names under which some files store a tensor a second time -> the tensor that it is tied to.
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}

# The prefix that wrappers put before every name: torch.compile, DistributedDataParallel, modules that hold the network.
WRAPPERS = re.compile(r"((_orig_mod|module|model)\.)*")

_LISTED = 40
"""The maximum number of problems that an error message lists."""

# Buffers that PyTorch stores next to the weights and that the network does not need.
BUFFERS = {"bert.embeddings.position_ids", "bert.embeddings.token_type_ids"}


@dataclass
class Report:
    """How each tensor of a checkpoint, by its name in the file, and each parameter of the model was handled."""

    prefix: str = ""
    """The prefix that was removed from every name in the file: `module.`, `_orig_mod.`, `model.`"""
    loaded: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    """Tensors stored a second time and equal to the tensor that they are tied to."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Name -> reason."""
    new: list[str] = field(default_factory=list)
    """Paths of the parameters that were reinitialised instead of loaded, as requested."""

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors" + (f", all named {self.prefix}…" if self.prefix else "")]
        lines += [f"tied: {name}" for name in self.tied]
        lines += [f"ignored: {name} ({why})" for name, why in self.ignored.items()]
        lines += [f"new: {path}" for path in self.new]
        return "\n".join(lines)


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: the name of a tensor, and the file that holds it."""

    name: str
    file: Path
    dtype: str
    """The dtype as safetensors writes it: F32, F16, BF16."""

    def read(self) -> np.ndarray:
        """The tensor as it is stored."""
        with _opened(self.file) as file:
            tensor: np.ndarray = file.get_tensor(self.name)
            return tensor


def plan(
    folder: Path, specs: Mapping[str, jax.ShapeDtypeStruct], *, new: Iterable[str] = (), ignore: Iterable[str] = ()
) -> tuple[dict[str, Source], Report]:
    """Finds the source of each parameter of a model in a folder, from the file headers. Only tied tensors are read.

    Args:
        folder: Contains `model.safetensors`, or shards and their index.
        specs: The model's parameters by path (`tree.Skeleton.specs`).
        new: Regular expressions of the parameter paths to reinitialise, whatever the file holds.
        ignore: Regular expressions of the tensors to leave out, matched against their whole names in the file.

    Returns:
        Parameter path -> source, and the report.

    Raises:
        CheckpointError: If tensors are missing, unknown, of another shape or not floats (lists all of them at once), or
            if a pattern matches nothing.
    """
    # In a bare BertModel, neither the parameters nor the tensors in its files have the prefix `bert.`.
    bare = "" if any(path.startswith("bert.") for path in specs) else "bert."
    fresh = tree.select(new, specs)
    if unmatched := [pattern for pattern in new if not tree.select([pattern], specs)]:
        raise CheckpointError(f"new={unmatched} matches no parameter; paths look like {', '.join(list(specs)[-2:])}.")
    stored = _stored(folder)
    for pattern in ignore:
        if not tree.select([pattern], stored):
            raise CheckpointError(
                f"ignore={[pattern]} matches no tensor; {folder} has {', '.join(list(stored)[-2:])}, …"
            )
    left_out = dict.fromkeys(tree.select(ignore, stored), "as asked for")
    report, wrong = Report(new=fresh, ignored=left_out), []
    report.prefix = _prefix(folder, [name for name in stored if name not in left_out])
    sources: dict[str, Source] = {}
    tied: dict[str, Source] = {}
    unknown = ""
    for name, (file, shape, dtype) in stored.items():
        if name in left_out:
            continue
        source, published = Source(name, file, dtype), _published_name(name.removeprefix(report.prefix))
        if published in BUFFERS:
            report.ignored[name] = "a buffer"
            continue
        if published in TIED:
            tied[published] = source
            continue
        path = _path(published)
        if path is None:
            wrong.append(f"unknown: {name} {shape}")
            unknown = unknown or name
            continue
        path = path.removeprefix(bare)
        if path in fresh:
            report.ignored[name] = "made new"
        elif path not in specs and path.removeprefix("bert.").startswith("layers."):
            wrong.append(f"unexpected: {name}; the config has fewer layers")
        elif path not in specs:
            report.ignored[name] = f"this model has no {path.rpartition('.')[0]}"
        elif path in sources:
            wrong.append(f"stored twice: {sources[path].name} and {name}")
        else:
            sources[path] = source
            wrong += _misfit(name, shape, dtype, list(specs[path].shape))
    for published, source in tied.items():
        path = TABLE[TIED[published]].removeprefix(bare)
        if "predictions.bias" not in specs and path in sources:
            report.ignored[source.name] = "this model has no predictions"
        elif path in fresh:
            report.ignored[source.name] = "made new"
        elif path not in specs:
            report.ignored[source.name] = f"this model has no {path.rpartition('.')[0]}"
        elif path in sources:
            report.tied.append(f"{source.name} = {sources[path].name}")
            if not np.array_equal(source.read(), sources[path].read()):
                wrong.append(f"not tied: {source.name} differs from {sources[path].name}; this network ties the two")
        else:  # stored only once, under the other name
            sources[path] = source
            wrong += _misfit(source.name, stored[source.name][1], source.dtype, list(specs[path].shape))
    missing = [path for path in specs if path not in sources and path not in fresh]
    names = {path.removeprefix(bare): published for published, path in _table(specs).items()}
    wrong += [f"missing: {names[path]} {list(specs[path].shape)}" for path in missing]
    if wrong:
        lines = [line if len(line) <= 200 else f"{line[:199]}…" for line in wrong[:_LISTED]]
        if len(wrong) > _LISTED:
            lines.append(f"and {len(wrong) - _LISTED} more")
        if missing:
            lines.append(f"What is to be learnt can be drawn anew: new=[{_pattern(missing[0])}]")
        if unknown:
            lines.append(f"What the model can do without can be left out: ignore=[{_pattern(unknown)}]")
        raise CheckpointError(f"The weights in {folder} do not fit this model:\n  " + "\n  ".join(lines))
    report.loaded = [source.name for source in sources.values()]
    return sources, report


def load(
    folder: Path, specs: Mapping[str, jax.ShapeDtypeStruct], *, new: Iterable[str] = (), ignore: Iterable[str] = ()
) -> tuple[dict[str, jax.Array], Report]:
    """Reads a folder's weights, one tensor at a time.

    The arguments are those of `plan`.

    Returns:
        Parameter path -> array in the spec's dtype, without the new parameters; and the report.

    Raises:
        CheckpointError: If `plan` raises it, or if weights are not finite; names those tensors. Nothing is loaded then.
    """
    sources, report = plan(folder, specs, new=new, ignore=ignore)
    arrays, infinite = {}, []
    for path, tensor in _tensors(sources):
        array = _page_aligned(tensor, specs[path].dtype)
        if array is None:
            infinite.append(sources[path].name)
        else:
            arrays[path] = jax.device_put(array)
    if infinite:
        raise CheckpointError(
            f"The weights in {folder} hold NaN or infinity, in {', '.join(infinite[:5])}"
            f"{f' and {len(infinite) - 5} more' if len(infinite) > 5 else ''}: the run that saved them failed, or the "
            "file is damaged."
        )
    return {path: arrays[path] for path in sources}, report


def save(folder: Path, params: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Writes `model.safetensors` and `config.json` as PyTorch transformers reads them.

    All files are first written and flushed next to the folder and then renamed into place, so that a kill or a full
    disk leaves every file either old or new, never partial.

    Args:
        folder: Created if necessary; other files in it stay.
        params: Parameter path -> array.
        config: The content of `config.json`.

    Raises:
        CheckpointError: If the folder cannot be written; names the earlier files that were replaced, if any.
    """
    prefix = "" if any(path.startswith("bert.") for path in params) else "bert."
    tensors = {}
    for published, path in _table(params).items():
        path = path.removeprefix(prefix)
        if path in params:
            tensors[published.removeprefix(prefix)] = np.ascontiguousarray(params[path])
    with replacing(folder) as staging:
        try:
            save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:  # as safetensors reports a full disk
            raise OSError(str(error)) from None
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def published_names(paths: Iterable[str]) -> list[str]:
    """The names that parameters have in published checkpoints, in the order of `paths`."""
    paths = list(paths)
    names = {path: published for published, path in _table(paths).items()}
    return [names[path] for path in paths]


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as opened:
            yield opened
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}); download or save it again.") from None
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror or error}.") from None


def _tensors(sources: Mapping[str, Source]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each path with its tensor as it is stored.

    An open memory map keeps the pages that it has read, so the whole file would end up in memory a second time.
    Therefore a file is reopened after every 32 MB. Reopening it for each tensor would take 0.3 ms each, 55 ms more for
    BERT-base.
    """
    for file, group in itertools.groupby(
        sorted(sources.items(), key=lambda item: item[1].file), lambda item: item[1].file
    ):
        rest = list(group)[::-1]
        while rest:
            size = 0
            with _opened(file) as opened:
                while rest and size < 2**25:
                    path, source = rest.pop()
                    tensor = opened.get_tensor(source.name)
                    size += tensor.nbytes
                    yield path, tensor


def _stored(folder: Path) -> dict[str, tuple[Path, list[int], str]]:
    """Tensor name -> its file, shape and dtype."""
    index: dict[str, str] = {}
    if (folder / WEIGHTS_FILE).is_file():
        files = [folder / WEIGHTS_FILE]
    elif (folder / INDEX_FILE).is_file():
        index = read_index(folder / INDEX_FILE)
        files = [_shard(folder, name) for name in sorted(set(index.values()))]
    elif (folder / "pytorch_model.bin").is_file():
        raise CheckpointError(
            f"{folder} holds pytorch_model.bin and no {WEIGHTS_FILE}. This package does not unpickle; "
            f"convert it once: python scripts/convert_bin.py {folder} OUTPUT_FOLDER"
        )
    else:
        raise CheckpointError(f"{folder} holds no weights; expected {WEIGHTS_FILE}, or shards and {INDEX_FILE}.")
    stored: dict[str, tuple[Path, list[int], str]] = {}
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                if index and index.get(name) != path.name:
                    other = index.get(name, "none")
                    raise CheckpointError(
                        f"{path} holds {name}, and {INDEX_FILE} puts it into {other}; download both again."
                    )
                tensor = file.get_slice(name)
                stored[name] = (path, tensor.get_shape(), tensor.get_dtype())
    if absent := [name for name in index if name not in stored]:
        raise CheckpointError(
            f"{folder / INDEX_FILE} names {absent[0]}, which {index[absent[0]]} does not hold; download both again."
        )
    return stored


def _shard(folder: Path, name: str) -> Path:
    """The path of a shard. Links are followed only within the folder or within the Hub's cache."""
    path, home = folder / name, folder.resolve()
    if home.parent.name == "snapshots":  # the Hub's cache, in which files are links to blobs
        home = home.parent.parent
    if not path.exists():
        raise CheckpointError(f"{path} is missing, though {INDEX_FILE} names it; download the checkpoint again.")
    if not path.is_file() or not path.resolve().is_relative_to(home):
        raise CheckpointError(
            f"{path}, which {INDEX_FILE} names, is no file in that folder; put the shard itself there."
        )
    return path


def _prefix(folder: Path, names: Iterable[str]) -> str:
    """The prefix that wrappers put before every name.

    Raises:
        CheckpointError: If not all names have the same prefix.
    """
    before: dict[str, list[str]] = {}
    for name in names:
        match = WRAPPERS.match(name)
        before.setdefault(match[0] if match else "", []).append(name)
    if len(before) > 1:
        found = "; ".join(f"{prefix or 'none'}: {len(some)}, like {some[0]}" for prefix, some in before.items())
        raise CheckpointError(
            f"The names of the tensors in {folder} have different prefixes ({found[:300]}); expected one, or none. "
            "What the model can do without can be left out: ignore=[…]"
        )
    return next(iter(before), "")


def _page_aligned(tensor: np.ndarray, dtype: Any) -> np.ndarray | None:
    """A copy aligned to 2 MB (small arrays to 64 bytes), which the CPU backend holds without copying it again.

    Linux gives large arrays huge pages, which makes reading every weight for one sentence a tenth faster. These arrays
    do not come from malloc, because its bookkeeping between two arrays would occupy one such page each, 140 MB for
    BERT-large.

    Returns:
        The copy, or None if a number is not finite.
    """
    size, page = tensor.size * dtype.itemsize, 64
    if size < 2**22 or not hasattr(mmap, "MADV_HUGEPAGE"):
        memory = np.empty(size + page, np.uint8)
    else:
        page = 2**21
        pages = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(pages, np.uint8)
    start = -memory.ctypes.data % page
    aligned = memory[start : start + size].view(dtype)
    source = tensor.reshape(-1)
    for start in range(0, aligned.size, 2**18):  # checks each part while it is still in the cache
        part = aligned[start : start + 2**18]
        with np.errstate(over="ignore"):  # from float64
            part[...] = source[start : start + 2**18]
        if not np.isfinite(part).all():
            return None
    shaped: np.ndarray = aligned.reshape(tensor.shape)
    return shaped


def _published_name(name: str) -> str:
    """The name in the table: with the prefix `bert.`, and with LayerNorm's `gamma`, `beta` as `weight`, `bias`."""
    name = re.sub(r"\bLayerNorm\.gamma$", "LayerNorm.weight", name)
    name = re.sub(r"\bLayerNorm\.beta$", "LayerNorm.bias", name)
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def _path(published: str) -> str | None:
    """The parameter path of a published name; None if the name is not in the table."""
    layer = re.match(r"bert\.encoder\.layer\.(\d+)\.", published)
    if not layer:
        return TABLE.get(published)
    path = TABLE.get(published.replace(f".{layer[1]}.", ".{i}.", 1))
    return path and path.replace("{i}", layer[1])


def _table(paths: Iterable[str]) -> dict[str, str]:
    """The table with one line for each layer in the paths: published name -> path."""
    found = (re.match(r"(?:bert\.)?layers\.(\d+)\.", path) for path in paths)
    layers = 1 + max((int(match[1]) for match in found if match), default=-1)
    table = {}
    for published, path in TABLE.items():
        for i in range(layers) if "{i}" in path else [0]:
            table[published.replace("{i}", str(i))] = path.replace("{i}", str(i))
    return table


def _misfit(name: str, shape: list[int], dtype: str, expected: list[int]) -> list[str]:
    if dtype not in ("F32", "F16", "BF16", "F64"):
        return [f"{name} is {dtype}; expected floats"]
    if shape != expected:
        hint = f"; pass num_labels={shape[0]}" if name.startswith("classifier.") and shape[1:] == expected[1:] else ""
        return [f"{name} is {shape}; the config asks for {expected}{hint}"]
    return []


def _pattern(name: str) -> str:
    """A regular expression, as Python writes it, that matches a tensor or parameter and its siblings."""
    pattern = re.escape(name.rpartition(".")[0]) + r"\..*" if "." in name else re.escape(name)
    return f"r'{pattern}'" if len(pattern) <= 200 else f"r'{pattern[:199]}…'"
