"""Mosaic (arXiv 2505.19699)."""
