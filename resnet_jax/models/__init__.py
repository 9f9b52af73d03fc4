"""Networks as Flax modules; they call `ops` and know nothing of training, data, platforms or devices."""
