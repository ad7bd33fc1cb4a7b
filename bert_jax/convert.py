"""Converts weights stored as `flax_model.msgpack` or `pytorch_model.bin` to `model.safetensors`.

Sources: `modeling_flax_pytorch_utils.py` in `transformers` 4.57 for the names and layouts of FlaxBert parameters, and
`flax/serialization.py` for the msgpack format.
"""

import mmap
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes
import msgpack
import numpy as np

from bert_jax import hub, tree, weights
from bert_jax.config import BertConfig
from bert_jax.errors import CheckpointError, InputError, check_extra, listed, quoted
from bert_jax.model import BertModel

MSGPACK, PICKLE = "flax_model.msgpack", "pytorch_model.bin"

# Maps the last component of a Flax parameter name to the last component of its PyTorch name.
_LAST = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], *, ignore: Iterable[str] = ()) -> Path:
    """Converts the weights in a model folder and copies the model's config and tokenizer.

    If the folder contains both `flax_model.msgpack` and `pytorch_model.bin`, the former is read. Reading
    `pytorch_model.bin` requires PyTorch and uses `weights_only=True`, so no code in the file is run.

    Args:
        source: A folder that contains `config.json`, or the folder of a sentence-transformers model.
        target: A new or empty folder, or `source` itself. In the latter case, `model.safetensors` is added to `source`.
        ignore: Regular expressions, each matched against full tensor names. Conversion fails if the weight file
            contains a tensor that no BERT model has, unless one of these expressions matches the tensor's name.
            Matching tensors are also converted.

    Returns:
        The path of the weight file that was read.

    Raises:
        InputError: If `source` is not a folder, if `target` is neither `source` nor a new or empty folder, or if
            PyTorch is required but not installed.
        ModelNotFoundError: If `source` does not contain a model.
        ConfigError: If the config does not describe a BERT model.
        CheckpointError: If `source` contains neither of the two weight files, if it already contains safetensors
            weights, if the weight file is damaged, if the encoder's weights do not fit the config, or if `target`
            cannot be written.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise InputError(f"{source} is not a folder. To get a model from the Hub: hf download MODEL --local-dir FOLDER")
    in_place = target.exists() and target.samefile(source)
    if not in_place and not hub.is_vacant(target):
        raise InputError(f"{target} contains other files; expected a new or empty folder, or {source} itself.")
    network = hub.download(source)
    config = BertConfig.from_file(hub.config_file(network))
    for name in (hub.WEIGHTS_FILE, hub.INDEX_FILE):
        if (network / name).exists():
            raise CheckpointError(f"{network} contains {name}, which this package loads; there is nothing to convert.")
    file = next((network / name for name in (MSGPACK, PICKLE) if (network / name).is_file()), None)
    if file is None:
        advised = hub.advice(hub.names_in(network), network)
        raise CheckpointError(f"{network} contains neither {MSGPACK} nor {PICKLE}.{advised}")
    tensors = _from_msgpack(file) if file.name == MSGPACK else _from_pickle(file)
    if "__metadata__" in tensors:
        raise CheckpointError(f"{file} has a tensor __metadata__, a name that safetensors reserves; use another file.")
    place = network.relative_to(source)
    with hub.replacing(target) as staging:
        (staging / place).mkdir(exist_ok=True)
        weights.write(tensors, staging / place / hub.WEIGHTS_FILE)
        del tensors
        # Heads are not checked, because `from_pretrained` allows their sizes to differ from those in the config.
        _, encoder = tree.split(BertModel(config, add_pooling_layer=False))
        try:
            weights.plan(staging / place, encoder.specs, ignore=ignore)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(staging / place), str(file))) from None
        if not in_place:
            for path in _companions(source, network):
                (staging / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / path, staging / path)
    return file


def _companions(source: Path, network: Path) -> Iterator[Path]:
    """Lists all of a model's files except its weights. The paths are relative to `source`."""
    names = [network / name for name in (hub.CONFIG_FILE, *hub.TOKENIZER_FILES, hub.SENTENCE_FILES[1])]
    if found := hub.find_modules(network):
        folder, modules = found
        names += [folder / hub.MODULES_FILE, folder / hub.SENTENCE_FILES[0]]
        names += [path for module in modules[1:] for path in (folder / module.path).rglob("*")]
    return (path.relative_to(source) for path in names if path.is_file() and path.is_relative_to(source))


def _from_msgpack(file: Path) -> dict[str, np.ndarray]:
    """Reads FlaxBert tensors and converts them to PyTorch's names and layouts."""
    try:
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:

            def array(code: int, data: bytes) -> np.ndarray:
                """Decodes an array that `flax.serialization` stored as msgpack extension type 1."""
                if code != 1:
                    raise ValueError(f"extension type {code}; expected arrays")
                shape, dtype, content = msgpack.unpackb(data)
                if dtype not in ("float16", "bfloat16", "float32", "float64"):
                    raise ValueError(f"an array of {dtype}; expected floats")
                # Releases the pages that were read. Otherwise, they would stay in memory alongside the arrays.
                mapped.madvise(mmap.MADV_DONTNEED)
                return np.frombuffer(content, np.dtype(dtype)).reshape(shape)

            flat = tree.flatten(msgpack.unpackb(mapped, ext_hook=array, strict_map_key=False))
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror or error}.") from None
    # Reading a damaged file can raise any msgpack or NumPy exception.
    except Exception as error:
        what = quoted(str(error) or type(error).__name__)
        raise CheckpointError(f"{file} is damaged ({what}); download it again.") from None
    prefix = "params." if all(path.startswith("params.") for path in flat) else ""
    tensors: dict[str, np.ndarray] = {}
    for path in list(flat):
        head, _, last = path.removeprefix(prefix).rpartition(".")
        array = flat.pop(path)
        if last not in _LAST or not isinstance(array, np.ndarray):
            raise CheckpointError(
                f"{file} contains {quoted(path)}, which FlaxBert does not have; expected parameter names that end in "
                f"{listed(_LAST)}."
            )
        # Flax stores the weight ("kernel") of a linear layer as [in, out], and PyTorch stores it as [out, in].
        tensors[f"{head}.{_LAST[last]}".lstrip(".")] = np.ascontiguousarray(array.T if last == "kernel" else array)
    return tensors


def _from_pickle(file: Path) -> dict[str, np.ndarray]:
    """Reads the tensors in a file written by `torch.save`.

    The arrays share memory with the tensors, which are memory-mapped if the file format allows it. A tied tensor, such
    as the decoder weight, is left out if it shares memory with the tensor to which it is tied.
    """
    check_extra("parity", "torch")
    import torch

    try:
        # PyTorch can memory-map only zip archives, which have been its file format since version 1.6.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        arrays = {}
        for name, tensor in tensors.items():
            name.encode()  # raises an error if the name is not a string or is not valid text
            original = tensors.get(weights.TIED.get(name))
            if original is not None and original.data_ptr() == tensor.data_ptr():
                continue
            if tensor.dtype == torch.bfloat16:  # PyTorch cannot convert this dtype to NumPy
                arrays[name] = tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            else:
                arrays[name] = tensor.contiguous().numpy()
        return arrays
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror or error}.") from None
    # Reading a file that is damaged or does not contain a dict of named tensors can raise many kinds of exceptions.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"PyTorch cannot load {file} as a dict of tensors with weights_only=True ({quoted(reason)}); download it "
            "again, or use another checkpoint."
        ) from None
