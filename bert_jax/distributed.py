"""Support for training in several processes, such as one per host of a TPU pod or one per node of a cluster.

Each process has its own devices. All processes run the same command, and each process prepares its own rows of each
batch. Only the first process writes files. Checkpoints are an exception: each process writes the shards that its
devices hold.
"""

import contextlib
import difflib
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bert_jax.errors import InputError, TrainingError, quoted

HEARTBEAT = 30
"""A process that sends no heartbeat for this many seconds is considered lost, and the other processes end."""
JOIN = 300
"""The number of seconds to wait for the other processes to join."""


def start(given: str) -> None:
    """Joins the other processes. Call this function before any other use of JAX.

    Args:
        given: `auto` on a TPU pod or under SLURM or Open MPI, where the environment describes the processes.
            Otherwise, `i/n@host:port`, where i is the number of this process (counted from 1), n is the number of
            processes, and `host:port` is the address of process 1.

    Raises:
        InputError: If `given` is invalid, or if the other processes cannot be joined.
    """
    place: dict[str, Any] = {}
    if given != "auto":
        match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)@(\S+:\d+)", given)
        if not match or int(match[1]) > int(match[2]):
            raise InputError(f"--processes is {quoted(given)}; expected auto, or i/n@host:port with i from 1 to n.")
        place = {"coordinator_address": match[3], "num_processes": int(match[2]), "process_id": int(match[1]) - 1}
    try:
        if place.get("process_id"):
            _reach(place["coordinator_address"])
        jax.distributed.initialize(**place, initialization_timeout=JOIN, heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError, OSError) as error:  # such as a RuntimeError if JAX is already in use
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--processes {given}: cannot join the other processes: {reason} (without a TPU pod, SLURM or Open MPI, "
            "give i/n@host:port instead of auto)."
        ) from None


def _reach(address: str) -> None:
    """Waits until an address accepts connections.

    Without this wait, JAX would abort the process instead of raising an error if the address accepted no connection.

    Raises:
        OSError: If the address accepts no connection within `JOIN` seconds.
    """
    host, _, port = address.rpartition(":")
    until = time.monotonic() + JOIN
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=JOIN).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def first() -> bool:
    """Whether this is the first process, which writes files and shows progress."""
    return jax.process_index() == 0


def number_among(given: str) -> tuple[int, int]:
    """Determines the number of this process, then disconnects the process from the others.

    Afterward, each process can end or fail independently. This has been tested with two processes on one machine.

    Args:
        given: See `start`.

    Returns:
        The number of this process, counted from 1, and the total number of processes.

    Raises:
        InputError: See `start`.
    """
    start(given)
    found = jax.process_index() + 1, jax.process_count()
    jax.distributed.shutdown()
    return found


def name() -> str:
    """Returns this process's name for use in messages."""
    return f"process {jax.process_index() + 1} of {jax.process_count()}"


def agree(what: str, text: Callable[[], str]) -> None:
    """Checks that a text is the same in all processes. Every process must call this function.

    If there is only one process, `text` is not called.

    Raises:
        InputError: If the text of any process differs from that of the first process. Raised in all processes. The
            message lists the lines that differ.
    """
    if jax.process_count() == 1:
        return
    content = text().encode()
    longest = max(multihost_utils.process_allgather(np.int32(len(content))))
    padded = np.frombuffer(content.ljust(longest, b"\0"), np.uint8)  # the shape must be the same in all processes
    texts = [bytes(row).rstrip(b"\0").decode() for row in multihost_utils.process_allgather(padded)]
    for i, other in enumerate(texts):
        if other != texts[0]:
            lines = [line for line in difflib.ndiff(texts[0].splitlines(), other.splitlines()) if line[0] in "-+"]
            raise InputError("\n  ".join([f"{what} of process {i + 1} differ from those of process 1:", *lines]))


def wait(what: str) -> None:
    """Waits until all processes have called this function."""
    multihost_utils.sync_global_devices(what)


def share_folder(folder: Path, name: str) -> None:
    """Waits for all processes and checks that they share a folder.

    Args:
        folder: The folder. The first process must write a file to this folder before it calls this function.
        name: The name of the file that the first process wrote.

    Raises:
        InputError: If any process cannot access the file. Raised in all processes.
    """
    wait(str(folder))
    if not all(multihost_utils.process_allgather(np.bool_((folder / name).exists()))):
        raise InputError(f"{folder} is not the same folder for all processes; expected a folder that all hosts share.")


def asked_to_stop(step: int) -> bool:
    """Whether any process received SIGTERM; always False if there is only one process.

    Every process must call this function at every step. All processes receive the same result.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def lost_ones_named() -> Iterator[None]:
    """Converts an error in a collective operation to a `TrainingError`.

    The error is converted only if another process has ended or does not respond.
    """
    try:
        yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:  # on CPU, Gloo's errors are ValueErrors
        gone = re.search(r"Gloo .* failed|heartbeat|UNAVAILABLE|Connection (closed|reset)", str(error))
        if jax.process_count() == 1 or not gone:
            raise
        reason = str(error).partition("\n")[0][:200]
        raise TrainingError(
            f"Another process has ended or does not answer ({reason}); see its output. To resume from the latest "
            "checkpoint, run the same command on all hosts."
        ) from None
