"""The facts about JAX that `_jax` rests on, on every version that is supported."""

import functools
import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32, layer, mesh

import stopgrad_jax._jax as _jax
import stopgrad_jax._jax.errors as _jax_errors
import stopgrad_jax._jax.places as places
from stopgrad_jax._program.control import control

P = jax.sharding.PartitionSpec


def eqns(fun, *args):
    return _jax.opened(jax.make_jaxpr(fun)(*args))[0].eqns


def test_scan_arity():
    def f(w, c, xs):
        return jax.lax.scan(lambda c, x: ((c[0] * w, c[1] + x), x), (c, c), xs)

    (eqn,) = [
        e for e in eqns(f, *f32(1, 2), f32(1, 2, 3)) if e.primitive.name == "scan"
    ]
    assert _jax.scan_arity(eqn) == (1, 2)


@pytest.mark.parametrize(
    ("fun", "name"),
    [
        (jax.jit(lambda x: jnp.sin(x) * 2), "jit"),
        (jax.checkpoint(lambda x: jnp.sin(x)), "remat2"),
        (lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.cos, x), "cond"),
        (lambda x: jax.lax.while_loop(lambda c: c < 5, lambda c: c * 2, x), "while"),
        (jax.nn.relu, "custom_jvp_call"),
        (lambda x: jax.lax.map(jnp.sin, x[None]), "scan"),
        (
            jax.shard_map(jnp.sin, mesh=mesh(1), in_specs=P(), out_specs=P()),
            "shard_map",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_nested_equations_are_known_and_wired(fun, name):
    (eqn,) = [e for e in eqns(fun, f32(1.0)[0]) if _jax.kind_of(e) == name]
    inner = control(eqn)
    assert inner is not None
    for body in inner.bodies:
        for k, var in zip(body.operands, body.jaxpr.invars, strict=True):
            assert eqn.invars[k].aval.dtype == var.aval.dtype
        for k, var in zip(body.results, body.jaxpr.outvars, strict=True):
            assert k is None or eqn.outvars[k].aval.dtype == var.aval.dtype


def test_rules_are_told_apart():
    def gate(factor):
        rule = jax.custom_vjp(lambda x: x)
        rule.defvjp(lambda x: (x, None), lambda _, ct: (factor * ct,))
        return rule

    one, two = gate(1), gate(2)
    rules = [_jax.custom_rule(e) for e in eqns(lambda x: one(one(two(x))), 1.0)]
    assert rules[0] != rules[1] == rules[2] is not None
    relus = eqns(lambda x: jax.nn.relu(jax.nn.relu(x)), 1.0)
    assert _jax.custom_rule(relus[0]) == _jax.custom_rule(relus[1]) is not None
    assert [_jax.call_name(e) for e in relus] == ["relu", "relu"]


def test_lines_and_scopes():
    def f(x):
        with jax.named_scope("inside"):
            return jnp.sin(x)

    (eqn,) = eqns(f, 1.0)
    line = f.__code__.co_firstlineno + 2
    assert _jax.line_of(eqn).endswith(f"test_jax.py:{line}")
    assert _jax.scope_of(eqn) == "inside"
    assert any(name.endswith("f") for name in places.callers_of(eqn))
    assert _jax.transforms_of(eqns(jax.grad(f), 1.0)[0]) == ("jvp",)


def test_transforms_are_told_from_scopes():
    def f(x):
        with jax.named_scope("a/b"), jax.named_scope("transpose(jvp(q))"):
            square = jax.named_scope("in")(lambda y: y * y)
            return jax.grad(lambda y: jax.vmap(square)(y).sum())(x) + jnp.cos(x)

    seen = {(_jax.transforms_of(e), _jax.scope_of(e)) for e in eqns(f, f32(1, 2))}
    outer = "a/b/transpose(jvp(q))"
    assert seen >= {
        (("jvp", "vmap"), f"{outer}/in"),
        (("transpose", "jvp", "vmap"), f"{outer}/in"),
        (("transpose", "jvp"), outer),
        ((), outer),
    }
    (plain,) = eqns(jnp.sin, 1.0)
    assert (_jax.transforms_of(plain), _jax.scope_of(plain)) == ((), "")


def test_an_equation_outside_its_trace():
    eqn = eqns(lambda x: jnp.sin(x), 1.0)[0]
    np.testing.assert_allclose(_jax.bind(eqn, f32(2.0)[0]), [np.sin(2.0)], rtol=1e-6)


def test_zeros_of_every_type():
    for x in (f32(1, 2), jnp.array(3), jnp.array(True), jax.random.key(0)):
        zero = _jax.zeros(jax.typeof(x))
        assert (zero.shape, zero.dtype) == (x.shape, x.dtype)
    weak = jax.typeof(jnp.asarray(2.0))
    assert jax.typeof(_jax.filled(weak, 1)) == weak


def test_varying_axes():
    seen = []

    def part(x, w):
        seen.append((_jax.varying(jax.typeof(x)), _jax.varying(jax.typeof(w))))
        both = _jax.vary(w, frozenset("d"))
        seen.append(_jax.varying(jax.typeof(both)))
        return both

    specs = {"mesh": mesh(), "in_specs": (P("d"), P()), "out_specs": P("d")}
    jax.eval_shape(jax.shard_map(part, **specs), f32(1, 2, 3, 4), f32(1.0))
    assert seen == [(frozenset("d"), frozenset()), frozenset("d")]


def test_tracing_is_noticed():
    seen = []
    jax.make_jaxpr(lambda x: seen.append(_jax.is_tracing()) or x)(1.0)
    assert seen == [True]
    assert not _jax.is_tracing()


def test_plain_sharded_gradients_count_as_leaks():
    """Why shard_map is left out where leaks are looked for (tests/programs.py)."""

    def sharded(w, x):
        part = lambda w, x: jax.lax.psum(layer(w, x), "d")
        specs = {"mesh": mesh(), "in_specs": (P(), P("d")), "out_specs": P()}
        return jax.shard_map(part, **specs)(w, x)

    fun = jax.jit(jax.grad(functools.partial(sharded)))
    gc.freeze()  # else JAX searches all memory, for a minute, for who holds them
    try:
        with jax.checking_leaks(), pytest.raises(Exception, match="Leaked trace"):
            fun(f32(0.7)[0], f32(1, 2, 3, 4))
    finally:
        gc.unfreeze()


def test_constants_become_inputs():
    """On 0.10 a closed jaxpr has them beside it, from 0.11 in it."""

    def traced(x):
        closed = jax.make_jaxpr(lambda y: y * x + 1)(jnp.float32(2))
        jaxpr, consts = _jax.closed_over(closed)
        assert not getattr(jaxpr, "consts", ())
        assert len(jaxpr.invars) == len(consts) + 1
        return _jax.evaluate(jaxpr, (), [*consts, jnp.float32(3)])[0]

    assert jax.jit(traced)(jnp.float32(5)) == 16


def test_a_cotangent_is_brought_to_the_axes_of_its_value():
    def of_shard(w, x):
        ct = w * x
        assert _jax.varying(jax.typeof(ct)) == {"d"}
        summed = _jax.vary_exactly(ct, frozenset())
        assert _jax.varying(jax.typeof(summed)) == frozenset()
        return summed, _jax.vary_exactly(w, frozenset("d")) * x

    summed, varied = jax.shard_map(
        of_shard, mesh=mesh(), in_specs=(P(), P("d")), out_specs=(P(), P("d"))
    )(jnp.float32(2), f32(1, 2, 3, 4))
    np.testing.assert_array_equal(summed, [20.0])
    np.testing.assert_array_equal(varied, [2.0, 4.0, 6.0, 8.0])


def test_the_line_that_is_running():
    place = _jax.line_here()
    assert re.search(r"test_jax\.py:\d+$", place)


@pytest.mark.parametrize(
    ("leaf", "carries"),
    [
        (1.0, True),
        (1j, True),
        (np.float64(1), True),
        (np.ones(2, np.int32), False),
        (True, False),
        (3, False),
        ("x", False),
        (None, False),
        (jnp.tanh, False),
        (np.array(["x"]), False),
        (np.array([None]), False),
        (jax.ShapeDtypeStruct((2,), jnp.bfloat16), True),
        (jax.random.key(0), False),
        (np.zeros(2, jax.dtypes.float0), False),
    ],
)
def test_what_carries_a_gradient(leaf, carries):
    assert _jax.carries_gradient(leaf) is carries


def test_the_stack_of_an_equation():
    def f(x):
        y = jnp.sin(x)
        return jnp.sin(jax.grad(jnp.cos)(x)) + y

    stacks = [_jax.stack_of(e) for e in eqns(lambda x: f(x), 1.0)]
    assert all(code is f.__code__ for stack in stacks for code, _ in stack[1:2])
    calls = [dict(stack)[f.__code__] for stack in stacks]
    assert calls[0] < calls[1]
    positions = [list(f.__code__.co_positions())[call // 2] for call in calls]
    line = f.__code__.co_firstlineno
    assert positions[0][0] == line + 1
    assert positions[1][0] == line + 2
    kinds = [_jax.is_derivative(stack) for stack in stacks]
    assert (kinds[0], kinds[-1], any(kinds)) == (False, False, True)


def test_where_results_are_in_what_a_function_returns():
    pair = jax.jit(lambda x: (x * 2, {"a": x + 1}))
    f = lambda x: (pair(x), jax.jit(jnp.cos)(x))
    calls = [e for e in eqns(f, 1.0) if e.primitive.name == "jit"]
    assert _jax.result_paths(calls[0]) == ("[0]", "[1]['a']")
    scan = lambda x: jax.lax.scan(
        lambda c, _: ((c[0] + 1, c[0]), c[1]), (x, x), None, 2
    )
    assert _jax.result_paths(eqns(scan, 1.0)[-1])[-1] == "[1]"
    assert _jax.result_paths(eqns(jnp.sin, 1.0)[0]) is None


def test_the_function_that_a_jaxpr_was_traced_from():
    weight = f32(1, 2)

    @jax.jit
    def body(carry, xs):
        return carry * xs["a"] * weight, xs["b"]

    def scanned(carry, xs):
        return jax.lax.scan(lambda c, x: (c * x * weight, c), carry, xs)

    x = f32(1, 2)
    (eqn,) = eqns(lambda x: body(x, {"a": x, "b": x}), x)
    origin = _jax.origin_of(_jax.opened(eqn.params["jaxpr"])[0])
    assert origin[:3] == ("body", __file__, body.__wrapped__.__code__.co_firstlineno)
    # On 0.10 what is closed over is an input in front, without a name.
    numbers = list(origin.inputs.values())
    assert list(origin.inputs) == ["carry", "xs['a']", "xs['b']"]
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    (eqn,) = [e for e in eqns(scanned, x, x[None]) if e.primitive.name == "scan"]
    origin = _jax.origin_of(_jax.opened(eqn.params["jaxpr"])[0])
    before = 0 if jax.config.jax_use_simplified_jaxpr_constants else 1
    assert (origin.name, list(origin.inputs.items())) == (
        "<lambda>",
        [("c", before), ("x", before + 1)],
    )
    loss = lambda x: scanned(x, x[None])[0].sum()
    derived = [e for e in eqns(jax.grad(loss), x) if e.primitive.name == "scan"]
    jaxprs = [_jax.opened(e.params["jaxpr"])[0] for e in derived]
    assert [_jax.origin_of(j) for j in jaxprs] == [None] * len(jaxprs)


def test_marks_are_on_one_array_and_on_no_copy_of_it():
    x, key = jnp.ones(3), jax.random.key(0)
    assert _jax.owner_of(x) is None
    owner = object()
    for array in (x, key):
        _jax.mark(array, owner)
        assert _jax.owner_of(array) is owner
    alias = jax.device_put(x, jax.devices()[0])
    assert alias.unsafe_buffer_pointer() == x.unsafe_buffer_pointer()
    others = [alias, jnp.copy(x), x + 0, jax.jit(lambda x: x)(x), np.asarray(x), 1.0]
    assert not any(map(_jax.owner_of, others))
    jax.jit(lambda x: [_jax.mark(x, owner), x][1])(
        x
    )  # nothing happens to a traced value


def test_results_of_a_donating_program_share_no_memory():
    """So what a step returns is its own, though a constant or argument is in it."""
    constant, given, own = jnp.arange(3.0), jnp.ones(3), jnp.zeros(3)
    f = jax.jit(
        lambda own, given: (own + 1, given, constant, own + 1), donate_argnums=0
    )
    for _ in range(2):  # compiled, and by the fast path
        results = f(own + 0, given)
        places = [x.unsafe_buffer_pointer() for x in (*results, constant, given)]
        assert len(set(places)) == len(places)


def _refuse(x):
    raise OSError("full of eels")


CALLBACKS = {
    "pure": lambda x: jax.pure_callback(_refuse, jax.typeof(x), x),
    "debug": lambda x: [jax.debug.callback(_refuse, x), x][1],
}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_what_a_callback_raises_comes_out_as_text_and_in_the_log(kind, caplog):
    def run():
        jax.block_until_ready(jax.jit(CALLBACKS[kind])(f32(2)))
        jax.effects_barrier()

    def raised():
        with pytest.raises(jax.errors.JaxRuntimeError) as caught:
            run()
        return caught.value

    assert _jax_errors.message_of(raised()) == "OSError: full of eels"
    assert "full of eels" in caplog.text
    caplog.clear()
    with _jax_errors.quiet_callbacks():
        raised()
    assert not caplog.text


@jax.check_tracer_leaks(False)  # it keeps them
def test_a_traced_value_tells_which_variable_it_is():
    """What `closures` tells a value of a trace that has ended by."""
    kept = []

    def f(x):
        kept.extend([x, x * 2, jnp.array([1.0, 2.0])])
        return kept[1] * kept[2]

    closed = jax.make_jaxpr(f)(jnp.ones(2))
    jaxpr, _ = _jax.opened(closed)
    x, doubled, constant = map(_jax.variable_of, kept)
    assert x is jaxpr.invars[0]
    assert doubled is jaxpr.eqns[0].outvars[0]
    if jax.config.jax_use_simplified_jaxpr_constants:
        assert not jaxpr.constvars
    else:
        assert constant is jaxpr.constvars[0]
    assert _jax.variable_of(jnp.ones(2)) is None


@jax.check_tracer_leaks(False)  # it keeps them
def test_constants_of_programs_in_programs():
    """Also those of the branches of a `cond`, which it holds in a tuple."""
    kept = []

    def f(x):
        kept.append(x * 3)
        g = jax.custom_jvp(lambda a: a * 2)
        g.defjvp(lambda p, t: (p[0] * 2, t[0] * kept[-1]))
        return jax.lax.cond(x[0] > 0, g, lambda a: a, x * 1)

    jaxpr, _ = _jax.opened(jax.make_jaxpr(f)(jnp.ones(2)))
    outer = kept[-1]
    cond = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond")

    def derivative(x):
        return jax.jvp(lambda x: _jax.bind(cond, jnp.int32(1), x), (x,), (x,))

    found, _ = _jax.opened(jax.make_jaxpr(derivative)(jnp.ones(2)))
    assert any(x is outer for x in _jax.held(found))
