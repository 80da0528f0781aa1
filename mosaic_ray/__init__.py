"""Experiments in heterogeneous federated learning, built around Mosaic (arXiv 2505.19699)."""

__version__ = "0.1.0"
