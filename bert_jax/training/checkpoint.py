"""Writes training checkpoints with Orbax, keeps the latest and the best, and restores the newest readable one."""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from bert_jax.errors import CheckpointError

logger = logging.getLogger(__name__)


class Checkpoints:
    """Writes and reads the checkpoints in a folder. Each checkpoint belongs to one step.

    Args:
        folder: The folder; it is created if it does not exist.
        keep: Number of most recent checkpoints to keep, in addition to the best one.

    Raises:
        CheckpointError: If the folder cannot be created.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"Cannot write checkpoints to {folder}: {error.strerror}.") from None
        for file in folder.glob("*/metrics/metrics"):
            try:
                json.loads(file.read_text())
            except ValueError:
                # If the damaged file remained, Orbax could not open the other checkpoints either.
                logger.warning("The checkpoint of step %s is damaged (its score).", file.parts[-3])
                shutil.rmtree(file.parents[1])
        # A checkpoint without a score is stored with the score -inf. Among checkpoints with equal scores, the latest
        # counts as the best.
        policy = [LatestN(keep), BestN(get_metric_fn=_score, n=1)]
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policy),
                best_fn=_score,  # without it, Orbax does not store the scores
                # A background write would read arrays that are donated to the next step, which overwrites them.
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,  # removes incomplete checkpoints that a killed run left
            ),
        )

    def save(self, step: int, state: Any, progress: Mapping[str, Any], score: float | None) -> None:
        """Writes a checkpoint atomically. Does nothing if the step already has a checkpoint.

        Args:
            step: Number of completed steps.
            state: A pytree of arrays.
            progress: Other values that the training loop needs in order to resume. They are stored as JSON.
            score: The score of the model after this step; higher is better. None if the model was not evaluated, or if
                the score of an earlier step was at least as high.

        Raises:
            CheckpointError: If the folder cannot be written.
        """
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(dict(progress)))
        try:
            self._manager.save(step, args=args, metrics={"score": -math.inf if score is None else score}, force=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"Cannot write a checkpoint to {self.folder}: {error}. Earlier checkpoints are intact."
            ) from None

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """Reads the newest readable checkpoint, or the checkpoint of a given step.

        Skips and removes damaged checkpoints that are newer than the restored checkpoint, and logs a warning for each.

        Args:
            like: A pytree of arrays or of `jax.ShapeDtypeStruct` objects, with the shapes and shardings to restore.
            step: The step of the checkpoint to read; None for the newest readable checkpoint.

        Returns:
            The number of completed steps, the state and the progress; None if there is no checkpoint, or if the
            checkpoint of the given step is damaged.

        Raises:
            CheckpointError: If `step` is None and checkpoints exist, but none of them can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        for i, n in enumerate(steps):
            args = ocp.args.Composite(state=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore())
            try:
                restored = self._manager.restore(n, args=args)
            except Exception as error:  # a damaged file may raise any exception
                logger.warning("The checkpoint of step %d is damaged (%s).", n, str(error).partition("\n")[0][:200])
                continue
            for damaged in steps[:i]:
                logger.warning("Resuming from step %d instead of %d.", n, damaged)
                self._manager.delete(damaged)
            return n, restored["state"], restored["progress"]
        if steps and step is None:
            raise CheckpointError(
                f"None of the checkpoints in {self.folder} can be read. Remove the folder to start from the beginning."
            )
        return None

    def close(self) -> None:
        """Waits for Orbax to finish its last write, then closes the checkpoint manager."""
        self._manager.close()


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]
