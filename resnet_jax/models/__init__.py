"""Networks as Flax modules; they know nothing of training, data or devices."""
