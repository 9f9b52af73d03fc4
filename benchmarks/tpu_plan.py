"""What `plan --target` says of ResNet-50 and ResNet-152 on 8, 64 and 256 chips: the table of docs/plan.md.

No TPU is needed, but its compiler (`pip install 'jax[tpu]'`). A case is compiled by the command itself, in a process of
its own, and the record is written after each, so that one that was stopped keeps what it had.
"""

import json
import subprocess
import sys
from typing import Any

from benchmarks.measure import options, write

MODELS = ("resnet50", "resnet152")
TARGETS = {"v5e:2x4": 8, "v5e:8x8": 64, "v5e:16x16": 256}
IMAGES_A_CHIP = 128


def planned(model: str, target: str, chips: int, size: int, images: int) -> dict[str, Any]:
    """Returns the case and what the command says of it."""
    command = [sys.executable, "-m", "resnet_jax", "plan", "--config", "imagenet_resnet50", "--json"]
    command += ["--model.name", model, "--target", target, "--train.batch_size", str(images * chips)]
    command += ["--data.image_size", str(size)]
    case = {"case": f"{model}, {size} px, {images} images a chip, bfloat16", "model": model}
    return case | json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def main() -> None:
    """Prints a line a case and writes the record."""
    given = options(__doc__ or "")
    rows = []
    for target, chips in {"v5e:2x2": 4}.items() if given.quick else TARGETS.items():
        for model in MODELS[:1] if given.quick else MODELS:
            rows.append(planned(model, target, chips, 32 if given.quick else 224, 8 if given.quick else IMAGES_A_CHIP))
            print(
                f"{model:10} {target:10} peak {rows[-1]['peak'] / 1e9:6.2f} GB, compiled in "
                f"{rows[-1]['compile_seconds']:.0f} s",
                flush=True,
            )
            if not given.quick:
                write("tpu_plan", rows)


if __name__ == "__main__":
    main()
