"""Reports, figures and tables about runs, sweeps and the store. Nothing here computes an experiment."""
