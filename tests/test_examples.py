"""The examples run, and learn what they are about."""

import re
import subprocess
import sys

import pytest

from .conftest import ROOT

LEARNT = {
    "own_module": (r"test accuracy ([\d.]+)%", 85.0, 100.0),
    "own_data_and_loss": (r"distance on the test pictures: ([\d.]+)", 0.0, 0.1),
    "own_loop": (r"accuracy ([\d.]+)% on 8 devices", 95.0, 100.0),
}
"""What each prints in the end, and between which numbers it must lie."""


@pytest.mark.parametrize("name", LEARNT)
def test_an_example_learns(name, tmp_path):
    source = ROOT / "examples" / f"{name}.py"
    assert len(source.read_text().splitlines()) < 60
    done = subprocess.run([sys.executable, source], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    pattern, least, most = LEARNT[name]
    assert least <= float(re.findall(pattern, done.stdout)[-1]) <= most


def test_every_example_is_tested():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(LEARNT)
