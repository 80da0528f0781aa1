"""One experiment from a configuration to files on disk."""
