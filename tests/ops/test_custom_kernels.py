import os
import subprocess
import sys

import pytest

from resnet_jax.ops import sharded_batch, use_custom_kernels
from resnet_jax.ops.custom_kernels import custom_kernels_enabled, sharded_platform


@pytest.mark.parametrize(
    ("setting", "read", "default"),
    [(use_custom_kernels, custom_kernels_enabled, True), (sharded_batch, lambda: bool(sharded_platform()), False)],
)
def test_a_setting_holds_within_its_block_and_its_function(setting, read, default):
    assert read() is default
    with setting(not default):
        assert read() is not default
        with setting(default):
            assert read() is default
        assert read() is not default
    assert setting(not default)(read)() is not default
    assert read() is default
    with pytest.raises(ZeroDivisionError), setting(not default):
        _ = 1 / 0
    assert read() is default


@pytest.mark.parametrize(("value", "enabled"), [("0", "False"), ("1", "True"), (None, "True")])
def test_the_environment_decides_the_default(value, enabled):
    environment = {name: v for name, v in os.environ.items() if name != "RESNET_JAX_CUSTOM_KERNELS"}
    environment |= {} if value is None else {"RESNET_JAX_CUSTOM_KERNELS": value}
    code = "from resnet_jax.ops.custom_kernels import custom_kernels_enabled as on; print(on())"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    assert printed.strip() == enabled
