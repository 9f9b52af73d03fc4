import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from resnet_jax import InputError, Predictor, create_model, load_pretrained, to_torch
from resnet_jax.config import from_dict, to_dict
from resnet_jax.recipe_files import load_config
from resnet_jax.training.build import build_model
from resnet_jax.weights.export import export, save_tensors
from resnet_jax.weights.load import names_of_outputs, preprocessing_of
from resnet_jax.weights.sources import Weights, find_weights
from resnet_jax.weights.tags import all_tags, find_tag, tags_of

TAG = "test_resnet.r160_in1k"


@pytest.fixture(scope="module")
def tensors():
    model = create_model("test_resnet")
    variables = jax.jit(model.init)(jax.random.key(1), np.zeros((1, 32, 32, 3), np.float32))
    return to_torch(model, variables)


@pytest.fixture
def file(tmp_path, tensors):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, Weights(tensors), "safetensors")
    return path


def same(model, variables, tensors, apart=()):
    for key, tensor in to_torch(model, variables).items():
        if key not in apart:
            np.testing.assert_array_equal(tensor, tensors[key])


def test_every_tag_has_a_model_and_every_model_one_default():
    names = {tag.name for tag in all_tags().values()}
    assert len(all_tags()) > 170
    for name in names:
        create_model(name)
        assert [tag.default for tag in tags_of(name)].count(True) == 1
    assert find_tag("resnet50").tag == "resnet50.a1_in1k"
    tag = find_tag("resnet50.tv2_in1k").preprocessing
    assert (tag.image_size, tag.eval_image_size, tag.eval_crop, tag.interpolation) == (176, 224, 0.965, "bilinear")


def test_a_tag_comes_from_the_cache_of_the_hub_alone(tmp_path, tensors):
    snapshot = tmp_path / "hub" / f"models--timm--{TAG}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_tensors(snapshot / "model.safetensors", Weights(tensors), "safetensors")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    code = f"import resnet_jax as rj; m, v = rj.load_pretrained({TAG!r}, num_classes=0); print(m.num_classes, len(v))"
    result = run(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert result.stdout.split() == ["None", "2"], result.stderr


def test_without_network_and_cache_the_error_says_what_to_do(tmp_path):
    code = f"import resnet_jax as rj\ntry: rj.load_pretrained({TAG!r})\nexcept rj.InputError as error: print(error)"
    result = run(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert TAG in result.stdout and "give its path" in result.stdout


def test_a_hub_that_cannot_be_reached_is_not_waited_for(tmp_path):
    code = "import time, resnet_jax as rj\ntime.sleep = lambda seconds: print('waits')\n"
    code += f"try: rj.load_pretrained({TAG!r})\nexcept rj.InputError as error: print(error)"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        result = run(code, HF_HOME=str(tmp_path), HF_ENDPOINT=address)
    assert f"nor can it be fetched from {address} (Connect" in result.stdout and "waits" not in result.stdout, result


@pytest.fixture
def hub(tmp_path, file):
    """A small server that speaks as the hub does: its environment, and what it was asked for."""
    asked = []
    config = json.dumps({"architecture": "test_resnet", "num_classes": 1000}).encode()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def answer(self):
            asked.append((self.command, self.path))
            body = config if self.path.endswith("config.json") else file.read_bytes()
            self.send_response(200)
            for name, value in {"ETag": f'"{len(body)}"', "X-Repo-Commit": "1" * 40}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}, asked
    server.shutdown()
    server.server_close()


def test_a_tag_is_fetched_and_cached(hub):
    environment, asked = hub
    code = f"import resnet_jax as rj; m, v = rj.load_pretrained({TAG!r}); print(m.num_classes)"
    for first in (True, False):
        result = run(code, **environment)
        assert result.stdout.strip() == "1000", result.stderr
        line = rf"fetching model.safetensors of timm/{TAG} \([\d.]+ MB\) from {environment['HF_ENDPOINT']}\n"
        assert len(re.findall(line, result.stderr)) == first, result.stderr
    fetched = [path for command, path in asked if command == "GET" and TAG in path]
    assert fetched == [f"/timm/{TAG}/resolve/main/model.safetensors"]


def test_a_repository_of_the_hub_says_which_model_it_is(hub):
    environment, asked = hub
    code = "import resnet_jax as rj; m, v = rj.load_pretrained('hf-hub:someone/net'); print(m.stem_width)"
    result = run(code, **environment)
    assert result.stdout.strip() == "32", result.stderr
    assert ("GET", "/someone/net/resolve/main/config.json") in asked


def test_a_file_of_pytorch_without_torch_says_what_to_do(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"")
    code = "import sys; sys.modules['torch'] = None\nimport resnet_jax as rj\n"
    code += (
        f"try: rj.load_pretrained({str(tmp_path / 'weights.pth')!r}, 'resnet18')\nexcept rj.InputError as e: print(e)"
    )
    assert "install torch" in run(code).stdout


def run(code, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)


def test_a_file_with_the_head_swapped_and_grey_images(file, tensors, caplog):
    with caplog.at_level(logging.WARNING, "resnet_jax"):
        model, variables = load_pretrained(str(file), "test_resnet", num_classes=5, in_channels=1)
    assert "1000 classes, the model 5: its head is made anew" in caplog.text
    assert variables["params"]["head"]["kernel"].shape == (96, 5)
    same(model, variables, tensors, apart=("conv1.0.weight", "fc.weight", "fc.bias"))
    jax.eval_shape(model.apply, variables, np.zeros((1, 32, 32, 1), np.float32))
    model, variables = load_pretrained(str(file), "test_resnet")
    same(model, variables, tensors)


def test_a_folder_as_timm_writes_it(tmp_path, file, tensors):
    folder = tmp_path / "model"
    folder.mkdir()
    file.rename(folder / "model.safetensors")
    known = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "input_size": [3, 160, 160], "crop_pct": 0.95,
             "interpolation": "bicubic"}  # fmt: skip
    config = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": known}
    (folder / "config.json").write_text(json.dumps(config))
    model, variables = load_pretrained(str(folder))
    same(model, variables, tensors)
    preprocessing = find_weights(str(folder)).preprocessing
    assert preprocessing.mean == (0.5, 0.4, 0.3) and preprocessing.eval_image_size == 160
    others = {
        "vit_huge": json.dumps(config | {"architecture": "vit_huge"}),
        "must be an object": "[]",
        "None": "{}",
        "no JSON": "<html>",
    }
    for says, text in others.items():
        (folder / "config.json").write_text(text)
        with pytest.raises(InputError, match=says):
            load_pretrained(str(folder))


KNOWN = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "input_size": [3, 96, 128], "crop_pct": 0.95}


def described(folder, tensors, config):
    """A folder as timm writes it."""
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "model.safetensors", Weights(tensors), "safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": KNOWN} | config))
    return str(folder)


def test_what_a_configuration_leaves_out_is_as_in_the_default_tag(tmp_path, tensors):
    default = tags_of("test_resnet")[0].preprocessing
    look = find_weights(described(tmp_path / "a", tensors, {})).preprocessing
    assert look == replace(default, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), image_size=(96, 128),
                           eval_image_size=(96, 128), eval_crop=0.95)  # fmt: skip
    for known in (None, {}, {"mean": None, "std": None, "crop_pct": None, "interpolation": None}):
        weights = find_weights(described(tmp_path / "a", tensors, {"pretrained_cfg": known}))
        assert preprocessing_of(weights, "a") == default


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("mean", [3, [], ["a"], [float("nan")] * 3, [10**400] * 3, {}]),
        ("std", [0, [0, 0, 0], [-1, 1, 1], [float("nan")] * 3, [float("inf")] * 3]),
        ("(input|image)_size", [5, [3, 0, 0], [3, -1, 5], [3, 10**9, 10**9], [224, 224], "x", [3, 1.5, 1.5]]),
        ("(eval_crop|crop_pct)", [0, -1, 1.5, 100, "a", float("nan"), [1]]),
        ("interpolation", ["lanczos", "random", 3, []]),
        ("crop_mode", ["squash"]),
        ("the names of the classes", ["abc", [None, "a"], {"cat": 0}, {"-1": "a"}, 5]),
    ],
)
def test_impossible_preprocessing_and_names_are_refused(key, values, tmp_path, tensors):
    for value in values:
        fields = {"(input|image)_size": "input_size", "(eval_crop|crop_pct)": "crop_pct"}
        field = (fields | {"the names of the classes": "label_names"}).get(key, key)
        source = described(tmp_path / "a", tensors, {"pretrained_cfg": KNOWN | {field: value}})
        with pytest.raises(InputError, match=f"a: config.json: .*{key}"):
            find_weights(source)


@pytest.mark.parametrize("text", ["null", "[1]", "5", "", "[" * 100_000, "1" * 5000, '{"architecture": ["resnet18"]}',
                                  '{"architecture": "test_resnet", "pretrained_cfg": [1]}',
                                  '{"architecture": "test_resnet", "model_args": {"act_layer": "gelu"}}'])  # fmt: skip
def test_a_configuration_of_another_kind_is_refused(text, tmp_path, tensors):
    source = described(tmp_path / "a", tensors, {})
    (tmp_path / "a" / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        find_weights(source)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"label_names": ["a", "b"], "label_descriptions": {"a": "a letter"}}, ("a", "b", "class 2")),
        ({"label_names": {"0": "a", "2": "c"}}, ("a", "class 1", "c")),
        ({"id2label": {"0": "cat", "1": "dog", "2": "cow"}}, ("cat", "dog", "cow")),
        ({"label_names": []}, ("0", "1", "2")),
    ],
)
def test_names_of_classes_come_in_the_forms_of_timm_and_hugging_face(config, names, tmp_path, tensors):
    head = {"fc.weight": tensors["fc.weight"][:3], "fc.bias": tensors["fc.bias"][:3]}
    for where in (config, {"pretrained_cfg": KNOWN | config}):
        assert Predictor.from_source(described(tmp_path / "a", tensors | head, where)).class_names == names
    with pytest.raises(InputError, match="names 4 classes, and its head has 3 outputs"):
        Predictor.from_source(described(tmp_path / "a", tensors | head, {"label_names": list("abcd")}))


def test_names_of_one_output():
    assert names_of_outputs(1, None, "") == ("1",)
    assert names_of_outputs(1, ("cat", "dog"), "") == ("dog",)
    assert names_of_outputs(1, ("dog",), "") == ("dog",)


HEADER = {
    "name": "test_resnet",
    "fields": {"num_classes": 1000},
    "preprocessing": asdict(tags_of("test_resnet")[0].preprocessing),
    "class_names": None,
    "multilabel": False,
    "calibration": {"temperature": 1.0, "thresholds": None},
}


def test_a_damaged_header_of_an_exported_file_is_refused(tmp_path, tensors):
    file = tmp_path / "net.safetensors"
    bad = ["", "null", "[]", "{", "5", "{}"]
    bad += [json.dumps({k: v for k, v in HEADER.items() if k != key}) for key in HEADER]
    bad += [json.dumps(HEADER | {key: value}) for key in HEADER for value in (5, "abc", [1], {"a": 1}, float("nan"))
            if (key, value) != ("class_names", [1])]  # fmt: skip
    fields = ({"norm": "x"}, {"norm": "group"}, {"drop_rate": "a"}, {"in_channels": 0}, {"in_channels": 10**30},
              {"image_size": 0}, {"stage_sizes": [1]}, {"name": "x"}, {"output_stride": 7})  # fmt: skip
    bad += [json.dumps(HEADER | {"fields": values}) for values in fields]
    calibrations = ({"temperature": 0}, {"temperature": float("nan")}, {"thresholds": ["a"]}, {"thresholds": [0.5]})
    bad += [json.dumps(HEADER | {"calibration": HEADER["calibration"] | values}) for values in calibrations]
    for text in bad:
        save_file(tensors, file, metadata={"resnet_jax": text})
        with pytest.raises(InputError):
            Predictor.from_source(file)
    save_file(tensors, file, metadata={"resnet_jax": json.dumps(HEADER)})
    assert Predictor.from_source(file).preprocessing == tags_of("test_resnet")[0].preprocessing


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf-hub:a--b/c", "no name of a repository"),
        ("hf-hub:a/" + "b" * 300, "no name of a repository"),
        ("hf-hub:", "no name of a repository"),
        ("x" * 300, "name too long"),
        ("x" * 300 + ".pth", "name too long"),
        ("~nosuchuser/x", "no such home"),
        ("~nosuchuser/x.pth", "no such home"),
        ("/dev/null", "neither a file nor a folder"),
        ("nosuchthing", "`resnet-jax models` lists them"),
        ("s3://bucket/x.pth", "only gs://BUCKET/PATH is supported"),
    ],
)
def test_odd_sources_are_words(source, says, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=says):
        load_pretrained(source)


def test_a_pipe_is_not_waited_for(tmp_path, tensors):
    source = described(tmp_path / "a", tensors, {})
    for name in ("a/model.pth", "net.pth"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="neither a file nor a folder"):
        load_pretrained(str(tmp_path / "net.pth"), "test_resnet")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="neither a run nor a file of weights"):
        load_pretrained(source)


def test_an_exported_file_says_itself_what_it_is(tmp_path, file, tensors):
    export(str(file), tmp_path / "named.safetensors", "safetensors", "test_resnet")
    model, variables = load_pretrained(str(tmp_path / "named.safetensors"))
    same(model, variables, tensors)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("resnet50.tv3_in1k", "resnet50.tv2_in1k"),
        ("resnet5", "did you mean resnet"),
        ("nothing.safetensors", "no such file"),
        ("{tmp}/short.safetensors", "not a whole safetensors file"),
        ("{tmp}/text.safetensors", "not a whole safetensors file"),
        ("{tmp}/weights.safetensors", "give its name"),
        ("{tmp}", "neither a run nor a file of weights"),
    ],
)
def test_bad_sources_are_named(tmp_path, file, source, says):
    (tmp_path / "short.safetensors").write_bytes(file.read_bytes()[:-1000])
    (tmp_path / "text.safetensors").write_text("this is no file of weights")
    with pytest.raises(InputError, match=says):
        load_pretrained(source.format(tmp=tmp_path))


def test_weights_of_another_architecture_name_the_keys(file):
    with pytest.raises(InputError, match=r"missing: layer1.0.bn3[\s\S]*left over: conv1.3.weight[\s\S]*shape: "):
        load_pretrained(str(file), "resnet50", num_classes=1000)


def test_a_knob_that_the_model_does_not_have_is_refused(file):
    with pytest.raises(InputError, match="densenet121 has no field 'drop_path_rate'"):
        create_model("densenet121", drop_path_rate=0.1)


@pytest.mark.parametrize("source", ["hf-hub:../../etc/passwd", "hf-hub:a/../..", "hf-hub:/etc/x", "hf-hub:a/b/c"])
def test_a_repository_that_would_leave_its_folder_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(InputError, match="is no name of a repository"):
        load_pretrained(source)
    assert not list(tmp_path.iterdir())


def test_a_recipe_in_a_checkpoint_is_data():
    values = to_dict(load_config("digits_resnet20"))
    values["model"]["name"] = "__import__('os').abort()"
    assert from_dict(values).model.name == "__import__('os').abort()"
    with pytest.raises(InputError, match="no model is called"):
        build_model(from_dict(values), 10)
