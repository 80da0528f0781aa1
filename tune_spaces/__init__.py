"""Sweep plans, one module each; a package of its own because plans change on another schedule than the library."""
