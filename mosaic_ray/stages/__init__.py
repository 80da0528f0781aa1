"""The stages of a run. Each is looked up in the store under a hash of exactly what it depends on, or computed.

A stage's key is known before anything is computed, so a finished run is recognised without touching Ray.
"""
