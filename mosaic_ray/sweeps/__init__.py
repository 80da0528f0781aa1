"""Many experiments: search spaces, Ray Tune, results."""
