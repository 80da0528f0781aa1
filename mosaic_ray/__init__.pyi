"""The types of what the package loads when it is asked for."""

from .api import (
    Callback as Callback,
)
from .api import (
    Config as Config,
)
from .api import (
    RequestError as RequestError,
)
from .api import (
    Run as Run,
)
from .api import (
    RunError as RunError,
)
from .api import (
    Sweep as Sweep,
)
from .api import (
    compare as compare,
)
from .api import (
    configure as configure,
)
from .api import (
    load_run as load_run,
)
from .api import (
    load_sweep as load_sweep,
)
from .api import (
    run as run,
)
from .api import (
    sweep as sweep,
)

__version__: str
