"""Programs whose source lines will be read.

Functions that this package made, as `sg.edit(f, ...)`, evaluate equal operations by one
shared function, which has the lines of the first of them. Where a verb looks at such a
function, each operation is to have its own.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax

_AS_WRITTEN = jax.make_user_context(False)


def as_written() -> contextlib.AbstractContextManager[Any]:
    """Keep the lines of each operation of what is traced in the block.

    What JAX has traced outside of one it traces anew.
    """
    return _AS_WRITTEN(True)


def is_as_written() -> bool:
    """Tell whether this is in such a block."""
    return bool(_AS_WRITTEN.value)
