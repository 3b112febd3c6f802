"""Errors of JAX: what it makes of one that a callback raises, and how one is told.

`tests/test_jax.py` checks it on the oldest and the newest JAX we support.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import jax

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


def is_traced_static(error: Exception) -> bool:
    """Tell the error of a jitted function whose static argument is a traced number.

    Or holds one: of a Python float the type is weak. Without it, the error is shown.
    """
    text = str(error)
    is_weak = "Tracer(~float" in text or "Tracer(~complex" in text
    return text.startswith("Non-hashable static arguments") and is_weak


def is_of_a_closure(error: Exception) -> bool:
    """Tell the error of a rule that closes over what is differentiated.

    JAX's coming custom rules (`jax_custom_vjp3`) have a type of their own for it.
    """
    coming = type(error).__name__ == "CustomVJPException"
    return coming or isinstance(error, jax.errors.UnexpectedTracerError)


def is_no_reverse(error: Exception) -> bool:
    """Tell JAX's refusal to differentiate a while loop backwards from other errors."""
    return isinstance(error, ValueError) and "Reverse-mode" in str(error)


def message_of(error: Exception) -> str:
    """Return the type and the message of an error, as they were where it was raised.

    What a callback raises comes out of a compiled program as the text of a traceback.
    """
    lines = [row for row in str(error).splitlines() if row.strip()]
    frames = [k for k, row in enumerate(lines) if row.startswith('  File "')]
    # Behind the last frame, whose lines are indented: a message may have several.
    for row in lines[frames[-1] :] if frames else ():
        if row[0] != " ":
            return row
    name = type(error).__name__
    return f"{name}: {lines[0]}" if lines else name
