"""The types of what the package loads when it is asked for."""

from .api import (
    Callback,
    Config,
    RequestError,
    Run,
    RunError,
    Sweep,
    compare,
    configure,
    load_model,
    load_run,
    load_sweep,
    run,
    sweep,
)  # fmt: skip

__version__: str
__all__ = [
    "Callback", "Config", "RequestError", "Run", "RunError", "Sweep", "compare", "configure", "load_model", "load_run",
    "load_sweep", "run", "sweep",
]  # fmt: skip
