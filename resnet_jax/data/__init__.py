"""Images in: sources, transforms on host and device, and the loader between them."""
