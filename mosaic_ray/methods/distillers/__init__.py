"""Data-free distillers: what follows the warm-up, as values in, values out."""
