"""Reads PyTorch's weights and writes them: tags, files, names, layouts."""
