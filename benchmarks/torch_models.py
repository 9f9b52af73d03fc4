"""The opponents in PyTorch: torchvision's networks, and plain ones for CIFAR."""

import time
from typing import Any

import torch
from torch import nn


def torch_model(name: str, num_classes: int) -> nn.Module:
    """Returns a network of torchvision by its name, or a plain one for CIFAR."""
    if name.startswith("cifar_"):
        return CifarResNet(name, num_classes)
    import_torchvision()
    import torchvision

    return getattr(torchvision.models, name)(num_classes=num_classes)


def import_torchvision() -> None:
    """Lets torchvision import beside a torch without CUDA, where the index's build lacks its compiled operators."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: parameter-free (A) or a projection (B)."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2
        self.project = None
        if shortcut == "B" and (stride > 1 or inputs != outputs):
            self.project = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.project is not None:
            x = self.project(x)
        elif self.stride > 1 or self.pad:
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return torch.relu(x + y)


class CifarResNet(nn.Module):
    """cifar_resnet20, 32, ..., 110 (shortcut A) or cifar_resnet18 (B)."""

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        depth = int(name.removeprefix("cifar_resnet"))
        if depth == 18:
            sizes, widths, shortcut = (2, 2, 2, 2), (64, 128, 256, 512), "B"
        else:
            sizes, widths, shortcut = ((depth - 2) // 6,) * 3, (16, 32, 64), "A"
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        inputs, blocks = widths[0], []
        for stage, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            for i in range(size):
                blocks.append(Block(inputs, width, 2 if stage and i == 0 else 1, shortcut))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.fc.weight, std=inputs**-0.5)  # as Flax begins; PyTorch's own has 0.58 of it
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def sgd(model: nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    """Returns SGD with Nesterov momentum, fused, which PyTorch's documentation calls the fastest."""
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=decay, fused=True)


def torch_train_step(name: str, batch: int, size: int, classes: int, dtype: str, compiled: bool, steps: int = 1) -> Any:
    """Returns a function that takes training steps: forward, backward, SGD with momentum, on random images;
    channels_last; waited for at the end.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    model = torch_model(name, classes).to(device, memory_format=torch.channels_last).train()
    optimizer = sgd(model, 0.01, 1e-4)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, classes, (batch,), device=device)
    forward = torch.compile(model) if compiled else model

    def call() -> dict[str, float]:
        began = time.perf_counter()
        for _ in range(steps):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = nn.functional.cross_entropy(forward(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        synchronize(device)
        return {"seconds": (time.perf_counter() - began) / steps}

    return call


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
