"""Networks for use: pictures in, probabilities out; where a network looks; programs for serving."""
