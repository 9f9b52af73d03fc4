"""Images a second of a network in evaluation, batch normalisation folded into the convolutions by both sides."""

from functools import partial
from typing import Any

from benchmarks.limits import forward_flops, measure_limits
from benchmarks.measure import MEMORY, Contender, alternate, has_gpu, network_rows, options, write

ON_CPU = (("resnet50", 224, 1, "float32", 9), ("resnet50", 224, 64, "float32", 5),
          ("cifar_resnet20", 32, 1, "float32", 30), ("cifar_resnet20", 32, 256, "float32", 15))  # fmt: skip
ON_GPU = (("resnet50", 224, 1, "bfloat16", 50), ("resnet50", 224, 256, "bfloat16", 30),
          ("cifar_resnet20", 32, 1, "bfloat16", 50), ("cifar_resnet20", 32, 256, "bfloat16", 50))  # fmt: skip


def jax_forward(name: str, batch: int, size: int, classes: int, dtype: str, example: bool) -> Any:
    """Returns a function that computes the logits of a batch, with ours folded, or with Flax's example network as it
    is.
    """
    import jax

    from benchmarks.flax_example import network
    from resnet_jax.predict.predictor import make_forward

    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    model = network(name, classes, dtype, example)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    forward = partial(jax.jit(model.apply), variables) if example else make_forward(model, variables)

    def call() -> None:
        jax.block_until_ready(forward(images))

    return call


def torch_forward(name: str, batch: int, size: int, classes: int, dtype: str, compiled: bool) -> Any:
    """Returns what `jax_forward` does, of torch: channels_last, fused by torch.fx, in inference mode."""
    import torch
    from torch.fx.experimental.optimization import fuse

    from benchmarks.torch_models import synchronize, torch_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    model = fuse(torch_model(name, classes).eval()).to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    if dtype == "bfloat16":
        model, images = model.bfloat16(), images.bfloat16()
    forward = torch.compile(model) if compiled else model

    def call() -> None:
        with torch.inference_mode():
            forward(images)
        synchronize(device)

    return call


def main() -> None:
    """Runs all cases that fit the hardware."""
    flags = options(__doc__ or "", only="")
    cases = ON_GPU if has_gpu() else ON_CPU
    if flags.quick:
        cases = cases[2:]
    from resnet_jax.models.registry import create_model

    limits = {dtype: measure_limits(dtype) for dtype in {case[3] for case in cases}}
    rows: list[dict[str, Any]] = []
    for name, size, batch, dtype, rounds in cases:
        if flags.only not in name:
            continue
        classes = 1000 if size == 224 else 10
        common = {"name": name, "batch": batch, "size": size, "classes": classes, "dtype": dtype}
        contenders = [
            Contender("resnet_jax", jax_forward, common | {"example": False}, MEMORY),
            Contender("torch eager", torch_forward, common | {"compiled": False}),
            Contender("torch.compile", torch_forward, common | {"compiled": True}),
            Contender("Flax's example", jax_forward, common | {"example": True}),
        ]
        if not has_gpu():
            contenders.append(Contender("torch eager, our memory", torch_forward, common | {"compiled": False}, MEMORY))
        flops = forward_flops(create_model(name, num_classes=classes), size)
        times = alternate(contenders, flags.rounds or rounds, warmup=3, settle=0.5)
        rows += network_rows(f"infer {name} {dtype} batch {batch}", times, batch, flops, limits[dtype]["flops"])
    write("inference", rows, limits=limits)


if __name__ == "__main__":
    main()
