"""The way in for a checkout: the same flags as `resnet-jax train`."""

import sys

from resnet_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
