import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.config import InputError
from resnet_jax.integrity import SEAL, damage, steps_in
from resnet_jax.training.checkpoints import Checkpoints, read_checkpoint

STATE = {"params": jnp.arange(600.0)}


def save_all(folder, metrics, keep=9):
    """Saves steps, each the best so far whose metric is the greatest."""
    best = None
    with Checkpoints(folder, keep) as checkpoints:
        for step, metric in metrics.items():
            checkpoints.save(step, {"params": STATE["params"] * step}, {"step": step})
            assert checkpoints.has(step)
            if metric is not None and (best is None or metric > best):
                checkpoints.best, best = step, metric
        return checkpoints.latest()


@pytest.mark.parametrize(
    ("metrics", "keep", "kept"),
    [
        ({1: 0.9, 2: 0.5, 3: 0.6}, 1, [3, 1]),
        ({1: 0.5, 2: 0.9, 3: None, 4: None}, 2, [4, 3, 2]),
        ({1: 0.7, 2: 0.7, 3: 0.6}, 1, [3, 1]),
        ({1: None, 2: None}, 1, [2]),
    ],
)
def test_the_latest_and_the_best_stay(tmp_path, metrics, keep, kept):
    assert save_all(tmp_path, metrics, keep) == kept[0]
    assert steps_in(tmp_path / "checkpoints") == kept


def test_a_state_comes_back_with_its_record(tmp_path):
    save_all(tmp_path, {1: 0.9, 2: 0.5})
    for step in (1, 2):
        state, record = read_checkpoint(tmp_path, STATE, str(step))
        np.testing.assert_array_equal(state["params"], STATE["params"] * step)
        assert record == {"step": step}
    assert read_checkpoint(tmp_path, STATE)[1] == {"step": 2}


def restored_step(folder):
    """What a run that goes on in a folder begins with."""
    with Checkpoints(folder, 9) as checkpoints:
        found = checkpoints.restore(lambda: STATE)
    return found and found[2]


def test_no_checkpoint_is_said(tmp_path):
    assert restored_step(tmp_path) is None
    with pytest.raises(InputError, match="holds no checkpoint; the run ended before its first one"):
        read_checkpoint(tmp_path, STATE)


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size > 1]


def truncate(folder, rng):
    path = rng.choice([path for path in files_of(folder) if path != folder / "commit_success.txt"])
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(folder, rng):
    path = folder / rng.choice([SEAL, *json.loads((folder / SEAL).read_text())])
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 0x10
    path.write_bytes(data)


def lose_a_folder(folder, rng):
    shutil.rmtree(rng.choice([folder / "state", folder / "record"]))


@pytest.mark.parametrize("harm", [truncate, flip_a_byte, lose_a_folder])
def test_any_damage_is_found_and_the_newest_sound_one_is_taken(tmp_path, harm, capfd):
    save_all(tmp_path, {1: None, 2: None})
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "checkpoints" / "2", whole)
    newest = tmp_path / "checkpoints" / "2"
    for seed in range(12):
        shutil.rmtree(newest)
        shutil.copytree(whole, newest)
        assert damage(newest) is None
        harm(newest, np.random.default_rng(seed))
        assert damage(newest) is not None
        with pytest.raises(InputError, match=r"checkpoint of step 2 .* is damaged"):
            read_checkpoint(tmp_path, STATE, "2")
    assert read_checkpoint(tmp_path, STATE)[1] == {"step": 1}
    assert steps_in(tmp_path / "checkpoints") == [2, 1]  # reading touches nothing
    assert restored_step(tmp_path) == 1
    assert steps_in(tmp_path / "checkpoints") == [1] and (tmp_path / "damaged" / "2-0").is_dir()
    assert "the checkpoint of step 2 is damaged" in capfd.readouterr().err


def test_where_none_is_sound_nothing_is_touched(tmp_path):
    save_all(tmp_path, {1: None, 2: None})
    for step in (1, 2):
        truncate(tmp_path / "checkpoints" / str(step), np.random.default_rng(step))
    before = {path: path.read_bytes() for path in files_of(tmp_path)}
    with pytest.raises(InputError, match=r"no checkpoint in .* is sound .*Nothing was changed"):
        restored_step(tmp_path)
    assert {path: path.read_bytes() for path in files_of(tmp_path)} == before


def test_a_step_that_was_damaged_is_saved_again(tmp_path):
    """By the run that goes on from the one before it."""
    save_all(tmp_path, {1: None, 2: None})
    truncate(tmp_path / "checkpoints" / "2", np.random.default_rng(0))
    with Checkpoints(tmp_path, 9) as checkpoints:
        state, record, step = checkpoints.restore(lambda: STATE)
        assert (record, step) == ({"step": 1}, 1)
        checkpoints.save(2, state, {"again": True})
    assert steps_in(tmp_path / "checkpoints") == [2, 1] and damage(tmp_path / "checkpoints" / "2") is None
    assert read_checkpoint(tmp_path, STATE)[1] == {"again": True}
