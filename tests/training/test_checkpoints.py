import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.config import InputError
from resnet_jax.training import checkpoints

STATE = {"params": jnp.arange(6.0)}


def save_all(folder, metrics, keep):
    with checkpoints.open_checkpoints(folder, keep) as manager:
        for step, metric in metrics.items():
            state = {"params": STATE["params"] * step}
            checkpoints.save(manager, step, state, {"step": step}, metric)


@pytest.mark.parametrize(
    ("metrics", "keep", "kept", "best"),
    [
        ({1: 0.9, 2: 0.5, 3: 0.6}, 1, [1, 3], 1),
        ({1: 0.5, 2: 0.9, 3: None, 4: None}, 2, [2, 3, 4], 2),
        ({1: 0.7, 2: 0.7, 3: 0.6}, 1, [2, 3], 2),
        ({1: None, 2: None}, 1, [2], None),
    ],
)
def test_the_latest_and_the_best_stay(tmp_path, metrics, keep, kept, best):
    save_all(tmp_path, metrics, keep)
    with checkpoints.read_checkpoints(tmp_path) as manager:
        assert sorted(manager.all_steps()) == kept
        assert checkpoints.best_step(manager) == best


def test_a_state_comes_back_with_its_record(tmp_path):
    save_all(tmp_path, {1: 0.9, 2: 0.5}, keep=2)
    with checkpoints.read_checkpoints(tmp_path) as manager:
        for step in (1, 2):
            state, record = checkpoints.restore(manager, STATE, step)
            np.testing.assert_array_equal(state["params"], STATE["params"] * step)
            assert record == {"step": step}
        assert checkpoints.restore(manager, STATE)[1] == {"step": 2}


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoints.read_checkpoints(tmp_path)
    with (
        checkpoints.open_checkpoints(tmp_path, 1) as manager,
        pytest.raises(InputError, match="holds no checkpoint"),
    ):
        checkpoints.restore(manager, STATE)
