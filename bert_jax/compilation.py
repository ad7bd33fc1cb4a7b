"""Caches compiled programs on disk, so that later runs of a command need not recompile them."""

import os
from pathlib import Path

CACHE_VARIABLE = "BERT_JAX_COMPILATION_CACHE"
"""The name of the environment variable that sets the cache folder. The value `off` disables the cache."""


def use_compilation_cache() -> None:
    """Configures JAX to cache compiled programs on disk, by default in the user's cache folder.

    The commands and the Ray workers call this function.
    """
    place = os.environ.get(CACHE_VARIABLE)
    if not place:
        try:
            place = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bert_jax" / "programs")
        except RuntimeError:  # the user has no home folder
            return
    # With `jaxlib` 0.10.2, a program for several simulated devices can deadlock when it is loaded from the cache, so
    # nothing is cached if devices are simulated.
    if place == "off" or "--xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", place)
    # By default, JAX caches only programs that take a second or more to compile. Most BERT programs compile faster.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
