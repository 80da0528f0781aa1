"""Checks of machines and of cluster files."""
