"""How a file, or a place in one, is printed."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig

LIBRARIES = tuple(
    os.path.join(os.path.realpath(sysconfig.get_path(key)), "")
    for key in ("stdlib", "purelib", "platlib")
)
_MARKS = ("pyproject.toml", "setup.py", "setup.cfg", ".git")


def printed_file(file: str) -> str:
    """Return a path as it is printed: relative, from its package or project, or a cell.

    `train.py` and `src/loss.py` below the current folder, `optax/losses/_smoothing.py`
    of what is installed, `acme/jax/losses/mpo.py` of a project elsewhere, `In[2]`.
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    named = getattr(getattr(shell, "compile", None), "format_code_name", None)
    cell = named(file) if named else None
    if cell:
        return cell[1]
    for library in LIBRARIES[1:]:
        if file.startswith(library):
            return file[len(library) :]
    if file.startswith("<") or not os.path.isabs(file):
        return file
    relative = os.path.relpath(file)
    if not relative.startswith(os.pardir):
        return relative
    return os.path.relpath(file, _root_of(os.path.dirname(file)))


@functools.lru_cache(maxsize=1024)
def _root_of(folder: str) -> str:
    """Return the folder of the project, or above the package, that a folder is in.

    Of a file in neither, the folder above: its own is then the first word of the path.
    """
    package = folder
    while os.path.exists(os.path.join(package, "__init__.py")):
        package = os.path.dirname(package)
    if package != folder:
        return package
    above = folder
    while above != os.path.dirname(above):
        if any(os.path.exists(os.path.join(above, mark)) for mark in _MARKS):
            return above
        above = os.path.dirname(above)
    return os.path.dirname(folder)


def printed_place(place: str) -> str:
    """Return `file:line` with the file as it is printed."""
    file, colon, line = place.rpartition(":")
    return f"{printed_file(file)}:{line}" if colon else place
