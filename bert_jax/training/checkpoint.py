"""Checkpoints of a run (orbax): the latest and the best, and the newest that can be read."""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from bert_jax.errors import CheckpointError

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in a folder, by step.

    Args:
        folder: Is made if need be.
        keep: Latest ones that are kept, beside the best.

    Raises:
        CheckpointError: If the folder cannot be made.
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
            except ValueError:  # orbax would not open the others then
                logger.warning("The checkpoint of step %s is damaged (its score).", file.parts[-3])
                shutil.rmtree(file.parents[1])
        # Among those that were not evaluated, whose score is -inf, the best is the latest.
        policy = [LatestN(keep), BestN(get_metric_fn=_score, n=1)]
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policy),
                best_fn=_score,  # or the scores are not stored
                # A write in the background would read arrays that the next step has been given to overwrite.
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,  # of a run that was killed while it wrote
            ),
        )

    def save(self, step: int, state: Any, progress: Mapping[str, Any], score: float | None) -> None:
        """Writes a checkpoint, whole or not at all.

        Args:
            step: Steps done.
            state: A pytree of arrays.
            progress: What else the loop remembers, as JSON.
            score: Higher is better; None where it was not evaluated.

        Raises:
            CheckpointError: If the folder cannot be written.
        """
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(dict(progress)))
        metrics = {"score": -math.inf if score is None else score}
        try:
            self._manager.save(step, args=args, metrics=metrics, force=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"Cannot write a checkpoint to {self.folder}: {error}. Earlier ones stand.") from None

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """Reads the newest checkpoint that can be read, or that of a step.

        Damaged ones are passed over and removed, and the log says so.

        Args:
            like: A pytree of arrays or their shapes, with the sharding to restore to.
            step: The step; None for the newest.

        Returns:
            Steps done, the state and the progress; None if there is no checkpoint, or that of the step is damaged.

        Raises:
            CheckpointError: If there are checkpoints and none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        damaged = []
        for n in steps:
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(jax.tree.map(_spec, like)), progress=ocp.args.JsonRestore()
            )
            try:
                restored = self._manager.restore(n, args=args)
            except Exception as error:  # whatever a damaged file makes of it
                logger.warning("The checkpoint of step %d is damaged (%s).", n, str(error).partition("\n")[0][:200])
                damaged.append(n)
                continue
            for bad in damaged:
                logger.warning("Going on from step %d instead of %d.", n, bad)
                self._manager.delete(bad)
            return n, restored["state"], restored["progress"]
        if damaged and step is None:
            raise CheckpointError(
                f"None of the checkpoints in {self.folder} can be read. Remove the folder to start from the beginning."
            )
        return None

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.close()


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]
