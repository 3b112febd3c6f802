"""Apply what a report says to write to the source of a function, by its text."""

import ast
import inspect
import re
import sys
import textwrap

WRITE = re.compile(
    r"(?:[Ww]rite|it is to be there:) (?P<new>.+?) for (?P<old>.+?)"
    r"(?:; such a row .*|, with your number for value)?$"
)


def remedy(report):
    """Return the expression that a report says to write, and that which it is for."""
    found = WRITE.search(report.hint)
    return (found["new"], found["old"]) if found else None


def mended(fun, report):
    """Return a function with the remedy of a report in it, or None if there is none.

    Both are compared as Python prints them: line breaks and quotes make no difference.
    The expression that is replaced must be there, and only once.
    """
    pair = remedy(report)
    if pair is None:
        return None
    new, old = pair
    source = ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(fun))))
    assert source.count(old) == 1, (source, old)
    scope = dict(vars(sys.modules[fun.__module__]))
    scope |= inspect.getclosurevars(fun).nonlocals
    exec(source.replace(old, new), scope)
    return scope[fun.__name__]
