"""Big pictures: what is merged, and what is not."""

import graphlib
import random
import sys

import pytest

from stopgrad_jax._flow.model import Edge, Picture, Site, Step
from stopgrad_jax._flow.shrink import merged, too_big


def step(number, kind="step", label="", **more):
    site = Site("m.py", number + 1, 0, number + 1, 9, "f", "", "user")
    more.setdefault("flows", kind != "cut")
    return Step(number, kind, label or f"h{number}", "f32[2]", site=site, **more)


def chain(count, cut_at=()):
    """x -> h1 -> ... -> output; a cut hangs off the chain at some places."""
    steps, edges, last = [step(0, "input", "x")], [], 0
    for place in range(1, count + 1):
        number = len(steps)
        steps.append(step(number, label=f"h{place}"))
        edges.append(Edge(last, number, "flow"))
        if place in cut_at:
            steps.append(step(number + 1, "cut", f"stop{place}"))
            edges.append(Edge(number, number + 1, "cut"))
        last = number
    steps.append(step(len(steps), "output", "output"))
    edges.append(Edge(last, len(steps) - 1, "flow"))
    return Picture("chain", tuple(steps), tuple(edges), ())


def assert_sound(picture):
    assert [one.id for one in picture.steps] == list(range(len(picture.steps)))
    before = {one.id: set() for one in picture.steps}
    for edge in picture.edges:
        before[edge.target].add(edge.source)
    tuple(graphlib.TopologicalSorter(before).static_order())  # raises on a cycle
    pairs = [(edge.source, edge.target) for edge in picture.edges]
    assert len(set(pairs)) == len(pairs)


def test_a_chain_becomes_one_step():
    small = merged(chain(200))
    assert [one.label for one in small.steps] == ["x", "h1 ... h200", "output"]
    one = small.steps[1]
    assert (one.kind, one.detail, one.flows) == ("step", "200 steps", True)
    assert one.site is not None
    assert one.site.line == 2
    assert small.edges == (Edge(0, 1, "flow"), Edge(1, 2, "flow"))


def test_cuts_stay_in_their_places():
    small = merged(chain(200, cut_at=range(10, 200, 10)))
    assert_sound(small)
    assert len(small.steps) == 41
    labels = [one.label for one in small.steps]
    assert labels[:4] == ["x", "h1 ... h10", "stop10", "h11 ... h20"]
    assert small.edges[:3] == (
        Edge(0, 1, "flow"),
        Edge(1, 2, "cut"),
        Edge(1, 3, "flow"),
    )


def test_many_cuts_hang_off_one_step():
    small = merged(chain(100, cut_at=range(2, 100, 2)))
    assert_sound(small)
    assert len(small.steps) == 52
    assert "h1 ... h100" in [one.label for one in small.steps]


def test_steps_side_by_side_are_merged_last():
    steps = (step(0, "cut", "a"), step(1, "cut", "b"), *map(step, range(2, 80)))
    edges = tuple(Edge(i % 2, i, "value") for i in range(2, 80))
    small = merged(Picture("t", steps, edges, ()))
    assert [one.label for one in small.steps] == ["a", "b", "h2 ... h79"]


def test_a_small_picture_is_left_as_it_is():
    picture = chain(58)
    assert merged(picture) is picture
    assert len(merged(picture, most=59).steps) == 3


@pytest.mark.parametrize(
    "changed",
    [{"box": 1}, {"flows": False}, {"kind": "gate"}],
    ids=["box", "still", "gate"],
)
def test_a_different_step_is_not_merged(changed):
    picture = chain(100)
    odd = Step(**{**vars(picture.steps[50]), **changed})
    steps = (*picture.steps[:50], odd, *picture.steps[51:])
    small = merged(Picture("t", steps, picture.edges, ()))
    labels = ["x", "h1 ... h49", "h50", "h51 ... h100", "output"]
    assert [one.label for one in small.steps] == labels


def test_the_same_name_again_and_again_is_said_once():
    steps = tuple(step(i, label="h") for i in range(100))
    edges = tuple(Edge(i, i + 1, "flow") for i in range(99))
    (one,) = merged(Picture("t", steps, edges, ())).steps
    assert (one.label, one.detail) == ("h", "100 steps")


def test_the_edge_that_says_most_is_kept():
    picture = chain(100)
    more = (Edge(0, 50, "value"), Edge(0, 70, "shadow"))
    small = merged(Picture("t", picture.steps, more + picture.edges, ()))
    assert small.edges == (Edge(0, 1, "flow"), Edge(1, 2, "flow"))


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("in_order", [True, False])
def test_no_cycle_arises(seed, in_order):
    rng = random.Random(seed)
    kinds = [rng.choice(["step"] * 6 + ["cut", "input"]) for _ in range(120)]
    steps = [
        step(i, kind, flows=rng.random() < 0.8, box=rng.choice([None, None, 1]))
        for i, kind in enumerate(kinds)
    ]
    order = list(range(120))
    if not in_order:
        rng.shuffle(order)
    edges = tuple(
        Edge(order[i], order[rng.randrange(i + 1, min(i + 9, 120))], "flow")
        for i in range(119)
        for _ in range(2)
    )
    edges = tuple(edge for edge in edges if kinds[edge.target] != "input")
    small = merged(Picture("t", tuple(steps), edges, ()))
    assert_sound(small)
    counted = [int((one.detail or "1").split()[0]) for one in small.steps]
    assert sum(counted) == 120


def test_work_is_linear():
    def calls(n):
        """Functions that are called to shrink a chain, those written in C too."""
        picture, counted = chain(n, cut_at=range(100, n, 100)), 0

        def count(frame, event, arg):
            nonlocal counted
            counted += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            merged(picture)
        finally:
            sys.setprofile(None)
        return counted

    assert calls(80_000) < 4.2 * calls(20_000)


def test_too_big():
    assert not too_big(chain(298))
    assert too_big(chain(299))
    assert too_big(chain(5), most=6)
