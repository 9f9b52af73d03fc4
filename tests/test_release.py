"""What pip, the index and GitHub read: dependencies, extras, versions, workflows."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
import yaml

import resnet_jax
from resnet_jax.typed import DISTRIBUTION, InputError, from_extra

from .conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOR_USERS = {name: wanted for name, wanted in EXTRAS.items() if name not in ("test", "docs", "dev")}
THROUGH = {"scipy": "jax", "absl": "grain", "pyarrow": "datasets", "fsspec": "gcsfs", "onnx": "jax2onnx"}
"""Modules that come with a package which says that it needs them."""


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0]


def key(name):
    return re.sub("[-_.]+", "-", name).lower()


def third_party(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names or [alias.name for alias in getattr(node, "names", ()) if isinstance(node, ast.Import)]:
            if (top := name.partition(".")[0]) not in sys.stdlib_module_names | {"resnet_jax"}:
                yield top


def test_every_import_is_of_a_dependency_or_an_extra():
    named = {key(name_of(r)) for r in sum(FOR_USERS.values(), PROJECT["dependencies"])}
    distributions = packages_distributions()
    imported = {top for path in (ROOT / "resnet_jax").rglob("*.py") for top in third_party(path)}
    assert {"jax", "tyro", "safetensors"} < imported
    for top in imported - {"onnxruntime"}:  # with which an exported file is compared, where it is installed
        names = {key(name) for name in [THROUGH.get(top, top), *distributions.get(top, [])]}
        assert names & named, f"{top} is imported, and nothing in pyproject.toml brings it"


def listed(names):
    return {name for some in names for name in some.split(",")}


def test_every_extra_that_is_named_exists():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.yml"), *ROOT.glob(".ci/*")]
    text = "".join(path.read_text() for path in [*pages, ROOT / "pyproject.toml", ROOT / "Dockerfile"])
    named = listed("".join(pair) for pair in re.findall(rf"(?:\.|{DISTRIBUTION})\[([\w,]+)\]|EXTRAS=([\w,]+)", text))
    code = "".join(path.read_text() for path in (ROOT / "resnet_jax").rglob("*.py"))
    asked = set(re.findall(r'from_extra\("(\w+)"', code)) | set(re.findall(r"DISTRIBUTION\}\[(\w+)\]", code))
    assert {"train", "hub", "tfds", "gcs", "fast"} <= asked and {"test", "all", "cuda13"} <= named
    assert named | asked <= set(EXTRAS)
    apart = {"all", "cuda12", "cuda13", "tpu", "parity", "onnx", "report"}  # report comes with train
    assert EXTRAS["all"] == [f"{DISTRIBUTION}[{','.join(name for name in FOR_USERS if name not in apart)}]"]


def test_the_floors_are_those_of_the_project():
    printed = subprocess.check_output([sys.executable, ROOT / ".ci" / "floors"], text=True).split()
    floors = dict(line.split("==") for line in printed)
    for requirement in sum(FOR_USERS.values(), PROJECT["dependencies"]):
        name = name_of(requirement)
        if (
            name not in (DISTRIBUTION, "importlib_resources")
            and "[cuda" not in requirement
            and "[tpu" not in requirement
        ):
            assert f">={floors.pop(name)}" in requirement
    assert not floors


def test_the_version_and_its_date_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changelog = (ROOT / "CHANGELOG.md").read_text()
    version, date = re.findall(r"^## \[(\d[\d.]*)\] - (\S+)$", changelog, re.M)[0]
    assert (citation["version"], str(citation["date-released"])) == (version, date)
    assert resnet_jax.__version__ == version and changelog.index("## [Unreleased]") < changelog.index(f"## [{version}]")


def test_workflows_run_what_is_run_here():
    """A command stands in README.md or in .ci/, once."""
    workflows = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    jobs = {name: job for workflow in workflows for name, job in workflow["jobs"].items()}
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    for command in commands:
        if command != 'pip install -e ".[test]" && pytest' and not re.fullmatch(r'pip install -e "\.\[\w+\]"', command):
            script = re.fullmatch(r"bash (\.ci/\w+)[ \w.]*", command)
            assert script and (ROOT / script[1]).is_file(), command
    pythons = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == pythons and pythons[0] == PROJECT["requires-python"][2:]
    here = re.findall(r"^bash (\.ci/.*)$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert {".ci/lint", ".ci/leg 3.11 oldest", ".ci/leg 3.13 newest"} <= set(here) <= {c[5:] for c in commands}


@pytest.mark.parametrize("name", ["tests_of_versions", "tests_of_extras"])
def test_what_a_leg_runs_is_there(name):
    lines = (ROOT / ".ci" / name).read_text().splitlines()[1:]
    assert lines
    for path, _, test in (line.partition("::") for line in lines):
        assert f"def {test or 'test_'}" in (ROOT / path).read_text(), (path, test)


def test_a_python_that_is_not_there_is_left_out_with_a_word():
    done = subprocess.run(["bash", ROOT / ".ci" / "leg", "3.2", "newest"], capture_output=True, text=True, check=True)
    assert done.stdout == "ci: there is no Python 3.2 here: its tests (newest) are left out\n"


def test_what_is_missing_is_named_with_what_to_install():
    remedy = r'^the lab needs the package nowhere: pip install "residual-jax\[train\]"$'
    with pytest.raises(InputError, match=remedy), from_extra("train", "the lab"):
        import nowhere.inside  # noqa: F401
    with pytest.raises(ImportError, match="no_such_name"), from_extra("train", "the lab"):
        from resnet_jax.config import no_such_name  # noqa: F401
    with pytest.raises(ZeroDivisionError), from_extra("train", "the lab"):
        _ = 1 / 0


CORE = """
import sys
BLOCKED = set(sys.argv[1].split())

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import jax, optax
import resnet_jax as rj
from resnet_jax.cli import main
from resnet_jax.models.blocks import ResidualBlock

model, tx = rj.create_model("cifar_resnet8", num_classes=10), optax.sgd(0.1)
state = rj.create_state(model, tx, jax.random.key(0), image_shape=(8, 8, 3))
batch = {"image": jax.numpy.zeros((2, 8, 8, 3)), "label": jax.numpy.arange(2)}
state, sums = jax.jit(rj.make_train_step(model, tx))(state, batch)
assert rj.means(sums)["count"] == 2 and state.step == 1
for ask in (
    lambda: rj.train,
    lambda: rj.load_pretrained("resnet18.tv_in1k"),
    lambda: rj.load_pretrained(sys.argv[2]),
    lambda: rj.WandbHook(),
):
    try:
        ask()
    except rj.InputError as error:
        print(error)
print(main(["train"]))
"""


def test_the_core_trains_and_the_rest_says_what_it_needs(tmp_path):
    light = {"jax", "flax", "optax", "numpy", "scipy", "absl", "orbax", "rich", "etils", "fsspec"}  # with Flax's own
    blocked = {top for path in (ROOT / "resnet_jax").rglob("*.py") for top in third_party(path)} - light
    (tmp_path / "net.safetensors").write_bytes(b"")
    program = [sys.executable, "-c", CORE, " ".join(blocked), tmp_path / "net.safetensors"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    install = rf'pip install "{DISTRIBUTION}'
    assert done.stdout.splitlines() == [
        f'resnet_jax.train needs the package PIL: {install}[train]"',
        f'fetching model.safetensors of timm/resnet18.tv_in1k needs the package huggingface_hub: {install}[hub]"',
        f'reading {tmp_path}/net.safetensors needs the package safetensors: {install}[hub]"',
        f'WandbHook needs the package wandb: {install}[wandb]"',
        "2",
    ]
    assert done.stderr == f'error: resnet-jax needs the package tyro: {install}[train]"\n'
