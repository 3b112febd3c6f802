"""The house: which file may import which, and how long a file may be."""

import ast
import graphlib
import io
import pathlib
import tokenize
import types

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "stopgrad_jax"

# What each wing may import, beside the ground that all of them stand on. "public" are
# the files at the top with no underscore.
ARROWS = {
    "_page": "",
    "_source": "",
    "_gate": "",
    "_program": "_source _gate",
    "_reach": "_source _gate _program",
    "public": "_gate _program _reach",
    "_statistics": "_gate _program _reach",
    "_check": "_source _gate _program _reach",
    "_flow": "_page _source _program _reach",
    "_nonfinite": "_page _source _program _reach",
    "estimators": "_gate public",
    "train": "_source _program _reach _statistics public",
}
GROUND = "_errors _places _jax _address _trees _where _checks _edge _words".split()
FILES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))


def imported(path):
    """Names of this package's files that a file imports."""
    folder = (PACKAGE / path).parent
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            here = folder.relative_to(ROOT).parts
            parts = node.module.split(".") if node.module else []
            modules = [".".join([*here, *parts])]
            if ROOT.joinpath(*here, *parts).is_dir():  # the names are modules
                modules = [f"{modules[0]}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import of a parent"
            modules = [node.module]
        for module in modules:
            head, *parts = module.split(".")
            if head == PACKAGE.name:
                yield "/".join(parts)


def wing(name):
    """The wing of a file, by its name below the package."""
    head = name.split("/")[0]
    return head if head in ARROWS or head in GROUND else "public"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_what_its_wing_may(path):
    if path.as_posix() == "__init__.py":
        return
    own = wing(path.with_suffix("").as_posix())
    allowed = {own, *GROUND}
    if own in GROUND:  # one stands on another, and on no wing
        allowed = set(GROUND)
    else:
        allowed.update(ARROWS[own].split())
    assert {wing(name) for name in imported(path)} <= allowed


def test_the_arrows_are_few_and_in_no_circle():
    below = list[str]()
    for name, others in ARROWS.items():
        assert set(others.split()) <= {*below}, name
        below.append(name)
    assert sum(len(others.split()) for others in ARROWS.values()) <= 30


def test_no_files_import_each_other():
    files = {p.with_suffix("").as_posix().removesuffix("/__init__"): p for p in FILES}
    files = {name: path for name, path in files.items() if name != "__init__"}
    graph = {n: {*imported(p)} & files.keys() - {n} for n, p in files.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises where there is one


@pytest.mark.parametrize(
    "path",
    [
        p
        for d in ("stopgrad_jax", "tests", "benchmarks")
        for p in (ROOT / d).rglob("*.py")
    ],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_files_are_short(path):
    lines = len(path.read_text().splitlines())
    if path == PACKAGE / "__init__.py":
        assert lines <= 100
    else:
        assert lines <= (400 if PACKAGE in path.parents else 500)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_function_of_16_lines_says_what_it_is_for(path):
    """In a docstring, or in a comment of why it is as it is."""
    text = (PACKAGE / path).read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {t.start[0] for t in tokens if t.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 15:
            own = range(node.lineno, node.end_lineno + 1)
            told = ast.get_docstring(node) or not comments.isdisjoint(own)
            assert told, f"{path}:{node.lineno} {node.name}"


def test_every_public_name_is_documented():
    import stopgrad_jax as sg

    for name in sg.__all__:
        public = getattr(sg, name)
        assert public.__doc__, name
        if isinstance(public, types.ModuleType):
            for inner in public.__all__:
                doc = getattr(public, inner).__doc__
                # A class is shown where it is returned, a twin where its other is.
                shown = isinstance(getattr(public, inner), type) or "Do as `" in doc
                assert shown or "Example:" in doc, f"{name}.{inner}"
            assert public.__all__ == sorted(public.__all__)
        elif callable(public) and not isinstance(public, type):
            assert "Example:" in public.__doc__, name
    assert sg.__all__ == sorted(sg.__all__)
