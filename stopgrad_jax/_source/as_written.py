"""How programs are traced that a verb looks at.

As written: a function that this package made, as `sg.edit(f, ...)`, evaluates equal
operations by one shared function, which has the lines of the first of them. Where a
verb looks at it, each operation is to have its own.
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


def anew() -> contextlib.AbstractContextManager[Any]:
    """Trace also the functions anew that JAX has traced before: nobody has these."""
    # The value is part of the key by which JAX looks up what it has traced.
    return _ANEW(object())


_ANEW = jax.make_user_context()
