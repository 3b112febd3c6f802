"""How things are timed: side by side, in turns, medians."""

import gc
import statistics
import time

import jax


def seconds(fun):
    """Time one call, results awaited, without the collector's pauses of others."""
    gc.collect()
    start = time.perf_counter()
    jax.block_until_ready(fun())
    return time.perf_counter() - start


def side_by_side(ours, theirs, rounds=5, warm=True):
    """Return the median seconds of both and their ratio; the first may warm up."""
    pairs = []
    for number in range(rounds + warm):  # in turns: which goes first costs it something
        if number % 2:
            pairs.append((seconds(ours), seconds(theirs)))
        else:
            pairs.append((seconds(theirs), seconds(ours))[::-1])
    pairs = pairs[warm:]
    mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return {"ours": mine, "theirs": other, "ratio": ratio}


def repeated(fun, *args, times):
    """Return a function that makes many calls, to time what is short."""

    def run():
        for _ in range(times):
            out = fun(*args)
        return out

    return run
