"""Finds, downloads and writes model files.

A model id is the path of a local folder, the name of the embedded model (`bert-mini-cased`), or an id on the Hugging
Face Hub.
"""

import contextlib
import fnmatch
import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from bert_jax.errors import BertJaxError, CheckpointError, HubUnreachableError, ModelNotFoundError, listed, quoted

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "google-bert/bert-base-cased"
CONFIG_FILE = "config.json"
MERGED_CONFIG_FILE = "merged_config.json"
"""The name of the merged model's config in an adapter folder. If the file were named `config.json`, `transformers`
would look for weights in the folder."""
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""The name of the index file of a sharded checkpoint."""
CARD_FILE = "README.md"
"""The name of the model card."""
EMBEDDED = Path(__file__).parent / "embedded"
"""The folder that contains the models shipped with the package, in one subfolder per model."""

TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
MODULES_FILE = "modules.json"
"""The file in which a sentence-transformers model lists its modules.

Each module has a subfolder in the model's folder. The first module is the network, which may instead be in the model's
folder itself.
"""
SENTENCE_FILES = ("config_sentence_transformers.json", "sentence_bert_config.json")
"""Two other files of a sentence-transformers model. The first file is in the model's folder, and the second is in the
network's folder."""

_CONVERT = "convert it once: bert-jax convert {folder} --output NEW_FOLDER"
_SAVE_AGAIN = "load it with {tool} and call save_pretrained there; see docs/files_from_elsewhere.md"
_EXPORTED = "use the checkpoint that it was exported from"
OTHER_FORMATS = {
    "flax_model.msgpack": _CONVERT,
    "pytorch_model.bin": _CONVERT,
    "pytorch_model.bin.index.json": _SAVE_AGAIN.format(tool="transformers"),
    "flax_model.msgpack.index.json": _SAVE_AGAIN.format(tool="transformers 4.46.3"),
    "tf_model.h5": _SAVE_AGAIN.format(tool="transformers 4.46.3"),
    "*.ckpt*.index": _SAVE_AGAIN.format(tool="transformers 4.46.3"),
    "adapter_config.json": "load the base model, then call bert_jax.lora.load_adapters(Path('{folder}'), model)",
    "*.onnx": _EXPORTED,
    "*.gguf": _EXPORTED,
    "openvino_model.xml": _EXPORTED,
}
"""Maps `fnmatch` patterns for the names of weight files in other formats to advice on how to use these files."""


def download(model_id: str | os.PathLike[str], *, revision: str | None = None, timeout: float = 10.0) -> Path:
    """Returns the folder that contains a model's files. A model on the Hub is first downloaded to the local cache.

    If `HF_HUB_OFFLINE=1` is set or the Hub does not respond, nothing is downloaded, and only files already in the cache
    are used.

    Args:
        model_id: A folder, the name of the embedded model (`bert-mini-cased`), or an id on the Hub. An existing folder
            takes precedence.
        revision: Branch, tag or commit on the Hub; None for `main`.
        timeout: Seconds to wait for the Hub's first response.

    Returns:
        The folder that contains the model's config. For a sentence-transformers model, this may be a subfolder of the
        model's folder. To get the model's folder, pass the result to `find_modules`.

    Raises:
        ModelNotFoundError: If the folder, model or revision does not exist, or if a download fails.
        HubUnreachableError: If nothing can be downloaded and the cache lacks some of the model's files.
        CheckpointError: If a model on the Hub has no safetensors weights, or if its weight index or `modules.json` is
            damaged.
    """
    folder = Path(model_id)
    if folder.is_dir():
        network = network_folder(folder)
        if not config_file(network).is_file():
            raise ModelNotFoundError(
                f"{folder} is not a model folder; expected a folder that contains {CONFIG_FILE}."
                + advice([name for name in names_in(folder) if OTHER_FORMATS.get(name) != _CONVERT], folder)
            )
        return network
    if (EMBEDDED / folder).is_dir() and len(folder.parts) == 1:
        return EMBEDDED / folder
    return _from_hub(str(model_id), revision or "main", timeout)


def config_file(folder: Path) -> Path:
    """Returns the path of a model's config: `config.json` or, in an adapter folder, `merged_config.json`."""
    merged = folder / MERGED_CONFIG_FILE
    return merged if merged.is_file() else folder / CONFIG_FILE


def names_in(folder: Path) -> list[str]:
    """Lists the files in a folder and its immediate subfolders. The paths are relative to the folder."""
    return [path.relative_to(folder).as_posix() for pattern in ("*", "*/*") for path in folder.glob(pattern)]


def advice(names: Iterable[str], folder: str | os.PathLike[str]) -> str:
    """Explains what the user can do with a folder that contains no safetensors weights.

    Args:
        names: The folder's files, as paths relative to the folder.
        folder: The folder name to show in the error message.

    Returns:
        A sentence that begins with a space, or an empty string if no file has a known format.
    """
    paths = sorted(names)
    for pattern, what in OTHER_FORMATS.items():
        if found := next((path for path in paths if fnmatch.fnmatchcase(path.rpartition("/")[2], pattern)), None):
            return f" It contains {found}; {what.format(folder=folder)}."
    return ""


class Module(NamedTuple):
    """A module of a sentence-transformers model.

    Attributes:
        kind: The name of the module's class, such as `Transformer`, `Pooling`, `Normalize` or `Dense`.
        path: The module's folder, relative to the model's folder; empty if both are the same.
    """

    kind: str
    path: str


def read_modules(file: Path) -> list[Module]:
    """Reads the `modules.json` file of a sentence-transformers model.

    Raises:
        CheckpointError: If the file is damaged, or if it names a folder outside the model's folder.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        # Classes from other libraries keep their full names.
        modules = [
            Module(re.sub(r"^sentence_transformers\.(.*\.)?", "", entry["type"]), entry["path"].rstrip("/"))
            for entry in entries
        ]
        if not modules or not all(re.fullmatch(r"\w[\w.-]*", module.path) for module in modules if module.path):
            raise ValueError("it lists no modules, or one outside the folder of the model")
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({quoted(str(error))}); download it again.") from None
    return modules


def network_folder(folder: Path) -> Path:
    """Returns the folder that contains a model's network. In a sentence-transformers model, this may be a subfolder."""
    file = folder / MODULES_FILE
    return folder / read_modules(file)[0].path if file.is_file() else folder


def find_modules(network: Path) -> tuple[Path, list[Module]] | None:
    """Finds the sentence-transformers model to which a network belongs.

    Args:
        network: The network's folder, as returned by `network_folder`.

    Returns:
        The model's folder and its modules; None if the network does not belong to a sentence-transformers model.
    """
    for folder in (network, network.parent):
        with contextlib.suppress(CheckpointError):
            if network_folder(folder) == network and (folder / MODULES_FILE).is_file():
                return folder, read_modules(folder / MODULES_FILE)
    return None


def read_json(path: Path, error: type[BertJaxError] = CheckpointError) -> dict[str, Any]:
    """Reads a model file that contains a JSON object.

    Args:
        path: The file.
        error: The exception class to raise.

    Raises:
        BertJaxError: If the file cannot be read or does not contain a JSON object. The exception is an instance of
            `error`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not a JSON object")
    except OSError as reason:
        raise error(f"Cannot read {path}: {reason.strerror}.") from None
    # json.loads raises ValueError for invalid JSON and for huge integers, and RecursionError for deep nesting.
    except (ValueError, RecursionError) as reason:
        raise error(f"{path} is damaged ({reason}); download it again.") from None
    return content


def architectures(folder: Path) -> list[str]:
    """Returns the class names that a model's config lists under `architectures`, or an empty list if there are none."""
    try:
        names = read_json(config_file(folder)).get("architectures")
    except CheckpointError:  # ignored here, because `BertConfig.from_file` reports a damaged file
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def is_hub_id(name: str) -> bool:
    """Whether a model or data set name is a Hub id rather than a local path or the name of an embedded model."""
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return not Path(name).exists() and name not in embedded()


def read_card(model_id: str, revision: str | None = None) -> dict[str, Any]:
    """Reads the metadata of a model card. Nothing is downloaded, because `download` also fetches the card.

    Args:
        model_id: A folder, the name of the embedded model, or an id on the Hub.
        revision: Branch, tag or commit on the Hub; None for `main`.

    Returns:
        The metadata. The dict is empty if there is no card or if the card's metadata is not valid YAML.
    """
    import yaml
    from huggingface_hub import ModelCard, try_to_load_from_cache

    path: Any = (EMBEDDED if model_id in embedded() else Path()) / model_id / CARD_FILE
    if is_hub_id(model_id):
        path = try_to_load_from_cache(model_id, CARD_FILE, revision=revision)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    try:
        metadata: dict[str, Any] = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return metadata


def embedded() -> list[str]:
    """Returns the names of the models that ship with the package."""
    return sorted(path.name for path in EMBEDDED.iterdir() if path.is_dir())


def is_vacant(path: Path) -> bool:
    """Whether `path` can be used for a new folder; true if it does not exist or is an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to which the caller writes files, then moves these files into `folder`.

    The files may be in subfolders.

    Raises:
        CheckpointError: If the files cannot be written. The error message names the files that had already been
            replaced.
    """
    folder = Path(folder).absolute()
    staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    replaced: list[str] = []
    try:
        staging.mkdir(parents=True)
        yield staging
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        for path in files:
            # The `safetensors` library makes its files readable only by their owner, so each file is given the
            # permissions that the umask allows.
            path.chmod(0o666 & staging.stat().st_mode)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            for path in files:
                place = path.relative_to(staging)
                (folder / place).parent.mkdir(exist_ok=True)
                os.replace(path, folder / place)
                replaced.append(str(place))
            if (folder / INDEX_FILE).exists() and (folder / WEIGHTS_FILE).exists():
                # The folder contained an earlier sharded checkpoint, whose index no longer applies.
                (folder / INDEX_FILE).unlink()
        else:
            os.rename(staging, folder)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {folder}: {error}. Files replaced before the error: {listed(replaced) or 'none'}. "
            "Fix the cause, then save again."
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _from_hub(repo: str, revision: str, timeout: float) -> Path:
    # Imported here, because the import takes 0.2 s and is not needed for a local folder.
    from huggingface_hub import constants, errors, hf_hub_download, list_repo_files, try_to_load_from_cache
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except errors.HFValidationError:
        raise ModelNotFoundError(
            f"{quoted(repo)} is neither a folder nor a model id; expected an existing folder, "
            f"an id such as {DEFAULT_MODEL}, or {', '.join(embedded())}."
        ) from None
    cache_only: str | None = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
    if not cache_only:
        try:
            commit = _commit(repo, revision, timeout)
        except TimeoutError:
            cache_only = "the Hub does not answer"

    def fetch(name: str, revision: str) -> Path:
        if not cache_only:
            return Path(hf_hub_download(repo, name, revision=revision))
        # hf_hub_download(local_files_only=True) would find the same file, but it would take 3 s longer, because it
        # contacts the Hub to build headers.
        path = try_to_load_from_cache(repo, name, revision=revision)
        if not isinstance(path, str):
            raise errors.LocalEntryNotFoundError(name)
        return Path(path)

    def fetch_some(names: Iterable[str], revision: str) -> None:
        for name in names:
            with contextlib.suppress(errors.EntryNotFoundError):  # most models lack some of these files
                fetch(name, revision)

    try:
        # These files are fetched by revision rather than by commit. The cache then records which commit the revision
        # refers to, so later calls find the files without contacting the Hub.
        prefix = ""
        with contextlib.suppress(errors.EntryNotFoundError):
            prefix = f"{read_modules(fetch(MODULES_FILE, revision))[0].path}/".lstrip("/")
        config = fetch(prefix + CONFIG_FILE, revision)
        found = revision if cache_only else commit
        fetch_some([CARD_FILE, *(prefix + name for name in TOKENIZER_FILES)], found)
        if sentence_model := find_modules(config.parent):
            fetch_some([SENTENCE_FILES[0], prefix + SENTENCE_FILES[1]], found)
            fetch_some((f"{path}/{CONFIG_FILE}" for _, path in sentence_model[1][1:]), found)
        try:
            fetch(prefix + WEIGHTS_FILE, found)
        except errors.EntryNotFoundError:
            for name in sorted(set(read_index(fetch(prefix + INDEX_FILE, found)).values())):
                fetch(prefix + name, found)
    except errors.LocalEntryNotFoundError:
        raise HubUnreachableError(
            f"{repo} (revision {revision}) is not in the cache, and {cache_only or 'the Hub does not answer'}. "
            "There is no folder of this name, so it is taken as an id on the Hub. Connect to the Hub, or give a folder "
            "that contains the model."
        ) from None
    except errors.EntryNotFoundError:
        advised = ""
        with contextlib.suppress(errors.HTTPError, OSError):
            advised = advice(list_repo_files(repo, revision=found), "FOLDER")
        raise CheckpointError(
            f"{repo} (revision {revision}) has no safetensors weights."
            + (f"{advised} To download it: hf download {repo} --local-dir FOLDER" if advised else " Use another model.")
        ) from None
    except (errors.HTTPError, OSError) as error:
        raise ModelNotFoundError(f"The download of {repo} failed: {error}. Run the same command again.") from None
    return config.parent


def _commit(repo: str, revision: str, timeout: float) -> str:
    """Asks the Hub which commit a revision refers to. Files that are cached for this commit need no further request.

    Raises:
        TimeoutError: If the Hub cannot be reached or does not answer in time.
        ModelNotFoundError: If the Hub reports that the model, the revision or the model's `config.json` does not exist,
            or that the model is gated.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    # The request runs in a thread, because the HTTP client's timeout covers neither a slow name server nor a retry.
    commit: Future[str] = Future()

    def commit_of(name: str) -> str:
        url = hf_hub_url(repo, name, revision=revision)
        return get_hf_file_metadata(url, timeout=timeout).commit_hash or revision

    def ask() -> None:
        try:
            try:
                commit.set_result(commit_of(CONFIG_FILE))
            except errors.EntryNotFoundError:
                commit.set_result(commit_of(MODULES_FILE))
        except Exception as error:
            commit.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return commit.result(timeout)
    except errors.GatedRepoError:
        raise ModelNotFoundError(f"{repo} is gated: request access on the Hub, then run `hf auth login`.") from None
    except errors.RevisionNotFoundError:
        raise ModelNotFoundError(f"{repo} has no revision {quoted(revision)}; give a branch, tag or commit.") from None
    except errors.RepositoryNotFoundError:
        raise ModelNotFoundError(
            f"{repo} is neither a folder nor a model on the Hub. If the model is private, run `hf auth login` first."
        ) from None
    except errors.EntryNotFoundError:
        raise ModelNotFoundError(f"{repo} on the Hub has no {CONFIG_FILE}; give another model.") from None
    except (errors.HTTPError, OSError):
        raise TimeoutError from None


def read_index(index: Path) -> dict[str, str]:
    """Reads a `model.safetensors.index.json` file, which maps each tensor name to a file name.

    Raises:
        CheckpointError: If the index is damaged or refers to anything other than files in the same folder.
    """
    content = read_json(index)
    files = content.get("weight_map")
    if not isinstance(files, dict) or not files or not isinstance(content.get("metadata", {}), dict):
        raise CheckpointError(f"{index} is damaged (invalid weight_map or metadata); download it again.")
    if "metadata" not in content:
        logger.warning("%s has no metadata; transformers cannot read it.", index)
    for name, file in files.items():
        if not isinstance(file, str) or file in (".", "..") or not re.fullmatch(r"[^/\\\0\ud800-\udfff]{1,200}", file):
            raise CheckpointError(
                f"{index} maps the tensor {quoted(name)} to {quoted(file)}; expected the name of a file in its folder."
            )
    return files
