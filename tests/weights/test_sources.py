"""Files of PyTorch as its users save them, beside the modules they come from: heads, prefixes, tensors of all kinds."""

import argparse
import contextlib
import functools
import json
import warnings
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from resnet_jax import InputError, Predictor, load_pretrained
from resnet_jax.cli import main
from resnet_jax.data.transforms import fit
from resnet_jax.predict import export_program

from .torch_twins import close, images_for, nchw, randomize, timm, torch

IMAGES = images_for(size=32)
CONV = "layer1.0.conv1.weight"


def module_with(head):
    """timm's smallest residual network with another head."""
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", num_classes=7)
    module.fc = head
    return randomize(module.eval())


@pytest.fixture(scope="module")
def net():
    return module_with(torch.nn.Linear(96, 7))


def save(file, values):
    """The file, written by torch or, if it is called so, by safetensors."""
    if file.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in values.items()}, file)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(values, file)
    return str(file)


def same_logits(source, module):
    model, variables = load_pretrained(source, "test_resnet")
    with torch.no_grad():
        expected = module(nchw(IMAGES))
    close(forward(model)(variables, IMAGES), expected, 1e-5, "logits")


@functools.cache
def forward(model):
    return jax.jit(model.apply)


HEADS = {
    "linear": torch.nn.Linear(96, 5),
    "no_bias": torch.nn.Linear(96, 5, bias=False),
    "dropout": torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(96, 5)),
    "nested": torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Linear(96, 5))),
    "one_logit": torch.nn.Linear(96, 1),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_one_linear_layer_gives_torchs_logits(name, tmp_path):
    module = module_with(HEADS[name])
    same_logits(save(tmp_path / "net.pth", module.state_dict()), module)


def several_layers(*layers):
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("head", "names"),
    [
        (
            several_layers(torch.nn.Linear(96, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5)),
            "fc.0.weight, fc.0.bias, fc.2.weight, fc.2.bias",
        ),
        (several_layers(torch.nn.BatchNorm1d(96), torch.nn.Linear(96, 5)), "fc.0.weight, fc.0.bias, .*fc.1.weight"),
        (torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(96, 5)), "fc.parametrizations.weight.original0"),
    ],
)
def test_another_head_is_refused_by_its_names_unless_it_is_not_wanted(head, names, tmp_path, caplog):
    source = save(tmp_path / "net.pth", module_with(head).state_dict())
    with pytest.raises(InputError, match=f"net.pth: the head is not one linear layer: .*{names}"):
        load_pretrained(source, "test_resnet")
    assert main(["export", source, str(tmp_path / "out.safetensors"), "--name", "test_resnet"]) == 2
    assert not (tmp_path / "out.safetensors").exists()
    assert "head" not in load_pretrained(source, "test_resnet", num_classes=0)[1]["params"]
    model, variables = load_pretrained(source, "test_resnet", num_classes=3)
    assert model.num_classes == 3 and variables["params"]["head"]["kernel"].shape == (96, 3)
    assert "its head is made anew" in caplog.text


def test_a_state_dict_without_a_head_loads_without_one(tmp_path):
    source = save(tmp_path / "net.pth", module_with(torch.nn.Identity()).state_dict())
    model, variables = load_pretrained(source, "test_resnet")
    assert model.num_classes is None and "head" not in variables["params"]


def prefixed(prefix, values):
    return {prefix + name: value for name, value in values.items()}


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.", "backbone.",
            "ema.module.", "model._orig_mod.module.", "_forward_module.model.module.")  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_prefixes_of_wrappers_go_in_any_order(prefix, form, net, tmp_path):
    same_logits(save(tmp_path / f"net.{form}", prefixed(prefix, net.state_dict())), net)


def test_what_torch_itself_wraps(net, tmp_path):
    average = torch.optim.swa_utils.AveragedModel(net)
    average.update_parameters(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = [torch.compile(module).state_dict() for module in (net, average)]
    assert "_orig_mod.n_averaged" in compiled[1]
    for i, values in enumerate((average.state_dict(), *compiled, prefixed("module.", compiled[1]))):
        same_logits(save(tmp_path / f"{i}.pth", values), net)


def test_checkpoints_of_training_scripts(net, tmp_path):
    state, other = net.state_dict(), timm.create_model("test_resnet", num_classes=7).state_dict()
    parameters = {name: torch.nn.Parameter(x) if x.is_floating_point() else x for name, x in state.items()}
    found = {
        "lightning.ckpt": {"epoch": 1, "state_dict": prefixed("model.", state), "hyper_parameters": {"lr": 0.1}},
        "torchvision.pth": {
            "model": other,
            "model_ema": prefixed("module.", state),
            "args": argparse.Namespace(lr=0.1),
        },
        "timm.pth.tar": {"epoch": 1, "arch": "x", "state_dict": other, "state_dict_ema": state},
        "deepspeed.pt": {"module": state},
        "parameters.pth": parameters,
    }
    for name, values in found.items():
        same_logits(save(tmp_path / name, values), net)


def test_a_head_beside_the_network(net, tmp_path):
    """As in `self.backbone = create_model(..., num_classes=0); self.head = Linear(...)`."""
    values = prefixed("model.backbone.", {k: v for k, v in net.state_dict().items() if not k.startswith("fc.")})
    same_logits(save(tmp_path / "a.pth", values | prefixed("model.head.", net.fc.state_dict())), net)
    same_logits(save(tmp_path / "b.pth", values | prefixed("classifier.1.", net.fc.state_dict())), net)


def test_tensors_of_others_are_named(net, tmp_path):
    state = net.state_dict()
    found = {
        "left over: criterion.weight": prefixed("model.", state) | {"criterion.weight": torch.ones(7)},
        "left over: extra.count\n.*left over: extra.mask": state
        | {"extra.mask": torch.zeros(3, dtype=torch.bool), "extra.count": torch.zeros(1, dtype=torch.int32)},
        "several networks, under 'student.', 'teacher.'": prefixed("student.", state) | prefixed("teacher.", state),
        "missing: ": {(f"module.{k}" if i % 2 else k): v for i, (k, v) in enumerate(state.items())},
    }
    for i, (says, values) in enumerate(found.items()):
        for form in ("pth", "safetensors"):
            with pytest.raises(InputError, match=says):
                load_pretrained(
                    save(tmp_path / f"{i}.{form}", {k: v.clone() for k, v in values.items()}), "test_resnet"
                )


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            lambda net: {"my_net": net.state_dict(), "epoch": 3},
            r"no state dict.*'my_net' \(OrderedDict\), 'epoch' \(int\)",
        ),
        (lambda net: net, r"holds more than tensors \(timm.models.resnet.ResNet\) and was refused"),
        (lambda net: {}, "no state dict"),
        (lambda net: {1: torch.zeros(2)}, r"no state dict.*1 \(Tensor\)"),
        (lambda net: [torch.zeros(2)], "of type list, and no state dict"),
        (lambda net: {name: x.numpy() for name, x in net.state_dict().items()}, "holds more than tensors"),
    ],
)
def test_what_holds_no_state_dict_is_refused_by_what_it_holds(values, says, net, tmp_path):
    with pytest.raises(InputError, match=says):
        load_pretrained(save(tmp_path / "net.pth", values(net)), "test_resnet")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "is quantised"),
        (lambda x: x.to_sparse(), "is not dense"),
        (lambda x: x.to("meta"), "is on the meta device"),
        (lambda x: x.to(torch.complex64), "is complex"),
        (lambda x: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "is nested"),
        (lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda x: x.to(torch.int8), "type: layer1.0.conv1.weight is int8"),
        (lambda x: x * float("nan"), "layer1.0.conv1.weight: .* values are nan or infinite"),
        (lambda x: x.double() * 1e300, "layer1.0.conv1.weight: .* values are nan or infinite in float32"),
        (lambda x: torch.zeros(()), r"shape: layer1.0.conv1.weight is \[\]"),
    ],
)
def test_tensors_without_plain_numbers_are_named(change, says, net, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = net.state_dict() | {CONV: change(net.state_dict()[CONV])}
    source = save(tmp_path / "net.pth", values)
    with pytest.raises(InputError, match=says) as error:
        load_pretrained(source, "test_resnet")
    assert CONV in str(error.value) and source in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_types_of_safetensors_become_float32(dtype, net, tmp_path):
    values = {name: x.to(dtype) if x.is_floating_point() else x for name, x in net.state_dict().items()}
    _, variables = load_pretrained(save(tmp_path / "net.safetensors", values), "test_resnet")
    kernel = variables["params"]["stage1"]["block1"]["conv1"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, values[CONV].float().numpy().transpose(2, 3, 1, 0))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2, torch.float8_e8m0fnu, torch.complex64, torch.bool])
def test_types_of_safetensors_that_are_no_weights_are_named(dtype, net, tmp_path):
    source = save(tmp_path / "net.safetensors", net.state_dict() | {CONV: net.state_dict()[CONV].to(dtype)})
    with pytest.raises(InputError, match=f"{CONV} is "):
        load_pretrained(source, "test_resnet")


def test_a_negative_variance_is_named(net, tmp_path):
    values = net.state_dict() | {"bn1.running_var": -net.state_dict()["bn1.running_var"]}
    with pytest.raises(InputError, match=r"bn1.running_var holds negative variances"):
        load_pretrained(save(tmp_path / "net.pth", values), "test_resnet")


def test_no_file_ends_in_a_traceback(net, tmp_path):
    """Empty, cut, flipped, text, archives and folders, under every suffix."""
    whole = {
        "new": save(tmp_path / "new.pth", net.state_dict()),
        "safe": save(tmp_path / "safe.safetensors", net.state_dict()),
    }
    torch.save(net.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    whole["old"] = str(tmp_path / "old.pth")
    contents = [
        b"",
        b"PK",
        b"{}",
        b"<!DOCTYPE html>\n" * 20,
        b"hello\n" * 20,
        b"version https://git-lfs.github.com/spec/v1\n",
    ]
    rng = np.random.default_rng(0)
    for name in whole:
        data = (tmp_path / whole[name]).read_bytes()
        contents += [data[:n] for n in (1, 9, 100, 5000, len(data) // 2, len(data) - 20)]
        for _ in range(5):
            flipped = bytearray(data)
            flipped[int(rng.integers(0, 200))] ^= 255
            contents.append(bytes(flipped))
    for suffix in ("pth", "safetensors", "bin"):
        for content in contents:
            file = tmp_path / f"bad.{suffix}"
            file.write_bytes(content)
            with contextlib.suppress(InputError):
                load_pretrained(str(file), "test_resnet")
        (tmp_path / f"folder.{suffix}").mkdir()
        with pytest.raises(InputError, match="neither a run nor a file"):
            load_pretrained(str(tmp_path / f"folder.{suffix}"), "test_resnet")


def test_nan_weights_are_refused_by_every_command(net, tmp_path, capsys):
    source = save(tmp_path / "net.pth", net.state_dict() | {"fc.bias": torch.full((7,), float("nan"))})
    for command in (["predict", source, __file__], ["export", source, str(tmp_path / "o.pth")],
                    ["export", source, str(tmp_path / "o.stablehlo")]):  # fmt: skip
        assert main([*command, "--name", "test_resnet"]) == 2
        assert "fc.bias: 7 of 7 values are nan or infinite" in capsys.readouterr().err
    assert not list(tmp_path.glob("o.*"))


def test_one_logit_is_a_sigmoid_in_predict_and_in_programs(tmp_path, capsys, monkeypatch):
    module = module_with(torch.nn.Linear(96, 1))
    save(tmp_path / "net.pth", module.state_dict())
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet", "input_size": [3, 32, 32], "crop_pct": 1}')
    source = str(tmp_path)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(3)]
    predictor = Predictor.from_source(source)
    look = predictor.preprocessing
    pixels = np.stack([fit(x, look.eval_image_size, look.eval_crop, look.interpolation) for x in pictures])
    normal = (pixels / 255.0 - np.asarray(look.mean)) / np.asarray(look.std)
    with torch.no_grad():
        expected = torch.sigmoid(module(nchw(normal.astype(np.float32)))).numpy()
    assert np.ptp(expected) > 1e-4
    found = predictor(pictures)
    assert predictor.class_names == ("1",)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    assert main(["predict", source, str(tmp_path / "a.png"), "--format", "json"]) == 0
    (metadata,) = json.loads(capsys.readouterr().out)["classes"]
    assert metadata["name"] == "1" and metadata["probability"] == pytest.approx(expected[0, 0], abs=1e-5)
    monkeypatch.setattr(export_program, "CHECKED", 36)
    export_program.export_program(source, tmp_path / "net.stablehlo", "stablehlo")
    with zipfile.ZipFile(tmp_path / "net.stablehlo") as archive:
        program = jax.export.deserialize(bytearray(archive.read("program")))
    np.testing.assert_allclose(program.call(pixels), expected, atol=1e-5)
