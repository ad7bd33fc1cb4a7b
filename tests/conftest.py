"""What every test runs under: 8 simulated devices, no implicit promotion of rank, no network."""

import os
from importlib import metadata
from pathlib import Path

# Most of the time goes into compiling small programs, so they are compiled the quickest way there is. XLA_FLAGS of
# one's own win: the parity suite of `.ci/run` compiles as users do.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    # Later ones have no such flag, and one that is unknown ends the process.
    + " --xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10."),
)
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"
# Programs are kept between tests, workers, Pythons and runs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("BERT_JAX_COMPILATION_CACHE", os.environ["JAX_COMPILATION_CACHE_DIR"])  # of the command line

import jax
import pytest
import reference

import bert_jax


def pytest_report_header() -> str:
    return f"jax {jax.__version__}, {jax.device_count()} {jax.default_backend()} devices"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of the small reference model with the weights of one class, or of all heads (`None`)."""
    folders = {}

    def folder(architecture=None):
        if architecture not in folders:
            path = tmp_path_factory.mktemp("checkpoint")
            config = reference.config(architecture)
            folders[architecture] = reference.write(path, reference.tensors(architecture), config)
        return folders[architecture]

    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return bert_jax.Tokenizer.from_pretrained("bert-mini-cased")


@pytest.fixture(scope="session")
def fill_mask():
    return bert_jax.pipeline("fill-mask", "bert-mini-cased")


@pytest.fixture
def uninstalled(monkeypatch):
    """The package is imported from a folder; pip knows nothing about it."""

    def version_of(name, *, installed=metadata.version):
        if name == "bert-jax":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version_of)
