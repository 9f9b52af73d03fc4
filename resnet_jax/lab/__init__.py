"""Experiments that show why residual learning works; each returns a record and draws a figure."""
