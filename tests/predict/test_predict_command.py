"""From a run's folder to answers about pictures: in Python, from the shell, and where the network looked."""

import csv
import dataclasses
import json
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import resnet_jax as rj
from resnet_jax.cli import main
from resnet_jax.config import Config, DataConfig, InputError, TrainConfig
from resnet_jax.data.transforms import fit
from resnet_jax.predict.predictor import Predictor, find_files, predict_files
from resnet_jax.predict.write_predictions import draw_cam
from resnet_jax.recipe_files import recorded_recipe
from resnet_jax.weights.export import save_tensors
from resnet_jax.weights.sources import find_weights

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of dark and light pictures of odd sizes, and a run on them."""
    place = tmp_path_factory.mktemp("predict")
    for name, level in (("dark", 0), ("light", 170)):
        folder = place / "data" / name
        folder.mkdir(parents=True)
        for i in range(20):
            pixels = level + RNG.integers(0, 80, (14 + i, 18, 3), dtype=np.uint8)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
    base = Config()
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, name="cifar_resnet8"),
        data=DataConfig(dataset=f"folder:{place / 'data'}", image_size=12, mean=(0.305,) * 3, std=(0.376,) * 3),
        augment=dataclasses.replace(base.augment, eval_crop=0.9),
        train=TrainConfig(steps=40, batch_size=8, ema_decay=0.8, eval_every_epochs=99.0),
        schedule=dataclasses.replace(base.schedule, warmup_epochs=1.0),
        parallel=dataclasses.replace(base.parallel, devices=1),
    )
    summary = rj.train(config, place / "run")
    assert summary["ema/validation"]["accuracy"] == 1.0
    return place


def test_probabilities_are_those_of_the_module_on_the_pictures_of_the_evaluation(run):
    predictor = rj.Predictor.from_run(run / "run")
    files = sorted((run / "data").rglob("*.png"))
    images = np.stack([fit(str(path), 12, 0.9) for path in files])
    data = recorded_recipe(run / "run").data
    normal = (images / 255.0 - np.asarray(data.mean)) / np.asarray(data.std)
    model, variables = rj.load_pretrained(str(run / "run"))
    expected = jax.nn.softmax(jax.jit(model.apply)(variables, jnp.asarray(normal, jnp.float32)))
    found = predictor(files, batch=7)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [predictor.class_names[i] for i in found.argmax(1)] == [path.parent.name for path in files]
    kinds = [Image.open(files[0]), files[0].read_bytes(), np.asarray(Image.open(files[0]))]
    np.testing.assert_allclose(predictor(kinds), np.repeat(expected[:1], 3, 0), atol=1e-5)
    assert predictor([]).shape == (0, 2)
    for one in (str(files[0]), files[0], *kinds):  # the rows of an array would be taken for pictures of one channel
        with pytest.raises(InputError, match=r"predictor\(\[picture\]\)"):
            predictor(one)


def test_files_stream_through_in_order_a_few_batches_ahead(run):
    predictor = Predictor.from_run(run / "run")
    files, asked = sorted((run / "data").rglob("*.png")) * 5, []
    stream = predict_files(predictor, (asked.append(path) or path for path in files), batch=8)
    first = next(stream)
    assert len(asked) == 16 and first[0] == files[0]
    rest = list(stream)
    assert [path for path, _, _ in (first, *rest)] == files
    np.testing.assert_allclose([row for _, row, _ in (first, *rest)], predictor(files), atol=1e-6)


def test_the_command_answers_and_lists_what_it_cannot_read(run, capsys, tmp_path):
    (tmp_path / "broken.jpg").write_text("no picture")
    dark, light = run / "data" / "dark" / "01.png", run / "data" / "light"
    words = [str(dark), str(tmp_path), f"{light}/0*.png"]
    command = ["predict", str(run / "run"), *words, "--top", "2", "--cam", str(tmp_path / "cams")]
    assert main([*command, "--format", "json"]) == 1
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["path"] for row in rows] == [str(dark), *(str(p) for p in sorted(light.glob("0*.png")))]
    assert [row["classes"][0]["name"] for row in rows] == ["dark"] + ["light"] * 10
    assert all(abs(sum(c["probability"] for c in row["classes"]) - 1) < 1e-5 for row in rows)
    assert "broken.jpg cannot be decoded (UnidentifiedImageError" in err
    cams = sorted((tmp_path / "cams").iterdir())
    with Image.open(cams[0]) as cam, Image.open(dark) as picture:
        assert len(cams) == 11 and cam.width == 2 * 18 * 11 + 8  # twice the picture of 18 x 15, enlarged
        first, second = (np.asarray(cam)[:165, left : left + 198] for left in (0, 206))
        np.testing.assert_array_equal(first, np.asarray(picture).repeat(11, 0).repeat(11, 1))
        assert not np.array_equal(second, first)
    assert main(["predict", str(run / "run"), str(dark), "--format", "csv"]) == 0
    table = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert table[0] == ["path", "rank", "class", "probability"] and table[1][:3] == [str(dark), "1", "dark"]
    assert main(["predict", str(run / "run"), str(dark)]) == 0
    assert capsys.readouterr().out.split()[:2] == [str(dark), "dark"]


@pytest.mark.parametrize("evidence", [0.0, 1.0])
def test_a_map_comes_with_class_and_probability_and_says_where_there_is_no_evidence(
    run, evidence, tmp_path, monkeypatch
):
    heat = np.zeros((1, 3, 3), np.float32)
    heat[:, 1, 1] = evidence
    monkeypatch.setattr("resnet_jax.predict.gradcam.grad_cam", lambda *a: heat)
    told = []
    monkeypatch.setattr("resnet_jax.data.show.side_by_side", lambda a, b, lines: told.extend(lines) or b)
    picture = run / "data" / "light" / "03.png"
    draw_cam(Predictor.from_run(run / "run"), picture, 1, 0.934, tmp_path / "cam.png")
    assert told[0] == "light 93.4 %" and told[-1] == "frame: what the network sees"
    assert ("no evidence, nothing in the picture speaks for light" in "".join(told)) == (evidence == 0)
    with Image.open(tmp_path / "cam.png") as cam:
        assert cam.size == (18 * 10, 17 * 10)


def test_probabilities_that_are_not_finite_are_an_error_and_never_written(run, capsys):
    """Of weights that are finite and too large."""
    weights = find_weights(str(run / "run"))
    large = weights.tensors | {"fc.weight": np.full_like(weights.tensors["fc.weight"], 3e38)}
    save_tensors(run / "large.safetensors", dataclasses.replace(weights, tensors=large), "safetensors")
    files = sorted((run / "data").rglob("*.png"))[:3]
    with pytest.raises(rj.InputError, match="image 0 has probabilities that are not finite, one of 3"):
        Predictor.from_source(run / "large.safetensors")(files)
    assert main(["predict", str(run / "large.safetensors"), *map(str, files), "--format", "json"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("not finite") == 3


def test_outputs_without_a_name_get_one(run):
    weights = find_weights(str(run / "run"))
    weights = dataclasses.replace(weights, class_names=weights.class_names[:1])
    save_tensors(run / "one.safetensors", weights, "safetensors")
    predictor = Predictor.from_source(run / "one.safetensors")
    assert predictor.class_names == ("dark", "class 1") and predictor([]).shape == (0, 2)


def test_only_regular_files_are_opened(run, capsys, tmp_path):
    pipe, good = tmp_path / "pipe.png", run / "data" / "dark" / "01.png"
    os.mkfifo(pipe)
    release = threading.Timer(20, lambda: os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)))  # whoever waits for it
    release.start()
    command = ["predict", str(run / "run"), str(pipe), "/dev/zero", str(good), "--format", "json"]
    assert main(command) == 1 and release.is_alive()
    release.cancel()
    out, err = capsys.readouterr()
    assert [json.loads(line)["path"] for line in out.splitlines()] == [str(good)]
    for name in (pipe, "/dev/zero"):
        assert f"{name} cannot be decoded (it is no regular file)" in err


def test_the_home_of_nobody_is_named():
    with pytest.raises(rj.InputError, match="no such home"):
        list(find_files(["~nosuchuser/*.png"]))


def test_what_names_nothing_is_refused(run, capsys, tmp_path):
    assert main(["predict", str(run / "run"), "/no/such*.png"]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert main(["predict", str(tmp_path), str(run / "data")]) == 2
    assert list(find_files([str(run / "data")])) == sorted((run / "data").rglob("*.png"))


@pytest.mark.parametrize("stage", [None, "stage2"])
def test_grad_cam_is_that_of_torch(stage):
    """By hand with torch's autograd, on timm's network with the same weights."""
    from ..weights.torch_twins import timm, torch

    model = rj.create_model("test_resnet", num_classes=7)
    images = jnp.asarray(RNG.normal(size=(3, 64, 96, 3)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    twin = timm.create_model("test_resnet", num_classes=7).eval()
    twin.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in rj.to_torch(model, variables).items()})
    kept = []
    layer = getattr(twin, f"layer{(stage or 'stage4')[-1]}")

    def keep(module, given, out):
        out.retain_grad()
        kept.append(out)

    layer.register_forward_hook(keep)
    classes = np.asarray([2, 0, 6])
    logits = twin(torch.from_numpy(np.asarray(images).transpose(0, 3, 1, 2).copy()))
    logits[torch.arange(3), torch.from_numpy(classes)].sum().backward()
    cam = torch.relu((kept[0].grad.mean((2, 3), keepdim=True) * kept[0]).sum(1)).detach().numpy()
    strongest = cam.max((1, 2), keepdims=True)
    expected = np.divide(cam, strongest, out=np.zeros_like(cam), where=strongest > 0)
    found = jax.jit(lambda v, x: rj.grad_cam(model, v, x, jnp.asarray(classes), stage))(variables, images)
    assert found.max() == 1.0
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["densenet121", "googlenet", "resnetv2_50", "seresnext26d_32x4d"])
def test_grad_cam_works_on_every_family(name):
    model = rj.create_model(name, num_classes=3, **({} if name == "googlenet" else {"stage_sizes": (2, 1, 1, 1)}))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))

    def cam(variables):
        return rj.grad_cam(model, variables, jnp.zeros((2, 64, 64, 3)), jnp.asarray([0, 2]), "stage3")

    assert jax.eval_shape(cam, shapes).shape[0] == 2
    with pytest.raises(ValueError, match=r"no stage 'stage9'; choose one of stage1, stage2, stage3"):
        jax.eval_shape(lambda v: rj.grad_cam(model, v, jnp.zeros((1, 64, 64, 3)), jnp.asarray([0]), "stage9"), shapes)
