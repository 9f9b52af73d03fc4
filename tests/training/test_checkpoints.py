import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import resnet_jax
from resnet_jax.cli import main
from resnet_jax.config import Config, InputError, LogConfig, ModelConfig, ParallelConfig, ScheduleConfig, TrainConfig
from resnet_jax.training.checkpoints import Checkpoints, leaves_of, read_checkpoint
from resnet_jax.training.loop import train
from resnet_jax.training.manifest import MANIFEST, damage, steps_in

from ..conftest import ROOT

pytestmark = pytest.mark.xdist_group("checkpoints")  # one process makes what they share

STATE = {"params": jnp.arange(600.0)}


def state_like(record):
    return STATE


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


def test_a_state_comes_back_with_its_record_and_without_a_word(tmp_path, caplog):
    save_all(tmp_path, {1: 0.9, 2: 0.5})
    for step in (1, 2):
        state, record = read_checkpoint(tmp_path, state_like, str(step))
        np.testing.assert_array_equal(state["params"], STATE["params"] * step)
        assert record == {"step": step}
    assert read_checkpoint(tmp_path, state_like)[1] == {"step": 2}
    assert not caplog.records


def restored_step(folder):
    """What a run that goes on in a folder begins with."""
    with Checkpoints(folder, 9) as checkpoints:
        found = checkpoints.restore(state_like)
    return found and found[2]


def test_no_checkpoint_is_said(tmp_path):
    assert restored_step(tmp_path) is None
    with pytest.raises(InputError, match="holds no checkpoint; the run has not written one yet"):
        read_checkpoint(tmp_path, state_like)


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size > 1]


def truncate(folder, rng):
    path = rng.choice([path for path in files_of(folder) if path != folder / "commit_success.txt"])
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(folder, rng):
    path = folder / rng.choice([MANIFEST, *json.loads((folder / MANIFEST).read_text())])
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
            read_checkpoint(tmp_path, state_like, "2")
    assert read_checkpoint(tmp_path, state_like)[1] == {"step": 1}
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
        state, record, step = checkpoints.restore(state_like)
        assert (record, step) == ({"step": 1}, 1)
        checkpoints.save(2, state, {"again": True})
    assert steps_in(tmp_path / "checkpoints") == [2, 1] and damage(tmp_path / "checkpoints" / "2") is None
    assert read_checkpoint(tmp_path, state_like)[1] == {"again": True}


def test_any_flipped_byte_is_found_or_changes_nothing(tmp_path):
    save_all(tmp_path, {3: None})
    folder, rng = tmp_path / "checkpoints" / "3", np.random.default_rng(0)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    unseen = 0
    for i in range(200):
        path = files[i % len(files)]
        whole = path.read_bytes()
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        if damage(folder) is None:
            unseen += 1
            state, record = read_checkpoint(tmp_path, state_like)
            assert record == {"step": 3}
            np.testing.assert_array_equal(state["params"], STATE["params"] * 3)
        path.write_bytes(whole)
    assert unseen < 200 * 3 / len(files)  # what Orbax writes after the manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two devices with a moving average."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = Config(
        model=ModelConfig(name="cifar_resnet8"),
        train=TrainConfig(steps=3, batch_size=32, ema_decay=0.9, metric="none"),
        schedule=ScheduleConfig(warmup_epochs=0.0),
        parallel=ParallelConfig(devices=2),
        log=LogConfig(tensorboard=False, report=False),
    )
    train(config, folder)
    return folder


STOCK = """
import json, sys
sys.modules["resnet_jax"] = None  # cannot be imported
import jax, numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental import v1
run, step, file = sys.argv[1:]
path = f"{run}/checkpoints/{step}/state"

def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}

tree = ocp.StandardCheckpointer().restore(path)
whole = flat(tree)
assert type(tree) is dict and set(tree) == {"step", "params", "batch_stats", "opt_state", "ema"}

manager = ocp.CheckpointManager(f"{run}/checkpoints")
assert manager.latest_step() == int(step)
managed = flat(manager.restore(int(step))["state"])

mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
part = {"head": {"bias": tree["params"]["head"]["bias"], "kernel": tree["params"]["head"]["kernel"]}}
here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), {"params": part})
wanted["params"]["head"]["kernel"] = jax.ShapeDtypeStruct((64, 10), np.float32, sharding=split)
args = ocp.args.PyTreeRestore(
    wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
)
partial = ocp.PyTreeCheckpointer().restore(path, args)
assert set(partial) == {"params"} and set(partial["params"]) == {"head"}
assert partial["params"]["head"]["kernel"].sharding == split

newer = v1.load_checkpointables(f"{run}/checkpoints/{step}")
assert newer["record"]["recipe"]["model"]["name"] == "cifar_resnet8"
for other in (managed, flat(newer["state"]), flat(partial)):
    for name, values in other.items():
        np.testing.assert_array_equal(values, whole[name])
np.savez(file, **whole)
"""


def test_stock_orbax_opens_a_run_where_this_package_is_not(run, tmp_path):
    file = tmp_path / "arrays.npz"
    command = [sys.executable, "-W", "ignore", "-c", STOCK, str(run), "3", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    state, step = resnet_jax.restore(run)
    ours = leaves_of(state)
    with np.load(file) as theirs:
        assert step == 3 and set(theirs.files) == set(ours)
        for name, values in ours.items():
            assert theirs[name].dtype == values.dtype
            np.testing.assert_array_equal(theirs[name], values)


PAGE = ROOT / "docs" / "checkpoints.md"


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_the_page_on_checkpoints_opens_a_run_with_orbax(run):
    blocks = PAGE.read_text().split("```python\n")
    code = next(block.partition("```")[0] for block in blocks if "ocp.CheckpointManager(" in block)
    assert len(code.strip().splitlines()) <= 5
    names = {}
    exec(code.replace("/absolute/path/of/runs/b", str(run)), names)
    state, _ = resnet_jax.restore(run)
    np.testing.assert_array_equal(names["kernel"], state.params["stem"]["conv"]["kernel"])
    elsewhere = next(block.partition("```")[0] for block in blocks if "fallback_sharding" in block)
    exec(elsewhere.replace("/absolute/path/of/runs/b", str(run)), names)  # below it on the page
    np.testing.assert_array_equal(names["tree"]["params"]["stem"]["conv"]["kernel"], names["kernel"])


def test_the_page_opens_a_run_of_two_devices_on_one_without_a_warning(run, tmp_path):
    blocks = [block.partition("```")[0] for block in PAGE.read_text().split("```python\n")]
    (elsewhere,) = [block for block in blocks if "fallback_sharding" in block]
    code = "\n".join(["import orbax.checkpoint as ocp", elsewhere, 'kernel = tree["params"]["stem"]["conv"]["kernel"]'])
    code += f"\nimport numpy\nnumpy.save({str(tmp_path / 'kernel.npy')!r}, kernel)\nassert len(jax.devices()) == 1"
    command = [sys.executable, "-c", code.replace("/absolute/path/of/runs/b", str(run))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"XLA_FLAGS": ""})
    assert done.returncode == 0 and "WARNING" not in done.stderr and "Warning" not in done.stderr, done.stderr
    state, _ = resnet_jax.restore(run)
    np.testing.assert_array_equal(np.load(tmp_path / "kernel.npy"), state.params["stem"]["conv"]["kernel"])


def test_weights_are_exported_for_orbax_alone(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "weights"), "--format", "orbax"]) == 0
    found = ocp.StandardCheckpointer().restore(tmp_path / "weights")
    state, _ = resnet_jax.restore(run)
    assert set(found) == {"params", "batch_stats"}
    jax.tree.map(np.testing.assert_array_equal, found, dict(state.ema))
    assert main(["export", str(run), str(tmp_path / "weights"), "--format", "orbax"]) == 2  # something is there


def test_a_state_of_another_model_is_compared_with_it(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    recipe = json.loads((run / "config.json").read_text())
    recipe["model"] |= {"name": "cifar_resnet14", "num_classes": 12}
    (tmp_path / "run" / "config.json").write_text(json.dumps(recipe))
    with pytest.raises(InputError) as error:
        resnet_jax.restore(tmp_path / "run")
    words = str(error.value)
    assert "it has no params/stage1/block2/conv1/kernel (but params/stage1/block1/conv1/kernel" in words
    assert "params/head/bias is (10,) there, and (12,) in the model" in words


def test_another_programs_checkpoints_are_named_and_left_alone(tmp_path):
    folder = tmp_path / "checkpoints" / "5"
    folder.mkdir(parents=True)
    (folder / "commit_success.txt").write_text("")
    with pytest.raises(InputError, match="another program's"):
        restored_step(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["commit_success.txt"]
