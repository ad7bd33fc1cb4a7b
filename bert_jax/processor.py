"""Determines which dtypes are faster than float32 on this machine."""

import functools
import logging
from importlib import metadata
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

CPUINFO = Path("/proc/cpuinfo")
INSTRUCTIONS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "int8": {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"},
}
"""Maps each dtype to the `/proc/cpuinfo` flags of the x86 and Arm instructions that multiply numbers of this dtype."""
FAST_INT8 = (0, 12)
"""The first `jaxlib` version with fast int8 matrix products on CPUs."""


def speed(dtype: str) -> str:
    """Describes the speed of `dtype` on this machine in a phrase such as "should be faster than float32".

    Args:
        dtype: "bfloat16" or "int8".
    """
    if jax.default_backend() != "cpu":
        return f"may be faster than float32; this has not been measured on a {jax.default_backend()}"
    if not CPUINFO.exists():
        return "may be faster than float32; this system does not list its processor's instructions"
    lines = CPUINFO.read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    if INSTRUCTIONS[dtype].isdisjoint(flags):
        return f"is not faster than float32: this processor has no {dtype} instructions"
    jaxlib = metadata.version("jaxlib")
    if dtype == "int8" and tuple(map(int, jaxlib.split(".")[:2])) < FAST_INT8:
        fast = ".".join(map(str, FAST_INT8))
        return (
            f"is not faster than float32 with jaxlib {jaxlib}; install jaxlib {fast} or newer, for Python 3.12 or newer"
        )
    return "should be faster than float32"


@functools.cache
def warn_if_slow(dtype: str) -> None:
    """Logs a warning, once per process and dtype, if `dtype` is not faster than float32 on this machine."""
    if not (words := speed(dtype)).startswith(("should be", "may be")):
        logger.warning("%s %s.", dtype, words)
