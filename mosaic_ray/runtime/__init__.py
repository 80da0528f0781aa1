"""Where things run: Ray, the stores of results, and the way out for metrics. The mathematics lives below."""
