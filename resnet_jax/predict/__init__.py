"""Networks for use: pictures in, probabilities out; Grad-CAM; data on trial; programs for serving."""
