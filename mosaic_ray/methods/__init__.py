"""Methods, one file or folder each: they teach the student after, or during, the federated rounds."""
