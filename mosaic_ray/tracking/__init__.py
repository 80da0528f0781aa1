"""Progress, metrics and TensorBoard during a run."""
