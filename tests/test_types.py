"""What a type checker says of mistakes in calls of the package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.types
def test_a_type_checker_finds_mistakes():
    """Each line of `mistakes.py` that has a mistake says what the checker is to say of it; no other line has one."""
    lines = (FOLDER / "mistakes.py").read_text().splitlines()
    expected = {n: line.split("  # ")[1] for n, line in enumerate(lines, 1) if "  # " in line}
    assert len(expected) > 10
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "tests/mistakes.py"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent)
    found: dict[int, str] = {}
    for number, message in re.findall(r"^tests/mistakes.py:(\d+): error: (.*)$", run.stdout, re.MULTILINE):
        found.setdefault(int(number), message)
    assert found.keys() == expected.keys(), run.stdout + run.stderr
    for number, message in expected.items():
        assert message in found[number], run.stdout
