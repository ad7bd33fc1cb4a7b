import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert_jax.errors import CheckpointError
from bert_jax.training.checkpoint import Checkpoints


def state(value):
    return {"params": {"a.0.weight": jnp.full((4, 3), value), "b": jnp.arange(5.0) * value}, "step": jnp.int32(value)}


@pytest.fixture
def three(tmp_path):
    """Checkpoints of the steps 1, 2 and 3."""
    checkpoints = Checkpoints(tmp_path / "run", keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"note": step}, None)
    return checkpoints


def steps(checkpoints):
    return sorted(int(path.name) for path in checkpoints.folder.iterdir() if path.name.isdigit())


def damage(checkpoints, step):
    """Cuts every large file of a checkpoint in half."""
    files = [p for p in (checkpoints.folder / str(step)).rglob("*") if p.is_file() and p.stat().st_size > 16]
    for file in files:
        os.truncate(file, file.stat().st_size // 2)


def test_the_newest_comes_back_bit_for_bit(three):
    step, restored, progress = three.restore(state(0))
    assert (step, progress) == (3, {"note": 3})
    jax.tree.map(np.testing.assert_array_equal, restored, state(3))
    assert three.restore(state(0), 2)[2] == {"note": 2}


def test_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path / "new", keep=1).restore(state(0)) is None


def test_latest_and_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    # As the loop does: a score is given to each new best alone.
    for step, score in enumerate([0.5, 0.7, None, None], 1):
        checkpoints.save(step, state(step), {}, score)
    checkpoints = Checkpoints(tmp_path, keep=2)  # another process knows the best too
    for step in (5, 6):
        checkpoints.save(step, state(step), {}, None)
    assert steps(checkpoints) == [2, 5, 6]


def test_without_scores_only_the_latest_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {}, None)
    assert steps(checkpoints) == [3]


def test_a_damaged_one_falls_back_to_the_one_before(three, caplog):
    damage(three, 3)
    step, restored, _ = three.restore(state(0))
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, restored, state(2))
    assert "The checkpoint of step 3 is damaged" in caplog.text
    assert "Resuming from step 2 instead of 3" in caplog.text
    three.save(3, state(30), {}, None)  # the same step can be written again
    assert float(three.restore(state(0))[1]["params"]["a.0.weight"][0, 0]) == 30


def test_a_damaged_score_does_not_hide_the_others(three, caplog):
    damage(three, 3)
    again = Checkpoints(three.folder, keep=3)
    assert "The checkpoint of step 3 is damaged (its score)" in caplog.text
    assert again.restore(state(0))[0] == 2


def test_a_damaged_one_that_is_asked_for(three):
    damage(three, 1)
    assert three.restore(state(0), 1) is None
    assert three.restore(state(0))[0] == 3


def test_all_damaged_is_an_error(three):
    for step in (1, 2, 3):
        damage(three, step)
    with pytest.raises(CheckpointError, match="None of the checkpoints"):
        three.restore(state(0))
    assert steps(three) == [1, 2, 3]


def test_what_a_kill_left_behind_is_passed_over(three):
    shutil.copytree(three.folder / "3", three.folder / "4.orbax-checkpoint-tmp")
    assert Checkpoints(three.folder, keep=3).restore(state(0))[0] == 3


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write"):
        Checkpoints(tmp_path / "file" / "run", keep=1)
