"""Loads and saves weights. `load` and `save` use the same table, which maps published tensor names to parameter paths.

`load` reads a dict of arrays from a folder and checks that they have the shapes that the model expects. `save` writes
such a dict to a folder. This module does not depend on any model class.
"""

import contextlib
import json
import math
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  registers the dtype bfloat16 with NumPy, and thus with safetensors
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bert_jax import tree
from bert_jax.errors import CheckpointError, listed
from bert_jax.hub import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, advice, names_in, read_index, replacing

# Maps the name of a tensor in published checkpoints (such as google-bert/bert-base-cased) to the path of a parameter.
# `{i}` stands for the layer number. The tensor and the parameter have the same shape. The weight of a linear layer has
# the shape [out, in].
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

# Some files store tied tensors twice. This dict maps the name of a second copy to the name of its original.
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}

# Matches the prefixes that wrappers of a network add to every tensor name: `_orig_mod.` (torch.compile), `module.`
# (DistributedDataParallel) and `model.` (a module that holds the network).
WRAPPERS = re.compile(r"^((_orig_mod|module|model)\.)*")

_LISTED = 40
"""The maximum number of problems that an error message lists."""
_PART = 2**18
"""The number of values that are converted at once when weights are loaded."""
_SMALLEST = 127 * np.finfo(np.float32).tiny
"""A lower limit for the largest absolute value of a row, so that no scale is 0."""

# Buffers that PyTorch stores with the weights but that the network does not need.
BUFFERS = {"bert.embeddings.position_ids", "bert.embeddings.token_type_ids"}


@dataclass
class Report:
    """A report on how each tensor of a checkpoint and each parameter of the model was handled.

    Tensors are listed under the names that they have in the files.
    """

    prefix: str = ""
    """The prefix that was removed from every name in the file, such as `module.`; empty if there was none."""
    loaded: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    """Second copies of tied tensors, each as a string "copy = original". Loading fails if the two differ."""
    ignored: dict[str, str] = field(default_factory=dict)
    """The reasons why tensors were not loaded, keyed by tensor name."""
    new: list[str] = field(default_factory=list)
    """The paths of the parameters that the caller asked to reinitialize instead of loading."""

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors" + (f", all named {self.prefix}…" if self.prefix else "")]
        lines += [f"tied: {name}" for name in self.tied]
        lines += [f"ignored: {name} ({why})" for name, why in self.ignored.items()]
        lines += [f"new: {path}" for path in self.new]
        return "\n".join(lines)


@dataclass(frozen=True)
class Source:
    """The location, shape and dtype of a stored tensor. Each loaded parameter is read from one such tensor."""

    name: str
    file: Path
    shape: list[int]
    dtype: str
    """The safetensors name of the dtype, such as F32, F16 or BF16."""

    def read(self) -> np.ndarray:
        """Reads the tensor in its stored dtype."""
        with _opened(self.file) as file:
            tensor: np.ndarray = file.get_tensor(self.name)
            return tensor


def plan(
    folder: Path, specs: Mapping[str, jax.ShapeDtypeStruct], *, new: Iterable[str] = (), ignore: Iterable[str] = ()
) -> tuple[dict[str, Source], Report]:
    """Matches each parameter of a model with a tensor stored in a folder.

    Only the file headers are read. However, if a tied tensor is stored twice, both copies are read and compared.

    Args:
        folder: A folder that contains `model.safetensors`, or shards and their index.
        specs: The shape and dtype of each parameter of the model, keyed by path (`tree.Skeleton.specs`).
        new: Regular expressions, each matched against full parameter paths. Matching parameters are reinitialized, even
            if the folder contains tensors for them.
        ignore: Regular expressions, each matched against the full tensor names stored in the files. Matching tensors
            are not loaded.

    Returns:
        A dict that maps parameter paths to sources, and the report.

    Raises:
        CheckpointError: If tensors are missing or unknown, have the wrong shape or otherwise do not fit the model; if a
            regular expression matches nothing; or if a file is missing or damaged. The message lists at most 40
            problems.
    """
    # The parameter paths of a bare BertModel lack the prefix `bert.`, so the paths in `TABLE` are used without it.
    bare = "" if any(path.startswith("bert.") for path in specs) else "bert."
    stored = _stored(folder)
    fresh, left_out = tree.select(new, specs), tree.select(ignore, stored)
    for option, patterns, what, names in [("new", new, "parameter", specs), ("ignore", ignore, "tensor", stored)]:
        if unmatched := [pattern for pattern in patterns if not tree.select([pattern], names)]:
            raise CheckpointError(
                f"{option}={unmatched} matches no {what}; expected regular expressions of whole names, "
                f"such as {listed(list(names)[-2:])}."
            )
    prefixes = {name.removesuffix(WRAPPERS.sub("", name)): name for name in stored if name not in left_out}
    if len(prefixes) > 1:
        raise CheckpointError(
            f"The tensor names in {folder} have different prefixes: {listed(prefixes.values())}; "
            "expected the same prefix or none. To leave tensors out, pass ignore=[…]."
        )
    prefix = next(iter(prefixes), "")
    report = Report(prefix, new=fresh, ignored=dict.fromkeys(left_out, "as requested"))
    published = {name: _published_name(name.removeprefix(prefix)) for name in stored if name not in left_out}
    sources: dict[str, Source] = {}
    wrong, unknown = [], []
    # Second copies of tied tensors come last, so that each can be compared with its original.
    for name in sorted(published, key=lambda name: published[name] in TIED):
        source, tied = stored[name], TIED.get(published[name])
        line, layer = _line(tied or published[name])
        path = TABLE.get(line, "").replace("{i}", layer).removeprefix(bare)
        if published[name] in BUFFERS:
            report.ignored[name] = "a buffer"
        elif not path:
            unknown.append(name)
            wrong.append(f"unknown: {name} {source.shape}")
        elif path in fresh:
            report.ignored[name] = "reinitialized"
        elif path not in specs and path.removeprefix("bert.").startswith("layers."):
            wrong.append(f"unexpected: {name}; the config has fewer layers")
        elif path not in specs:
            report.ignored[name] = f"this model has no {path.rpartition('.')[0]}"
        elif path not in sources:
            sources[path] = source
            wrong += _misfit(source, list(specs[path].shape))
        elif not tied:
            wrong.append(f"stored twice: {sources[path].name} and {name}")
        elif "predictions.bias" not in specs:
            report.ignored[name] = "this model has no predictions"
        else:
            report.tied.append(f"{name} = {sources[path].name}")
            if not np.array_equal(source.read(), sources[path].read()):
                wrong.append(f"not tied: {name} differs from {sources[path].name}; expected equal tensors")
    missing = {name: path for name, path in _table(specs).items() if path not in sources and path not in fresh}
    wrong += [f"missing: {name} {list(specs[path].shape)}" for name, path in missing.items()]
    if wrong:
        lines = [f"The weights in {folder} do not fit this model:", *(listed([line]) for line in wrong[:_LISTED])]
        if len(wrong) > _LISTED:
            lines.append(f"and {len(wrong) - _LISTED} more")
        if missing:
            lines.append(f"To reinitialize missing parameters, pass new=[{_pattern(next(iter(missing.values())))}].")
        if unknown:
            lines.append(f"To leave out unknown tensors, pass ignore=[{_pattern(unknown[0])}].")
        raise CheckpointError("\n  ".join(lines))
    report.loaded = [source.name for source in sources.values()]
    return sources, report


def load(
    folder: Path,
    specs: Mapping[str, jax.ShapeDtypeStruct],
    *,
    new: Iterable[str] = (),
    ignore: Iterable[str] = (),
    places: Mapping[str, jax.sharding.Sharding] | None = None,
) -> tuple[dict[str, jax.Array], Report]:
    """Reads a folder's weights, one tensor at a time.

    Args:
        folder: See `plan`.
        specs: See `plan`.
        new: See `plan`.
        ignore: See `plan`.
        places: The shardings of the arrays, keyed by parameter path; None for the default device.

    Returns:
        A dict that maps parameter paths to arrays with the dtypes in `specs`, and the report. The dict contains no
        arrays for reinitialized parameters.

    Raises:
        CheckpointError: If `plan` raises this error, or if tensors contain non-finite values. The message names these
            tensors.
    """
    sources, report = plan(folder, specs, new=new, ignore=ignore)
    arrays, infinite = {}, []
    for path, tensor in _tensors(sources):
        if specs[path].dtype == np.int8:
            array, scale, total = _quantized(tensor)
            finite = np.isfinite(scale).all()
            for name, of_rows in {"scale": scale, "total": total}.items():
                beside = f"{path.rpartition('.')[0]}.{name}"
                arrays[beside] = jax.device_put(of_rows, places and places[beside])
        else:
            array, finite = _converted(tensor, specs[path].dtype)
        if not finite:
            infinite.append(sources[path].name)
        arrays[path] = jax.device_put(array, places and places[path])
    if infinite:
        raise CheckpointError(
            f"The weights in {folder} contain NaN or infinity, in {listed(infinite)}: the training diverged, or "
            "the file is damaged. Use another checkpoint, or download this one again."
        )
    return arrays, report


def save(folder: Path, params: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Writes `model.safetensors` and `config.json` in the format that `transformers` reads.

    Both files are first written to disk next to the folder and then moved into it. Even if the process is killed or the
    disk is full, each file in the folder is either the old or the new version, never an incomplete file.

    Args:
        folder: The folder, which is created if necessary. Other files in the folder are kept.
        params: The arrays, keyed by parameter path.
        config: The contents of `config.json`.

    Raises:
        CheckpointError: If the folder cannot be written. The message names the old files that were already replaced.
    """
    tensors = {name: np.ascontiguousarray(params[path]) for name, path in _table(params).items()}
    with replacing(folder) as staging:
        write(tensors, staging / WEIGHTS_FILE)
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write(tensors: Mapping[str, np.ndarray], file: Path) -> None:
    """Writes contiguous arrays to a safetensors file.

    Raises:
        OSError: If the file cannot be written.
    """
    try:
        # `transformers` rejects a file whose metadata lacks `format`.
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:  # raised if, for example, the disk is full
        raise OSError(str(error)) from None


def published_names(paths: Iterable[str]) -> list[str]:
    """Returns the names that parameters have in published checkpoints, in the order of `paths`."""
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
    """Yields the path of each parameter and its tensor in the stored dtype.

    Files are read through memory maps. While a map is open, the pages that were read stay in memory, in addition to
    the arrays. Therefore, a file is reopened each time 32 MB have been read from it. Reopening it for each tensor would
    cost 0.3 ms per tensor, or 55 ms for BERT-base.
    """
    rest = sorted(sources.items(), key=lambda item: item[1].file)[::-1]
    while rest:
        file, size = rest[-1][1].file, 0
        with _opened(file) as opened:
            while rest and rest[-1][1].file == file and size < 2**25:
                path, source = rest.pop()
                tensor = opened.get_tensor(source.name)
                size += tensor.nbytes
                yield path, tensor


def _stored(folder: Path) -> dict[str, Source]:
    """Returns the sources of all tensors in a folder, keyed by tensor name. Only the file headers are read."""
    index: dict[str, str] = {}
    if (folder / WEIGHTS_FILE).is_file():
        files = [folder / WEIGHTS_FILE]
    elif (folder / INDEX_FILE).is_file():
        index = read_index(folder / INDEX_FILE)
        files = [_shard(folder, name) for name in sorted(set(index.values()))]
    else:
        raise CheckpointError(
            f"{folder} contains no safetensors weights; expected {WEIGHTS_FILE}, or shards and {INDEX_FILE}."
            + advice(names_in(folder), folder)
        )
    found = []
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118  `file` is not a dict
                tensor = file.get_slice(name)
                found.append(Source(name, path, tensor.get_shape(), tensor.get_dtype()))
    places = {(source.name, source.file.name) for source in found}
    if index and (wrong := places ^ index.items()):
        names = listed(sorted({name for name, _ in wrong}))
        raise CheckpointError(
            f"{folder / INDEX_FILE} and the shards disagree about the files of {names}; download all of them again."
        )
    return {source.name: source for source in found}


def _shard(folder: Path, name: str) -> Path:
    """Returns the path of a shard in a folder.

    If the shard is a link, it must point to a file in the same folder or, in the Hub's cache, to a file of the same
    model.

    Raises:
        CheckpointError: If the shard is missing, or if it is a link to a location that is not allowed.
    """
    path, home = folder / name, folder.resolve()
    if home.parent.name == "snapshots":  # in the Hub's cache, where shards are links to files in the model's folder
        home = home.parent.parent
    if not path.is_file() or not path.resolve().is_relative_to(home):
        raise CheckpointError(
            f"{path}, listed in {INDEX_FILE}, is missing or not a file in this folder; download the checkpoint again."
        )
    return path


def _converted(tensor: np.ndarray, dtype: np.dtype[Any]) -> tuple[np.ndarray, bool]:
    """Copies an array to aligned memory and converts it to `dtype`.

    Returns the copy and whether all its values are finite.
    """
    copy, finite = _aligned(tensor.shape, dtype), True
    target, source = copy.reshape(-1), tensor.reshape(-1)
    # The tensor is copied in parts, so that each part is checked while it is still in the CPU's cache.
    for start in range(0, source.size, _PART):
        part = target[start : start + _PART]
        # The conversion may turn large values into infinities. The check below finds them.
        with np.errstate(over="ignore"):
            part[...] = source[start : start + _PART]
        finite = finite and bool(np.isfinite(part).all())
    return copy, finite


def _quantized(tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rounds each row of a weight matrix [out, in] to multiples of the row's scale.

    The scale is the largest absolute value in the row, divided by 127.

    Returns:
        The rows as integer multiples of their scales, int8 [out, in]; the scales, float32 [out]; and the sum of each
        rounded row, float32 [out]. If a row contains a value that is not finite, its scale is not finite either.
    """
    weight = _aligned(tensor.shape, np.dtype(np.int8))
    scale, total = (_aligned(tensor.shape[:1], np.dtype(np.float32)) for _ in range(2))
    rows = max(1, _PART // tensor.shape[1])
    for start in range(0, len(tensor), rows):
        with np.errstate(over="ignore", invalid="ignore"):
            part = tensor[start : start + rows].astype(np.float32)
            own = np.maximum(np.abs(part).max(axis=1), _SMALLEST) / 127
            weight[start : start + rows] = np.rint(part / own[:, None]).clip(-127, 127)
            total[start : start + rows] = weight[start : start + rows].sum(axis=1, dtype=np.int32) * own
        scale[start : start + rows] = own
    return weight, scale, total


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Allocates an array that JAX's CPU backend can use without copying it.

    The memory is aligned to 64 bytes. Arrays of at least 4 MB are aligned to 2 MB, so that Linux can use huge pages for
    them. The last part of an array, which may not fill a huge page, is stored in small pages. Inference on one sentence
    reads all weights, and reading them from huge pages is 10% faster. The memory for these large arrays comes from
    `mmap`. With `malloc`, the bookkeeping data between two arrays would occupy additional huge pages: 140 MB in total
    for BERT-large.
    """
    size, page = math.prod(shape) * dtype.itemsize, 64
    if size < 2**22 or not hasattr(mmap, "MADV_HUGEPAGE"):
        memory = np.empty(size + page, np.uint8)
    else:
        page = 2**21
        pages = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = np.frombuffer(pages, np.uint8)
        pages.madvise(mmap.MADV_HUGEPAGE, -memory.ctypes.data % page, size // page * page)
    start = -memory.ctypes.data % page
    return memory[start : start + size].view(dtype).reshape(shape)


def _published_name(name: str) -> str:
    """Converts a tensor name to the name used in current published checkpoints.

    The prefix `bert.` is added to the tensor names of a bare model. LayerNorm's `gamma` becomes `weight`, and its
    `beta` becomes `bias`.
    """
    name = re.sub(r"\bLayerNorm\.gamma$", "LayerNorm.weight", name)
    name = re.sub(r"\bLayerNorm\.beta$", "LayerNorm.bias", name)
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def _line(name: str) -> tuple[str, str]:
    """Replaces the layer number in a name or path with `{i}`, the placeholder used in `TABLE`.

    Returns:
        The name or path with `{i}`, and the layer number as a string. If there is no layer number, the name or path is
        unchanged, and the string is `{i}`.
    """
    layer = re.search(r"\.(\d+)\.", name)
    number = layer[1] if layer else "{i}"
    return name.replace(f".{number}.", ".{i}.", 1), number


def _table(paths: Iterable[str]) -> dict[str, str]:
    """Maps the published name of each parameter to its path. Paths that are not in `TABLE` are left out.

    For a bare `BertModel`, neither the paths nor the published names have the prefix `bert.`.
    """
    names = {path: name for name, path in TABLE.items()}
    names |= {path.removeprefix("bert."): name.removeprefix("bert.") for path, name in names.items()}
    lines = {path: _line(path) for path in paths}
    return {names[line].replace("{i}", layer): path for path, (line, layer) in lines.items() if line in names}


def _misfit(source: Source, expected: list[int]) -> list[str]:
    name, shape = source.name, source.shape
    if source.dtype not in ("F32", "F16", "BF16", "F64"):
        return [f"{name} has dtype {source.dtype}; expected floats"]
    if shape != expected:
        hint = f"; pass num_labels={shape[0]}" if name.startswith("classifier.") and shape[1:] == expected[1:] else ""
        return [f"{name} has shape {shape}; the config requires {expected}{hint}"]
    return []


def _pattern(name: str) -> str:
    """Returns the Python source of a regular expression that matches `name` and the names of its module's other
    tensors."""
    pattern = re.escape(name.rpartition(".")[0]) + r"\..*" if "." in name else re.escape(name)
    return f"r'{listed([pattern])}'"
