"""Finds, downloads and writes the files of a model.

A model id is a local folder, a model in this package, or an id on the Hugging Face Hub.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from bert_jax.errors import BertJaxError, CheckpointError, HubUnreachableError, ModelNotFoundError, listed, quoted

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "google-bert/bert-base-cased"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""The index of a checkpoint with several weight files."""
EMBEDDED = Path(__file__).parent / "embedded"
"""The folder of the models that ship in the package, with one subfolder per model."""

TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def download(model_id: str | os.PathLike[str], *, revision: str | None = None, timeout: float = 10.0) -> Path:
    """The folder with a model's files. Files on the Hub are first downloaded into the local cache of Hub files.

    If `HF_HUB_OFFLINE=1` is set or the Hub does not answer, only the cache is used.

    Args:
        model_id: A folder, the name of an embedded model (`bert-mini-cased`), or an id on the Hub. An existing
            folder takes precedence.
        revision: Branch, tag or commit on the Hub; None for `main`.
        timeout: Seconds to wait for the Hub's first answer.

    Returns:
        A folder that contains config.json.

    Raises:
        ModelNotFoundError: If the folder, model or revision does not exist, or if a download fails.
        HubUnreachableError: If only the cache is used and it lacks files of the model.
        CheckpointError: If the model has no safetensors weights.
    """
    folder = Path(model_id)
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise ModelNotFoundError(f"{folder} is not a model folder; expected a folder that contains {CONFIG_FILE}.")
        return folder
    if (EMBEDDED / folder).is_dir() and len(folder.parts) == 1:
        return EMBEDDED / folder
    return _from_hub(str(model_id), revision or "main", timeout)


def read_json(path: Path, error: type[BertJaxError] = CheckpointError) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Args:
        path: The file.
        error: The exception class to raise.

    Raises:
        BertJaxError: If the file cannot be read, or does not hold an object. The exception is of the class `error`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not a JSON object")
    except OSError as reason:
        raise error(f"Cannot read {path}: {reason.strerror}.") from None
    except (ValueError, RecursionError) as reason:  # json.loads raises ValueError for huge integers
        raise error(f"{path} is damaged ({reason}); download it again.") from None
    return content


def architectures(folder: Path) -> list[str]:
    """The names of the classes that a model was saved from, as listed in its config.json; empty if none are listed."""
    try:
        names = read_json(folder / CONFIG_FILE).get("architectures")
    except CheckpointError:  # not reported here, because `BertConfig.from_file` reports it
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def embedded() -> list[str]:
    """The names of the models that ship in the package."""
    return sorted(path.name for path in EMBEDDED.iterdir() if path.is_dir())


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields a staging folder for new files. They move into `folder` only after all of them are written.

    Raises:
        CheckpointError: If the files cannot be written. The message names the files that were already replaced.
    """
    folder = Path(folder).absolute()
    staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    replaced: list[str] = []
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in staging.iterdir():
            path.chmod(0o666 & staging.stat().st_mode)  # as the umask allows; safetensors makes files private
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            for path in sorted(staging.iterdir()):
                os.replace(path, folder / path.name)
                replaced.append(path.name)
            if (folder / INDEX_FILE).exists() and (folder / WEIGHTS_FILE).exists():
                (folder / INDEX_FILE).unlink()  # left by an earlier checkpoint with several weight files
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
    # Imported here, because the import takes 0.2 s and a local folder does not need it.
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache
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
        # Not hf_hub_download(local_files_only=True), which contacts the Hub to build headers and so takes 3 s longer.
        path = try_to_load_from_cache(repo, name, revision=revision)
        if not isinstance(path, str):
            raise errors.LocalEntryNotFoundError(name)
        return Path(path)

    try:
        config = fetch(CONFIG_FILE, revision)  # by name, so that the cache records its commit for offline use
        found = revision if cache_only else commit
        for name in TOKENIZER_FILES:
            with contextlib.suppress(errors.EntryNotFoundError):  # each model has only some of these files
                fetch(name, found)
        try:
            fetch(WEIGHTS_FILE, found)
        except errors.EntryNotFoundError:
            for name in sorted(set(read_index(fetch(INDEX_FILE, found)).values())):
                fetch(name, found)
    except errors.LocalEntryNotFoundError:
        raise HubUnreachableError(
            f"{repo} (revision {revision}) is not in the cache, and {cache_only or 'the Hub does not answer'}. "
            "Connect to the Hub, or give a folder that contains the model."
        ) from None
    except errors.EntryNotFoundError:
        raise CheckpointError(
            f"{repo} (revision {revision}) has no safetensors weights. If it has pytorch_model.bin, download and "
            "convert it once: python scripts/convert_bin.py FOLDER OUTPUT_FOLDER"
        ) from None
    except (errors.HTTPError, OSError) as error:
        raise ModelNotFoundError(f"The download of {repo} failed: {error}. Run the same command again.") from None
    return config.parent


def _commit(repo: str, revision: str, timeout: float) -> str:
    """Asks the Hub once for the commit of a revision. Files that are cached for that commit need no further request.

    Raises:
        TimeoutError: If the Hub cannot be reached or does not answer in time.
        ModelNotFoundError: If the Hub reports that the model or revision does not exist.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    # Asks in a thread, because the HTTP client's own timeout covers neither a slow name server nor a retry.
    commit: Future[str] = Future()

    def ask() -> None:
        try:
            url = hf_hub_url(repo, CONFIG_FILE, revision=revision)
            commit.set_result(get_hf_file_metadata(url, timeout=timeout).commit_hash or revision)
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
    """Reads a `model.safetensors.index.json`, which maps the name of each tensor to the name of its file.

    Raises:
        CheckpointError: If the index is damaged, or names anything other than files in its own folder.
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
