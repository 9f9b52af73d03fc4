"""Weights in from PyTorch and back out: tags, files, names, layouts."""
