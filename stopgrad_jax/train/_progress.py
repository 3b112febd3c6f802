"""What `fit` shows while it runs, and how it is interrupted."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


class Progress:
    """A tqdm bar where tqdm is installed, else lines; nothing if not wanted."""

    def __init__(self, steps: int, wanted: bool):
        """Begin. Of several processes only the first shows anything."""
        self._steps, self._done, self._start = steps, 0, time.perf_counter()
        self._wanted = wanted and jax.process_index() == 0
        self._bar = _bar(steps) if self._wanted else None

    def update(self, done: int, metrics: Any) -> None:
        """Show how many steps were taken, and the last loss."""
        before, self._done = self._done, done
        if not self._wanted:
            return
        loss = _last_loss(metrics)
        if self._bar is not None:
            if loss:
                self._bar.set_postfix_str(loss, refresh=False)
            self._bar.update(done - before)
        else:
            rate = self._done / max(time.perf_counter() - self._start, 1e-9)
            text = f"step {self._done}/{self._steps}  {loss}  {rate:.0f} steps/s"
            self.note(text)
        for line in _nonfinite_lines(metrics, before):
            self.note(line)

    def note(self, text: str) -> None:
        """Write a line."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._wanted:
            print(text, file=sys.stderr)

    def close(self) -> None:
        """End the bar's line."""
        if self._bar is not None:
            self._bar.close()


def _bar(steps: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    # The plain bar: that of notebooks needs widgets, and warns where there are none.
    return tqdm(total=steps, unit="step", file=sys.stderr, mininterval=0)


def _last_loss(metrics: Any) -> str:
    loss = metrics.get("loss") if isinstance(metrics, dict) else None
    is_list = isinstance(loss, np.ndarray) and loss.ndim == 1 and loss.size
    return f"loss {loss[-1]:.4g}" if loss is not None and is_list else ""


def _nonfinite_lines(metrics: Any, first: int) -> Iterator[str]:
    found = metrics.get("nonfinite") if isinstance(metrics, dict) else None
    if isinstance(found, dict) and any(np.any(x) for x in found.values()):
        names = [name for name, x in found.items() if np.any(x)]
        steps = np.flatnonzero(np.any([found[name] for name in names], axis=0))
        shown = ", ".join(names[:8]) + (" and others" if len(names) > 8 else "")
        yield (
            f"{len(steps)} of these steps had a nonfinite gradient, the first of them "
            f"step {first + int(steps[0])} (from 0): {shown}"
        )


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a request that is looked at between steps.

    The second one does what Ctrl-C did before. Signals reach the main thread only.
    """
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not callable(before):
        # Ignored on purpose (a background job, `nohup`), or not Python's to handle.
        yield lambda: False
        return
    asked: list[bool] = []

    def handle(number: int, frame: Any) -> None:
        if asked:
            before(number, frame)
        asked.append(True)

    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
