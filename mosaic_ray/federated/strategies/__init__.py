"""Federated strategies: one file each."""
