"""Sweep plans, one module each. Users add their own, so they are not part of the library."""
