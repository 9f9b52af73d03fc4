"""Arithmetic as functions: convolution, pooling, batch statistics; and the switch of their custom kernels.

Of each there is a plain reference in its file; what CPUs and NVIDIA GPUs compute faster is in `cpu.py`, `winograd.py`
and `gpu.py`. Which algorithm is used depends on shapes and on the platform for which a program is lowered.
"""

from resnet_jax.ops.custom_kernels import sharded_batch as sharded_batch
from resnet_jax.ops.custom_kernels import use_custom_kernels as use_custom_kernels
