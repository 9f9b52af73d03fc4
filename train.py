"""The way in for a checkout: the same flags as `resnet-jax train`."""

import sys

from resnet_jax.cli import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
