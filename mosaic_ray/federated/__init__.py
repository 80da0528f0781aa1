"""Federated rounds: local training, aggregation, strategies."""
