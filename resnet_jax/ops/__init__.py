"""Arithmetic as functions: convolution, and the ways in which CPUs and GPUs compute it faster."""
