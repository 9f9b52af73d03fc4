"""Seconds to read a file of resnet152's weights into a model, and the memory that it takes at its peak."""

import resource
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import Contender, alternate, options, print_table, row, with_ratios, write


def write_files(folder: Path) -> list[Path]:
    """Writes random weights of torchvision's resnet152 as safetensors and as PyTorch's own file."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.torch_models import torch_model

    tensors = torch_model("resnet152", 1000).state_dict()
    paths = [folder / "resnet152.safetensors", folder / "resnet152.pth"]
    save_file(tensors, paths[0])
    torch.save(tensors, paths[1])
    return paths


def peak_mib() -> float:
    """Returns the most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(path: str) -> Any:
    """Reads, checks and converts: what `load_pretrained` does."""
    import jax

    from resnet_jax import create_model, load_pretrained
    from resnet_jax.models.registry import variable_shapes

    jax.block_until_ready(jax.numpy.zeros(1))
    model = create_model("resnet152")
    variable_shapes(model)
    before = peak_mib()

    def call() -> dict[str, float]:
        import time

        began = time.perf_counter()
        loaded = load_pretrained(path, "resnet152")
        jax.block_until_ready(loaded[1])
        return {"seconds": time.perf_counter() - began, "peak_mib": peak_mib() - before}

    return call


def theirs(path: str) -> Any:
    """Reads as torchvision's hub and timm do, and copies into a module that is there already."""
    import torch
    from safetensors.torch import load_file

    from benchmarks.torch_models import torch_model

    module = torch_model("resnet152", 1000)
    before = peak_mib()

    def call() -> dict[str, float]:
        import time

        began = time.perf_counter()
        tensors = load_file(path) if path.endswith("safetensors") else torch.load(path, weights_only=True)
        module.load_state_dict(tensors)
        return {"seconds": time.perf_counter() - began, "peak_mib": peak_mib() - before}

    return call


def main() -> None:
    """Times both, one after the other."""
    flags = options(__doc__ or "")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for path in write_files(Path(folder)):
            size = path.stat().st_size / 2**20
            contenders = [
                Contender("resnet_jax", ours, {"path": str(path)}),
                Contender("torch", theirs, {"path": str(path)}),
            ]
            for name, result in alternate(contenders, flags.rounds or 9).items():
                peak = max(kept["peak_mib"] for kept in result["kept"]) / size
                rows.append(row(f"read resnet152{path.suffix}", name, result, 1, "files", peak_over_file=peak))
                print(f"{name}: at its peak {peak:.2f} times the file's {size:.0f} MiB beyond what it held before")
    rows = with_ratios(rows)
    print_table(rows)
    write("weights", rows, file_mib=size)


if __name__ == "__main__":
    main()
