"""Public functions of packages that others wrote: every verb is right on each."""

import pytest
from peers.zoo import dynamics, layers, learning, solvers, transport
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
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_zoo(name, verb):
    VERBS[verb](PROGRAMS[name])
