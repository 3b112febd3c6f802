"""What `flow` says of losses whose answer is known: table, source, words, lines."""

import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import models
import optax
import pytest
from jax import lax

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")
ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(autouse=True)
def _printed_from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def look_at(name):
    fun = getattr(models, name)
    return sg.flow(fun, xs=models.XS[name])(*models.ARGS[name])


def line_of(fun, text):
    lines, first = inspect.getsourcelines(fun)
    return first + next(k for k, line in enumerate(lines) if text in line)


def statuses(flow):
    return {i.path: i.status for i in flow.inputs}


@pytest.mark.parametrize("name", ["vqvae_loss", "ddqn_loss", "dann_loss"])
def test_the_printed_text(name):
    flow = look_at(name)
    text = "\n\n".join([str(flow), str(flow.source()), str(flow.explain())]) + "\n"
    assert text == (GOLDEN / f"{name}.txt").read_text()


def test_a_table_is_also_data():
    flow = look_at("vqvae_loss")
    cells = {i.path: (i.values, *i.terms.values()) for i in flow.inputs if i.terms}
    assert flow.terms == ("recon", "codebook_loss", "commit")
    assert cells == {
        "params/codebook": (128, "cut", "flows", "cut"),
        "params/dec": (2400, "flows", "unused", "unused"),
        "params/enc": (2344, "flows", "cut", "flows"),
    }
    assert statuses(flow)["x"] == "data"
    places = [
        ("integer", line_of(models.quantise, "argmin")),
        ("stop_gradient", line_of(models.vqvae_loss, "z_st = ")),
        ("stop_gradient", line_of(models.vqvae_loss, "codebook_loss = ")),
        ("stop_gradient", line_of(models.vqvae_loss, "commit = ")),
    ]
    assert [(c.reason, c.site.line) for c in flow.cuts] == places
    assert [s.label for s in flow.steps if s.kind == "step"] == [
        *("z_e", "d", "z_q", "z_st", "x_hat", "recon", "codebook_loss", "commit"),
        "return",
    ]
    (box,) = flow.boxes
    assert box.label == "quantise()"
    assert json.loads(json.dumps(flow.to_dict()))["version"] == 1


def test_edges_say_what_comes_back():
    flow = look_at("vqvae_loss")
    label = {s.id: s.label for s in flow.steps}
    edges = {(label[e.source], label[e.target]): e.status for e in flow.edges}
    assert edges["params/enc", "z_e"] == "flow"
    assert edges["params/codebook", "d"] == "shadow"
    assert edges["params/codebook", "z_q"] == "flow"
    assert edges["d", "idx"] == "cut"
    assert edges["idx", "z_q"] == "value"
    assert edges["z_q", "stop_gradient"] == "cut"
    assert edges["stop_gradient", "z_st"] == "value"
    assert edges["x", "z_e"] == "value"
    gate = look_at("dann_loss")
    label = {s.id: s.label for s in gate.steps}
    edges = {(label[e.source], label[e.target]): e.status for e in gate.edges}
    assert edges["features", "reversed_features"] == "gate"


CAUSES = {  # cause: (function, its words, what is underlined)
    "unused": (lambda w: jnp.float32(6.0), "The output is not computed from it", ""),
    "stop": (
        lambda w: lax.stop_gradient(3 * w) ** 2,
        "stop_gradient, on purpose",
        "lax.stop_gradient(3 * w)",
    ),
    "round": (
        lambda w: jnp.round(3.3 * w) ** 2,
        "the derivative of round is zero almost everywhere",
        "jnp.round(3.3 * w)",
    ),
    "cast": (
        lambda w: (3.3 * w).astype("int32").astype("float32"),
        "astype returns int32, integers carry no gradient",
        '(3.3 * w).astype("int32")',
    ),
    "argmax": (
        lambda w: jnp.argmax(jnp.stack([w, 2 * w])).astype("float32"),
        "argmax returns int",
        "jnp.argmax(jnp.stack([w, 2 * w]))",
    ),
    "sample": (
        lambda w: jax.random.categorical(jax.random.key(0), w * jnp.ones(2)).mean(),
        "sampled by categorical",
        "jax.random.categorical(jax.random.key(0), w * jnp.ones(2))",
    ),
    "overwritten": (
        lambda w: jnp.zeros(2, "float32").at[0].set(w).at[0].set(1.0).sum(),
        "overwritten: a later write replaces all of it",
        'jnp.zeros(2, "float32").at[0].set(w).at[0].set(1.0)',
    ),
    "compared": (
        lambda w: (w > 1).astype("float32"),
        "only compared: the comparison returns bool",
        "w > 1",
    ),
}


@pytest.mark.parametrize(("fun", "words", "marked"), CAUSES.values(), ids=CAUSES)
def test_each_cause_has_its_words_and_its_line(fun, words, marked):
    w = jax.ShapeDtypeStruct((), jnp.float32)
    flow = sg.flow(fun)(w)
    text = str(flow.explain("w"))
    first = text.split("\n")[0]
    assert first.startswith("w (f32[]): gradient is exactly zero.")
    assert words in text
    if marked:
        (cut,) = flow.cuts
        assert cut.site.expr == marked
        assert f"{cut.site.place} in <lambda>()" in text
        rows = text.split("\n")
        under = next(k for k, row in enumerate(rows) if "^" in row)
        start, end = rows[under].index("^"), rows[under].rindex("^") + 1
        assert rows[under - 1][start:end] == marked
        assert cut.site.line == fun.__code__.co_firstlineno


def test_a_dead_relu_is_no_structural_zero():
    flow = sg.flow(lambda w: jax.nn.relu(-w))(2.0)
    line = inspect.currentframe().f_lineno - 1
    expected = f"w (f32[]): connected; may be zero at some inputs: relu, line {line}."
    assert str(flow.explain("w")).split("\n")[0] == expected
    assert statuses(flow) == {"w": "flows"}


def test_a_relu_that_a_residual_goes_round_is_no_reason():
    def loss(w, v):
        h = w + jnp.maximum(w * v, 0.0)
        return jnp.sum(jax.nn.relu(h))

    first, second = str(sg.flow(loss)(2.0, 3.0).explain()).split("\n\n")
    line = loss.__code__.co_firstlineno + 1
    assert f"inputs: relu, line {line + 1}." in first
    assert f"inputs: maximum, line {line}." in second


def test_what_another_library_calls_a_relu_is_not_told():
    """It hands it to `tree.map`, which is no reason for a zero."""
    fun = lambda w: jnp.sum(optax.projections.projection_non_negative(w))
    line = inspect.currentframe().f_lineno - 1
    (first, *_) = str(sg.flow(fun)(2.0).explain("w")).split("\n")
    assert first.endswith(f"may be zero at some inputs: relu, line {line}.")


@pytest.mark.parametrize(
    "fun",
    [
        lambda w: jnp.clip(w, 0.0, 1.0),
        lambda w: jnp.maximum(w, 0.0),
        lambda w: jnp.where(w > 0, w, 0.0),
    ],
    ids=["clip", "maximum", "where"],
)
def test_what_selects_may_be_zero(fun):
    assert "may be zero at some inputs" in str(sg.flow(fun)(2.0).explain("w"))


@pytest.mark.parametrize(
    "fun",
    [
        lambda w: jax.nn.softmax(w * jnp.ones(3))[0],
        lambda w: jax.nn.logsumexp(w * jnp.ones(3)),
        lambda w: jnp.linalg.norm(w * jnp.ones(3)),
        lambda w: jnp.logaddexp(w, 0.0),
        lambda w: abs(w) ** 2.5,
        lambda w: sg.straight_through(jnp.round)(w),
    ],
    ids=["softmax", "logsumexp", "norm", "logaddexp", "power", "straight-through"],
)
def test_what_jax_stops_inside_is_no_cut(fun):
    flow = sg.flow(fun)(jax.ShapeDtypeStruct((), jnp.float32))
    assert flow.cuts == ()
    assert str(flow.explain("w")).startswith("w (f32[]): can get a gradient.")


def test_loops_and_branches_are_told_apart():
    def recurrent(a, b, c, xs):
        def step(carry, x):
            h, k = carry
            return (jnp.tanh(a * h + x), lax.stop_gradient(b * k)), lax.stop_gradient(c)

        (h, _), _ = lax.scan(step, (0.0 * a, 1.0 * b), xs)
        return h

    flow = sg.flow(recurrent)(1.0, 2.0, 3.0, jnp.ones(3))
    assert statuses(flow) == dict(a="flows", b="unused", c="unused", xs="flows")

    def branches(a, b, flag):
        a = lax.cond(flag > 0, lambda a: lax.stop_gradient(a), jnp.sign, a)
        return a + lax.cond(flag > 0, lambda b: b, lambda b: lax.stop_gradient(b), b)

    flow = sg.flow(branches)(1.0, 2.0, 3.0)
    assert statuses(flow)["b"] == "flows"
    assert statuses(flow)["flag"] == "cut"


def test_carries_that_change_places():
    def shifts(a, b):
        def step(carry, _):
            first, second = carry
            return (second, lax.stop_gradient(first)), None

        return lax.scan(step, (a, b), None, length=3)[0][0]

    # a goes second, stopped, in the first round; b comes first and is then stopped.
    assert statuses(sg.flow(shifts)(1.0, 2.0)) == {"a": "cut", "b": "flows"}


def test_a_rule_of_the_users_is_named_with_its_line():
    @jax.custom_jvp
    def halved(x):
        return x * 0.5

    @halved.defjvp
    def rule(primals, tangents):
        return halved(*primals), jnp.zeros_like(tangents[0])

    flow = sg.flow(lambda x: halved(x) + 1)(2.0)
    line = halved.fun.__code__.co_firstlineno
    (cut,) = flow.cuts
    assert cut.reason == "zero_rule"
    words = "the custom rule of halved returns zero"
    assert cut.words == f"{words} (tests/test_flow.py:{line})"


def test_an_operation_without_a_rule_is_unknown():
    def hosted(x, y):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(lambda x: x, shape, x) + y

    flow = sg.flow(hosted)(jax.ShapeDtypeStruct((), jnp.float32), 1.0)
    assert statuses(flow) == {"x": "unknown", "y": "flows"}
    assert "x (f32[]): jax.grad raises at pure_callback (" in str(flow.explain("x"))
    assert "pure_callback" in str(flow.explain("x"))


def test_addresses_of_points_variables_and_outputs():
    def two(w, x):
        h = sg.name(jnp.tanh(w * x), "hidden")
        g = jnp.round(h)
        return {"loss": jnp.sum(h), "metric": jnp.sum(g)}

    flow = sg.flow(two)(1.0, jnp.ones(3))
    assert flow.outputs == flow.terms == ("return/loss", "return/metric")
    assert flow.inputs[0].terms == {"return/loss": "flows", "return/metric": "cut"}
    assert flow.connected("hidden", "return/loss")
    assert not flow.connected("hidden", "return/metric")
    assert flow.connected("w")
    assert flow.connected(sg.var("h"), "return/loss")
    assert "h (f32[3]): can get a gradient" in str(flow.explain(sg.var("h")))
    with pytest.raises(sg.AddressError, match="one of"):
        flow.explain("hiden")
    assert sg.flow(two, ys="return/metric")(1.0, jnp.ones(3)).outputs == (
        "return/metric",
    )


def test_focus_and_between_are_parts():
    flow = look_at("vqvae_loss")
    view = flow.focus("params/codebook")
    labels = [s.label for s in view.picture.steps]
    assert "params/dec" not in labels
    assert "x" not in labels
    assert {"d", "idx", "z_q", "codebook_loss", "output"} <= set(labels)
    assert "through codebook_loss only" in str(view)
    part = flow.between("params/enc", sg.var("recon"))
    assert "commit" not in [s.label for s in part.picture.steps]
    numbers = {s.id for s in part.picture.steps}
    assert all({e.source, e.target} <= numbers for e in part.picture.edges)


def test_a_function_without_a_float_result_raises():
    with pytest.raises(TypeError, match="return the loss"):
        sg.flow(lambda x: jnp.argmax(x))(jnp.ones(3))


def test_unknown_ending():
    with pytest.raises(ValueError, match=r"\.svg, \.png"):
        look_at("ddqn_loss").save("flow.bmp")


def test_many_outputs_are_columns_by_subtree():
    def step(params, x):
        new = {k: w - 0.1 * lax.stop_gradient(x) for k, w in params.items()}
        return new, {k: x + 0 * w for k, w in params.items()}

    flow = sg.flow(step)({f"w{k}": 1.0 for k in range(5)}, 2.0)
    assert flow.terms == ("return/0", "return/1")
    assert len(flow.outputs) == 10
    assert flow.inputs[-1].terms == {"return/0": "cut", "return/1": "flows"}


def test_the_readme_shows_what_is_printed(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    code = next(b for b in readme.split("```python\n") if "vqvae_loss" in b)
    shown = readme.split("```\ngradient flow")[1].split("```")[0]
    imports = "import jax, jax.numpy as jnp\nimport stopgrad_jax as sg\n\n\n"
    program = imports + code.split("```")[0].replace("print(flow)", "")
    (tmp_path / "models.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "models"}
    exec(compile(program, str(tmp_path / "models.py"), "exec"), space)
    assert str(space["flow"]) == ("gradient flow" + shown).rstrip()
