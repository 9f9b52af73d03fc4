"""Side-by-side measurements; `python -m benchmarks` runs what fits the hardware. See README.md beside this file."""
