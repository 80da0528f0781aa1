"""What is computed, method by method, as values in, values out: a run is an optimiser and then a distiller."""
