"""Experiments that show why residual learning works; each leaves a record and a figure."""
