"""Columns of the table: what a loss is a sum of, however the sum is written."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

BETA = 0.1


def of(p, x):
    return x @ p["enc"]


def reconstruction(p, x):
    return jnp.mean((of(p, x) @ p["dec"] - x) ** 2)


def divergence(p, x):
    return jnp.mean(of(p, x) ** 2)


def variables(p, x):
    recon = reconstruction(p, x)
    kl = divergence(p, x)
    return recon + BETA * kl


def total_in_a_variable(p, x):
    recon = reconstruction(p, x)
    kl = divergence(p, x)
    total = recon + BETA * kl
    return total


def augmented(p, x):
    loss = reconstruction(p, x)
    loss += BETA * divergence(p, x)
    return loss


def reassigned(p, x):
    loss = 0.0
    loss = loss + reconstruction(p, x)
    loss = loss + BETA * divergence(p, x)
    return loss


def inline(p, x):
    return reconstruction(p, x) + BETA * divergence(p, x)


def inline_expressions(p, x):
    return jnp.mean((of(p, x) @ p["dec"] - x) ** 2) + BETA * jnp.mean(of(p, x) ** 2)


def dict_of_losses(p, x):
    losses = {"recon": reconstruction(p, x), "kl": BETA * divergence(p, x)}
    return sum(losses.values())


def dict_filled(p, x):
    losses = {}
    losses["recon"] = reconstruction(p, x)
    losses["kl"] = divergence(p, x)
    weights = {"recon": 1.0, "kl": BETA}
    return sum(weights[k] * losses[k] for k in losses)


def python_sum(p, x):
    recon = reconstruction(p, x)
    kl = BETA * divergence(p, x)
    return sum([recon, kl])


def stacked(p, x):
    recon = reconstruction(p, x)
    kl = divergence(p, x)
    return jnp.stack([recon, kl]) @ jnp.array([1.0, BETA])


def outer_mean(p, x):
    recon = jnp.mean((of(p, x) @ p["dec"] - x) ** 2, axis=-1)
    kl = jnp.mean(of(p, x) ** 2, axis=-1)
    return jnp.mean(recon + BETA * kl)


def vmapped(p, x):
    def one(x):
        recon = jnp.mean((x @ p["enc"] @ p["dec"] - x) ** 2)
        kl = jnp.mean((x @ p["enc"]) ** 2)
        return recon + BETA * kl

    return jnp.mean(jax.vmap(one)(x))


def jitted(p, x):
    @jax.jit
    def both(p, x):
        recon = reconstruction(p, x)
        kl = divergence(p, x)
        return recon + BETA * kl

    return both(p, x)


def pair(p, x):
    a = reconstruction(p, x)
    b = divergence(p, x)
    return a, b


def tuple_of_a_call(p, x):
    recon, kl = pair(p, x)
    return recon + BETA * kl


def tuple_kept_whole(p, x):
    both = pair(p, x)
    return both[0] + BETA * both[1]


def tuple_taken_apart_later(p, x):
    both = pair(p, x)
    recon, kl = both
    return recon + BETA * kl


class Out(NamedTuple):
    recon: jax.Array
    kl: jax.Array


def fields_of_a_result(p, x):
    out = Out(*pair(p, x))
    return out.recon + BETA * out.kl


def entries(p, x):
    divergence_of_codes = divergence(p, x)
    return {"recon": reconstruction(p, x), "kl": divergence_of_codes}


def entries_of_a_result(p, x):
    losses = entries(p, x)
    return losses["recon"] + BETA * losses["kl"]


def entries_given_to_variables(p, x):
    losses = entries(p, x)
    recon = losses["recon"]
    kl = losses["kl"]
    return recon + BETA * kl


def entries_of_several_results(p, x):
    first, second = entries(p, x), entries(p, 2 * x)
    return first["recon"] + BETA * second["kl"]


def entries_in_calls(p, x):
    losses = entries(p, x)
    return jnp.mean(losses["recon"]) + BETA * losses["kl"].mean()


def entries_mapped(p, x):
    losses = jax.tree.map(jnp.mean, entries(p, x))
    return losses["recon"] + BETA * losses["kl"]


def sum_of_a_result(p, x):
    losses = entries(p, x)
    return sum(losses.values())


def loop_over_a_result(p, x):
    total = 0.0
    for loss in entries(p, x).values():
        total += loss
    return total


def tree_reduced(p, x):
    return jax.tree.reduce(lambda a, b: a + b, Out(*pair(p, x)))


def list_of_expressions(p, x):
    losses = [reconstruction(p, x), divergence(p, x)]
    return sum(losses)


def one_entry_beside(p, x):
    recon = reconstruction(p, x)
    codes = {"loss": divergence(p, x), "codes": of(p, x)}
    vq_loss = codes["loss"]
    return recon + vq_loss


def tuple_written_out(p, x):
    recon, kl = reconstruction(p, x), divergence(p, x)
    return recon + BETA * kl


def optax_losses(p, x):
    recon = optax.l2_loss(of(p, x) @ p["dec"], x).mean()
    kl = optax.huber_loss(of(p, x)).mean()
    return recon + BETA * kl


def named_points(p, x):
    return sg.name(reconstruction(p, x), "recon") + BETA * sg.name(
        divergence(p, x), "kl"
    )


WAYS = {
    variables: ("recon", "kl"),
    total_in_a_variable: ("recon", "kl"),
    augmented: ("reconstruction(p, x)", "BETA * divergence(p, x)"),
    reassigned: ("reconstruction(p, x)", "BETA * divergence(p, x)"),
    inline: ("reconstruction(p, x)", "BETA * divergence(p, x)"),
    inline_expressions: (
        'jnp.mean((of(p, x) @ p["dec"]...',
        "BETA * jnp.mean(of(p, x) ** 2)",
    ),
    dict_of_losses: ("recon", "kl"),
    dict_filled: ('losses["recon"]', 'losses["kl"]'),
    python_sum: ("recon", "kl"),
    stacked: ("recon", "kl"),
    outer_mean: ("recon", "kl"),
    vmapped: ("recon", "kl"),
    jitted: ("recon", "kl"),
    tuple_of_a_call: ("recon", "kl"),
    tuple_kept_whole: ("both[0]", "both[1]"),
    tuple_taken_apart_later: ("recon", "kl"),
    fields_of_a_result: ("out.recon", "out.kl"),
    entries_of_a_result: ('losses["recon"]', 'losses["kl"]'),
    entries_given_to_variables: ("recon", "kl"),
    entries_of_several_results: ('first["recon"]', 'second["kl"]'),
    entries_in_calls: ('losses["recon"]', 'losses["kl"]'),
    entries_mapped: ('losses["recon"]', 'losses["kl"]'),
    sum_of_a_result: ("recon", "divergence_of_codes"),
    loop_over_a_result: ("recon", "divergence_of_codes"),
    tree_reduced: ("a", "b"),
    list_of_expressions: ("reconstruction(p, x)", "divergence(p, x)"),
    one_entry_beside: ("recon", "vq_loss"),
    tuple_written_out: ("recon", "kl"),
    optax_losses: ("recon", "kl"),
    named_points: ("recon", "kl"),
}
PARAMS = {"enc": jnp.ones((4, 2)), "dec": jnp.ones((2, 4))}
BATCH = jnp.ones((3, 4))


@pytest.mark.parametrize("loss", WAYS, ids=lambda f: f.__name__)
def test_each_part_has_a_column(loss):
    flow = sg.flow(loss, xs="p")(PARAMS, BATCH)
    cells = {row.path: tuple(row.terms.values()) for row in flow.inputs}
    assert cells["p/enc"] == ("flows", "flows")
    assert cells["p/dec"] == ("flows", "unused")
    assert flow.terms == WAYS[loss]


def test_the_side_that_a_sum_reads_is_found_by_its_place():
    def loss(p, x):
        both = pair(p, x)
        return both[1] - BETA * both[0]

    flow = sg.flow(loss, xs="p")(PARAMS, BATCH)
    cells = {row.path: dict(row.terms) for row in flow.inputs if row.terms}
    assert cells["p/dec"] == {"both[1]": "unused", "both[0]": "flows"}


def test_a_loop_over_layers_is_one_column():
    def loss(p, x):
        data = jnp.mean((x @ p["w"]) ** 2)
        penalty = 0.0
        for w in p.values():
            penalty += jnp.sum(w**2)
        return data + 1e-3 * penalty

    flow = sg.flow(loss, xs="p")({"w": jnp.ones((4, 2)), "v": jnp.ones(3)}, BATCH)
    assert flow.terms == ("data", "penalty")
    cells = {row.path: tuple(row.terms.values()) for row in flow.inputs}
    assert cells == {"p/v": ("unused", "flows"), "p/w": ("flows", "flows"), "x": ()}


def test_parts_of_one_expression_in_a_loop_are_one_column():
    def loss(p, x):
        total = jnp.mean((x @ p["w"]) ** 2)
        for w in p.values():
            total += 1e-3 * jnp.sum(w**2)
        return total

    flow = sg.flow(loss, xs="p")({"w": jnp.ones((4, 2)), "v": jnp.ones(3)}, BATCH)
    assert flow.terms == ('jnp.mean((x @ p["w"]) ** 2)', "1e-3 * jnp.sum(w**2)")


@pytest.mark.parametrize(
    "f",
    [
        lambda w, x: x @ w,
        lambda w, x: jnp.sum((x @ w) ** 2),
        lambda w, x: jnp.exp(jnp.sum(x @ w) + jnp.sum(w)),
        lambda w, x: jnp.sum(x @ w) * jnp.sum(w),
        lambda w, x: jnp.maximum(jnp.sum(x @ w), jnp.sum(w)),
        lambda w, x: jnp.sum(jax.nn.relu(x @ w)),
    ],
    ids=["product", "square", "exp", "times", "max", "relu"],
)
def test_what_is_no_sum_has_no_columns(f):
    assert sg.flow(f, xs="w")(jnp.ones((4, 2)), BATCH).terms == ()


def test_a_part_that_is_computed_from_another_is_no_column():
    def loss(w, x):
        h = jnp.mean(x @ w)
        return h + jnp.sin(h)

    assert sg.flow(loss, xs="w")(jnp.ones((4, 2)), BATCH).terms == ()


def test_a_stopped_part_has_a_column_only_for_what_it_trains():
    def loss(p, x):
        recon = reconstruction(p, x)
        commit = jnp.mean((jax.lax.stop_gradient(of(p, x)) - p["code"]) ** 2)
        return recon + commit

    params = {**PARAMS, "code": jnp.ones(2)}
    flow = sg.flow(loss, xs="p")(params, BATCH)
    assert flow.terms == ("recon", "commit")
    cells = {row.path: tuple(row.terms.values()) for row in flow.inputs}
    assert cells["p/code"] == ("unused", "flows")
    assert cells["p/enc"] == ("flows", "cut")


X = jnp.ones(3)


def half_stopped(w, x):
    data = jnp.mean((x * w) ** 2)
    reg = jnp.sum(jax.lax.stop_gradient(w) ** 2)
    return data + 0.1 * reg + jax.lax.stop_gradient(jnp.sum(jnp.abs(w)))


def half_rounded(w, x):
    data = jnp.mean((x * w) ** 2)
    steps = jnp.sum(jnp.floor(w) * x)
    return (data - 3.0 * steps) / 2


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (half_stopped, {"data": "flows", "reg": "cut", "stopped": "cut"}),
        (half_rounded, {"data": "flows", "steps": "cut"}),
    ],
)
def test_a_part_that_trains_nothing_is_a_column(loss, expected):
    (row,) = (i for i in sg.flow(loss, xs="w")(X, X).inputs if i.path == "w")
    cells = {n if n.isidentifier() else "stopped": c for n, c in row.terms.items()}
    assert cells == expected
    assert row.status == "flows"


def counted(a, b):
    hits = jnp.sum(b > 0)
    return jnp.sum(a) + hits


def counted_inline(a, b):
    return jnp.sum(a) + jnp.argmax(b)


def counted_with_a_weight(a, b):
    main, correct = jnp.sum(a), jnp.sum(b > 0)
    return main + 0.1 * correct


def counted_in_place(a, b):
    total, n = jnp.sum(a), jnp.argmax(b)
    total += n
    return total


def halved(a, b):
    return jnp.sum(a) - jnp.sum(jnp.round(b).astype(jnp.float16))


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (counted, ("jnp.sum(a)", "hits")),
        (counted_inline, ("jnp.sum(a)", "jnp.argmax(b)")),
        (counted_with_a_weight, ("main", "correct")),
        (counted_in_place, ("jnp.sum(a)", "n")),
        (halved, ("jnp.sum(a)", "jnp.sum(jnp.round(b).astype(j...")),
    ],
)
def test_what_a_sum_casts_by_itself_keeps_its_name(loss, names):
    flow = sg.flow(loss)(X, X)
    assert flow.terms == names
    cells = [tuple(row.terms.values()) for row in flow.inputs]
    assert cells == [("flows", "unused"), ("unused", "cut")]


def test_a_part_of_data_alone_is_no_column():
    def loss(w, x):
        data, other = jnp.mean((x * w) ** 2), jnp.sum(jnp.round(x))
        return data + jnp.sum(w) + other

    (row,) = (i for i in sg.flow(loss, xs="w")(X, X).inputs if i.path == "w")
    assert row.terms == {"data": "flows", "jnp.sum(w)": "flows"}


def two_of_one_name(w, x):
    h = jnp.tanh(x * w)
    h = h * 2
    data, extra = jnp.mean(h**2), jnp.sum(jnp.sin(w))
    return extra + data


@pytest.mark.parametrize("nth", [0, 1])
def test_what_one_variable_trains_is_told_as_for_all_of_them(nth):
    asked = [sg.var("h", nth=0), sg.var("h", nth=1)]
    flow = sg.flow(two_of_one_name, xs=asked)(X, X)
    assert "through" not in str(flow.explain())  # there is one part that they reach
    flow = sg.flow(two_of_one_name, xs=[*asked, "w"])(X, X)
    assert "h (f32[3]): can get a gradient, through data only." in str(flow.explain())
    assert str(flow.explain(asked[nth])).splitlines()[0] in str(flow.explain())
