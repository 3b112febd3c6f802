"""The house: which file may import which, and how long a file may be."""

import ast
import pathlib
import types

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "stopgrad_jax"

# A file imports only from floors below its own, or from those before it in its row
# if the row is a chain.
FLOORS = [
    {"_origin"},
    {
        "_errors",
        "_jax_types",
        "_jax_errors",
        "_jax_kinds",
        "_jax_places",
        "_jax_patterns",
        "_jax_closures",
        "_words",
    },
    {"_jax_evaluate"},
    {"_jax"},
    {"_address", "_edge"},
    {"_checks", "_engine/crossing"},
    {"_where", "_engine/as_written", "_engine/wiring"},
    {"_engine/watched"},
    {
        "_engine/trace",
        "_engine/control",
        "_engine/perturbation",
        "_engine/signature",
        "_engine/bindings",
        "_engine/anew",
        "_engine/own_stop",
    },
    {
        "_engine/syntax",
        "_engine/texts",
        "_engine/ways",
        "_engine/closures",
        "_engine/slope",
        "_engine/references",
        "_engine/apart",
    },
    {
        "_engine/decided",
        "_engine/rule",
        "_engine/functions",
        "_engine/labels",
        "_engine/repeats",
    },
    {"_engine/elsewhere"},
    {"_engine/executions"},
    {"_engine/gate", "_engine/assignment", "_engine/devices", "_engine/roles"},
    {"_engine/copies", "_engine/sites", "_engine/tap"},
    {"_engine/calls", "_engine/entries"},
    {"_engine/shards", "_engine/trial", "_engine/ignored", "_engine/followed"},
    {"_engine/levels"},
    {"_engine/runner", "_engine/suspects"},
    {"_engine/rounds", "_engine/chosen"},
    {"_engine/gated", "_engine/variables", "_engine/blame", "_engine/declared"},
    {"_engine/handed", "_engine/operations", "_engine/hiding", "_engine/raised"},
    {"_engine/routes", "_engine/origins"},
    {"_engine/parameters"},
    {"_engine/rules", "_engine/backward"},
    {"_engine/plan", "_engine/runs", "_engine/rounding"},
    {"_engine/walk", "_engine/measured"},
    {"_engine/reduced", "_engine/own_values", "_engine/overwrite"},
    {"_engine/edits", "_engine/connect", "_engine/unfound", "_engine/nth"},
    {"_engine/wanted", "_engine/gathered", "_engine/computed"},
    {"_engine/unmatched", "_engine/linear"},
    {"_engine/absent"},
    {"_engine/rewrite", "_engine/select", "_engine/dependence"},
    {"_engine/graph"},
    {"_engine/naming"},
    {"_engine/causes", "_engine/fed", "_engine/dropped"},
    {"_engine/unfold", "_engine/towards"},
    {"_engine/refuse", "_engine/given", "_engine/differentiate"},
    {"points", "query", "gates", "cotangents", "substitution", "trees", "freezing"},
    {"estimators/__init__", "estimators/inputs"},
    {
        "estimators/draws",
        "estimators/derivatives",
        "estimators/grid",
        "estimators/fake",
    },
    {"estimators/piecewise", "estimators/learned_step", "estimators/codebook"},
    {"estimators/signs", "estimators/gumbel"},
    {"estimators/quantize", "estimators/recurrent", "estimators/surrogate"},
    {"estimators/sample", "estimators/score"},
    {"diagnosis/__init__", "diagnosis/model", "diagnosis/page"},
    {
        "diagnosis/grouping",
        "diagnosis/merge",
        "diagnosis/skin",
        "diagnosis/fold",
        "diagnosis/terms",
    },
    {
        "diagnosis/judge",
        "diagnosis/directions",
        "diagnosis/programs",
        "diagnosis/written",
    },
    {"diagnosis/near"},
    {"diagnosis/compare", "diagnosis/readings"},
    {"diagnosis/told", "diagnosis/values", "diagnosis/edited", "diagnosis/search"},
    {"diagnosis/checked"},
    {"diagnosis/second"},
    {"diagnosis/settled", "diagnosis/reads"},
    {"diagnosis/readers", "diagnosis/infinities"},
    {"diagnosis/masking", "diagnosis/zeros"},
    {"diagnosis/hints"},
    {"diagnosis/report"},
    {"diagnosis/steps", "diagnosis/dot", "diagnosis/render"},
    {"diagnosis/look", "diagnosis/drawing"},
    {"diagnosis/passing"},
    {"diagnosis/table", "diagnosis/explain", "diagnosis/source", "diagnosis/part"},
    {"diagnosis/flow"},
    {
        "diagnosis/contracts",
        "diagnosis/statistics",
        "diagnosis/nonfinite",
        "diagnosis/check",
    },
    {"training/__init__", "training/owned", "training/spread", "training/progress"},
    {"training/state"},
    {"training/micro", "training/untrained"},
    {"training/loss"},
    {"training/gradient"},
    {"training/examine"},
    {"training/model_state"},
    {"training/watch"},
    {"training/update"},
    {"training/step", "training/chunks"},
    {"training/loop", "training/make"},
    {"train"},
    {"__init__"},
]
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


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_from_below(path):
    name = path.with_suffix("").as_posix()
    if name.endswith("/__init__"):
        assert not list(imported(path))
        return
    floor = next((k for k, names in enumerate(FLOORS) if name in names), None)
    assert floor is not None, f"{name} is on no floor: add it to FLOORS"
    below = set().union(*FLOORS[:floor])
    assert set(imported(path)) <= below


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
    assert lines <= (80 if path == PACKAGE / "__init__.py" else 500)


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
        elif name != "AddressError":
            assert "Example:" in public.__doc__, name
    assert sg.__all__ == sorted(sg.__all__)
