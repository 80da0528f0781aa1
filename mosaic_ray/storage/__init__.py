"""Stage results on disk or in object stores: keys, files, locks, garbage collection."""
