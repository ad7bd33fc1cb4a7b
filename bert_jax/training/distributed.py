"""Several processes, each with devices of its own, that run one program together: a TPU pod's hosts, a cluster's nodes.

All of them run the same command. Each makes its own rows of a batch; the first one alone writes, but for checkpoints,
of which each writes what its devices hold.
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
"""Seconds without a sign of life after which a process counts as lost, and ends the others."""
JOIN = 300
"""Seconds that the others are waited for."""


def start(given: str) -> None:
    """Joins the others, before anything else is done with JAX.

    Args:
        given: `auto` where the surroundings say who the others are (a TPU pod, SLURM, Open MPI), else
            `i/n@host:port`: the i-th of n, the first of which is at that address.

    Raises:
        InputError: If that is not what is given, or the others cannot be found.
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
    except (ValueError, RuntimeError, OSError) as error:  # RuntimeError: JAX has been used before
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--processes {given}: cannot join the other processes: {reason} "
            "(auto knows TPU pods, SLURM and Open MPI; elsewhere give i/n@host:port)."
        ) from None


def _reach(address: str) -> None:
    """Waits until somebody answers there; raises `OSError` if nobody does, where JAX would end with a dump."""
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
    """Whether this process is the one that writes and shows progress."""
    return jax.process_index() == 0


def name() -> str:
    """Of this process, for people."""
    return f"process {jax.process_index() + 1} of {jax.process_count()}"


def agree(what: str, text: Callable[[], str]) -> None:
    """Compares a text over all processes, each of which calls this; of one alone it is not even made.

    Raises:
        InputError: In all of them, if one has another text than the first; names lines that differ.
    """
    if jax.process_count() == 1:
        return
    content = np.frombuffer(text().encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(content)] = content
    texts = [
        bytes(row[:length]).decode()
        for row, length in zip(multihost_utils.process_allgather(padded), lengths, strict=True)
    ]
    for i, other in enumerate(texts):
        if other != texts[0]:
            lines = difflib.ndiff(texts[0].splitlines(), other.splitlines())
            differences = "\n  ".join(line for line in lines if line[0] in "-+")
            raise InputError(f"{what} of process {i + 1} differ from the first one's:\n  {differences}")


def wait(what: str) -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def share_folder(folder: Path, name: str) -> None:
    """Waits for the first process to have made a folder.

    Args:
        folder: The first process has put a file into it.
        name: Of the file.

    Raises:
        InputError: In all processes, if one of them does not see it.
    """
    wait(str(folder))
    seen = (folder / name).exists()
    if jax.process_count() > 1 and not all(multihost_utils.process_allgather(np.bool_(seen))):
        raise InputError(f"{folder} is not the same folder for all processes; expected one that all hosts share.")


def asked_to_stop(step: int) -> bool:
    """Whether one of the processes got SIGTERM; all of them hear it at the same step, each of which they ask about."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def lost_ones_named() -> Iterator[None]:
    """Turns what becomes of a collective whose other side is gone into a `TrainingError`."""
    try:
        yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:  # ValueError: of CPUs' Gloo
        gone = re.search(r"Gloo .* failed|heartbeat|UNAVAILABLE|Connection (closed|reset)", str(error))
        if jax.process_count() == 1 or not gone:
            raise
        reason = str(error).partition("\n")[0][:200]
        raise TrainingError(
            f"Another process of this run has ended or does not answer ({reason}); its own output says why. The same "
            "command on all hosts goes on from the latest checkpoint."
        ) from None
