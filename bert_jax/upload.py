"""Uploads models, tokenizers and run folders to the Hugging Face Hub."""

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bert_jax import hub
from bert_jax.errors import HubUnreachableError, InputError, ModelNotFoundError, quoted

RUN_FILES = ("results.json", "metrics.jsonl", "curve.png")
"""The run files that are uploaded with the model: the final metrics, the metrics of each step, and the learning curve.

All other files of a run stay on this machine. The `settings.yaml` file contains local paths, and `predictions.jsonl`
and `answers.json` contain texts from the data. Checkpoints, TensorBoard events and adapters are not needed to use the
model.
"""


class PushToHub:
    """Base class for models and tokenizers. Subclasses implement `save_pretrained`."""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files to a folder."""
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str | None = None,
        token: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Uploads the output of `save_pretrained` to the Hugging Face Hub in one commit.

        For the arguments and errors, see `bert_jax.push_folder`.

        Returns:
            The URL of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return _upload(
                Path(folder), os.listdir(folder), repo_id, private, commit_message or f"Upload {type(self).__name__}",
                token, revision,
            )  # fmt: skip


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Uploads a model with its tokenizer and, if a run produced it, with its model card, metrics and learning curve.

    The uploaded files are `config.json`, the safetensors weights, the tokenizer files, the sentence-transformers files,
    `README.md` and `RUN_FILES`. All other files in the folder stay on this machine.

    Args:
        folder: The folder of a finished run, or another folder that contains a model.
        repo_id: The id of the model on the Hub, such as `me/emotion`. An id without an owner, such as `emotion`, refers
            to a model in your own account. If the model does not exist, it is created.
        private: Whether a new model is private. None uses the account's default, which is usually public.
        commit_message: The first line of the commit message; "Upload model" by default.
        token: A token with write access. None uses the token from `hf auth login` or from the `HF_TOKEN` environment
            variable.
        revision: The branch to upload to, which is created if it does not exist; `main` by default.

    Returns:
        The URL of the commit.

    Raises:
        ModelNotFoundError: If the folder contains no model.
        CheckpointError: If the weight index or `modules.json` is damaged.
        InputError: If there is no token, if `repo_id` is invalid, if the visibility of an existing model contradicts
            `private`, if the metadata in `README.md` is invalid, or if the Hub refuses the upload.
        HubUnreachableError: If the Hub does not respond.
    """
    folder = Path(folder)
    names = model_files(folder)
    return _upload(folder, names, repo_id, private, commit_message or "Upload model", token, revision)


def model_files(folder: Path) -> list[str]:
    """Lists the files that `push_folder` uploads. The paths are relative to the folder.

    Raises:
        ModelNotFoundError: If the folder contains no model.
        CheckpointError: If the weight index or `modules.json` is damaged.
    """
    modules = folder / hub.MODULES_FILE
    first, *others = [module.path for module in hub.read_modules(modules)] if modules.is_file() else [""]
    network = folder / first
    weights = [hub.WEIGHTS_FILE]
    if not (network / hub.WEIGHTS_FILE).is_file() and (network / hub.INDEX_FILE).is_file():
        weights = [hub.INDEX_FILE, *sorted(set(hub.read_index(network / hub.INDEX_FILE).values()))]
    needed = [network / name for name in (hub.CONFIG_FILE, *weights)]
    if absent := [path.name for path in needed if not path.is_file()]:
        raise ModelNotFoundError(
            f"{network} has no {absent[0]}; expected the folder of a model. A run writes its model when it is finished."
        )
    every = [
        *needed,
        *(network / name for name in (*hub.TOKENIZER_FILES, hub.SENTENCE_FILES[1])),
        *(folder / path / name for path in others for name in (hub.CONFIG_FILE, hub.WEIGHTS_FILE)),
        *(folder / name for name in (hub.CARD_FILE, hub.MODULES_FILE, hub.SENTENCE_FILES[0], *RUN_FILES)),
    ]
    return sorted({path.relative_to(folder).as_posix() for path in every if path.is_file()})


def _upload(
    folder: Path,
    names: Sequence[str],
    repo_id: str,
    private: bool | None,
    commit_message: str,
    token: str | None,
    revision: str | None,
) -> str:
    # Imported here, because the import takes 0.2 s.
    from huggingface_hub import HfApi, get_token

    if not (token or get_token()):
        raise InputError("There is no token for the Hugging Face Hub. Run `hf auth login`, or pass token=….")
    api = HfApi(token=token or None)
    with _explained(repo_id):
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # `create_repo` does not change an existing model.
        if private is not None and bool(api.repo_info(repo).private) != private:
            is_now, expected = ("public", "private") if private else ("private", "public")
            raise InputError(
                f"{repo} exists and is {is_now}, but private is {private}. Make it {expected} in its settings on the "
                "Hub, or leave private out."
            )
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=[glob.escape(name) for name in names],
            commit_message=commit_message, revision=revision,
        )  # fmt: skip
    return str(commit.commit_url)


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Converts `huggingface_hub` errors to this package's errors."""
    from huggingface_hub import errors

    try:
        yield
    except InputError:
        raise
    except errors.HFValidationError:
        raise InputError(f"{quoted(repo_id)} is not an id of the Hub; expected OWNER/NAME or NAME.") from None
    except errors.OfflineModeIsEnabled:
        raise HubUnreachableError("HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it.") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        why = f"{status}, {quoted(error.server_message or error.response.reason_phrase)}"
        if status < 500:
            raise InputError(
                f"The Hub refuses the upload to {repo_id} ({why}). Check the id, and that the token may write to it."
            ) from None
        raise HubUnreachableError(f"The Hub has an error ({why}). Run the same command later.") from None
    except ValueError as error:  # the Hub rejects a model card's metadata before any file is uploaded
        raise InputError(f"Nothing is uploaded to {repo_id}: {quoted(str(error))}. Correct the card.") from None
    except (errors.HTTPError, OSError, RuntimeError) as error:
        raise HubUnreachableError(
            f"The upload to {repo_id} failed: {quoted(str(error))}. Run the same command again."
        ) from None
