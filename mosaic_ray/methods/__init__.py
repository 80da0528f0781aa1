"""Methods, one file or folder each: what teaches the student after, or during, the federated rounds."""
