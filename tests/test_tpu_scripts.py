"""The scripts for TPU slices, as far as they run without one: their dry run, and what follows a pre-emption."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts" / "tpu"
TRAINING = ("bert-jax", "finetune", "a.yaml", "output.folder=/mnt/share/a b")
GIVEN = {"TPU": "bert", "ZONE": "us-west4-a", "NFS": "10.0.0.2:/share"}


def run(script, *arguments, **environment):
    return subprocess.run(
        [SCRIPTS / script, *arguments], env=os.environ | environment, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip


def commands(text):
    return [line.split(" --")[0].strip() for line in text.splitlines() if line.startswith("gcloud compute tpus")]


@pytest.mark.slow
def test_a_dry_run_prints_the_commands_of_a_spot_run():
    done = run("spot.sh", "v5litepod-8", *TRAINING, **GIVEN, DRY_RUN="1")
    assert done.returncode == 0
    create, describe, copy, install, train, delete = commands(done.stderr)
    assert create == "gcloud compute tpus queued-resources create bert"
    assert "--accelerator-type v5litepod-8 --runtime-version v2-alpha-tpuv5-lite --spot" in done.stderr
    assert describe == "gcloud compute tpus queued-resources describe bert"
    assert copy.startswith("gcloud compute tpus tpu-vm scp /")
    assert install == train == "gcloud compute tpus tpu-vm ssh bert"
    assert r"output.folder=/mnt/share/a\\\ b\ --processes\ auto" in done.stderr
    assert delete == "gcloud compute tpus queued-resources delete bert"


# Google Cloud, as far as spot.sh sees it: the first slice waits, and is taken back while the run is on it. Its state
# says so only when it is asked for the second time.
CLOUD = r"""#!/usr/bin/env bash
echo "$*" >> "$LOG"
count() { grep -c -- "$1" "$LOG"; }
asked_since_run() { sed -n '/bert-jax/,$p' "$LOG" | grep -c describe; }
case "$*" in
    *" describe "*)
        if [ "$(count describe)" = 1 ]; then
            echo "$FIRST_STATE"
        elif [ "$TAKEN_BACK" = yes ] && [ "$(count ' create ')" = 1 ] && [ "$(asked_since_run)" -ge 2 ]; then
            echo SUSPENDED
        else
            echo ACTIVE
        fi ;;
    *bert-jax\ *) [ "$TAKEN_BACK" = yes ] && [ "$(count bert-jax)" -gt 1 ] ;;
esac
"""


def cloud(folder, *, first_state="PROVISIONING", taken_back="no"):
    """Runs spot.sh; returns what it did, and the commands that Google Cloud got."""
    (folder / "gcloud").write_text(CLOUD)
    (folder / "gcloud").chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(folder / "log"), "FIRST_STATE": first_state,
        "TAKEN_BACK": taken_back, "POLL_SECONDS": "0",
    }  # fmt: skip
    done = run("spot.sh", "v5litepod-8", *TRAINING, **GIVEN, **environment)
    return done, (folder / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("taken_back", "status", "runs"), [("yes", 0, 2), ("no", 1, 1)])
def test_a_slice_that_is_taken_back_is_replaced_and_a_run_that_fails_is_not_repeated(
    tmp_path, taken_back, status, runs
):
    done, log = cloud(tmp_path, taken_back=taken_back)
    assert done.returncode == status
    assert log.count("bert-jax finetune") == runs
    for action in ("create", "delete"):
        assert log.count(f"queued-resources {action}") == runs


def test_a_request_that_fails_ends_the_script(tmp_path):
    done, log = cloud(tmp_path, first_state="FAILED")
    assert done.returncode == 1
    assert "The request for a slice failed" in done.stderr
    assert log.count("queued-resources create") == log.count("queued-resources delete") == 1
    assert "bert-jax" not in log


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("create.sh", ("v4-8",), "the type is v4-8; expected v5litepod-N, v5p-N or v6e-N"),
        ("spot.sh", ("v5litepod-8",), "a command is missing"),
        ("run.sh", (), "a command is missing"),
    ],
)
def test_refused(script, arguments, message):
    done = run(script, *arguments, **GIVEN, DRY_RUN="1")
    assert done.returncode != 0
    assert message in done.stderr
    assert not commands(done.stderr)


def test_spot_needs_a_share():
    done = run("spot.sh", "v5litepod-8", *TRAINING, **GIVEN | {"NFS": ""}, DRY_RUN="1")
    assert done.returncode != 0
    assert "NFS: set it to a share" in done.stderr
