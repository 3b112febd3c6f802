"""Public functions of packages that others wrote: every verb is right on each."""

import pytest
from peers.zoo import dynamics, layers, learning, solvers, transport
from peers.zoo.page import PAGE, page
from peers.zoo.verbs import VERBS

PROGRAMS = {
    f"{program.package}, {name}": program
    for table in (
        dynamics.DIFFRAX,
        dynamics.ODEINT,
        dynamics.BRAX,
        solvers.OPTIMISTIX,
        solvers.LINEAX,
        solvers.JAXOPT,
        learning.RLAX,
        learning.MCTX,
        learning.DISTRAX,
        learning.NUMPYRO,
        learning.BLACKJAX,
        layers.FLAX,
        layers.HAIKU,
        layers.E3NN,
        layers.JRAPH,
        transport.OTT,
    )
    for name, program in table.items()
}

pytestmark = [
    pytest.mark.usefixtures("usual_settings"),
    # what a package says of its own future
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]


# What a verb cannot do with a program yet, and what happens: (program, verb) -> words.
KNOWN: dict[tuple[str, str], str] = {}


def cells():
    """Each verb on each program; `core` are those with one of the verbs in turn."""
    for row, name in enumerate(PROGRAMS):
        for column, verb in enumerate(VERBS):
            reason = KNOWN.get((name, verb))
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
            if (row + column) % len(VERBS) == 0:
                marks.append(pytest.mark.core)
            yield pytest.param(name, verb, marks=marks, id=f"{name}, {verb}")


@pytest.mark.parametrize(("name", "verb"), list(cells()))
def test_zoo(name, verb, record_property):
    record_property("cell", (name, verb))
    VERBS[verb](PROGRAMS[name])


@pytest.mark.core
def test_the_page_says_what_is_tested_here():
    outcomes = {
        (name, verb): "xfailed" if (name, verb) in KNOWN else "passed"
        for name in PROGRAMS
        for verb in VERBS
    }
    assert PAGE.read_text() == page(PROGRAMS, VERBS, outcomes, KNOWN)
