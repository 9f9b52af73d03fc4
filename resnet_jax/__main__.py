"""`python -m resnet_jax` is the command `resnet-jax`."""

from resnet_jax.cli import run

if __name__ == "__main__":
    run()
