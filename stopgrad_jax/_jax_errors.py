"""What JAX makes of an error that a callback raises in a compiled program.

`tests/test_jax.py` checks it on the oldest and the newest JAX we support.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

_LOGGERS = ("jax._src.callback", "jax._src.debugging")


@contextlib.contextmanager
def quiet_callbacks() -> Iterator[None]:
    """Keep JAX from logging the traceback of each callback that raises."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was


def message_of(error: Exception) -> str:
    """Return the type and the message of an error, as they were where it was raised.

    What a callback raises comes out of a compiled program as the text of a traceback.
    """
    lines = [row for row in str(error).splitlines() if row.strip()]
    frames = [k for k, row in enumerate(lines) if row.startswith('  File "')]
    for row in lines[frames[-1] :] if frames else ():
        if row[0] != " ":
            return row
    name = type(error).__name__
    return f"{name}: {lines[0]}" if lines else name
