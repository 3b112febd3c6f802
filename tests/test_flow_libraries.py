"""Cuts, loops and files that are not the user's own."""

import inspect
import pathlib
import runpy

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")


def quantized(which):
    def net(x):
        return hk.nets.VectorQuantizer(2, 5, 0.25)(x, is_training=True)[which]

    net = hk.transform(net)

    def loss(params, x):
        return jnp.sum(net.apply(params, None, x) ** 2) + jnp.sum(x)

    return loss, net.init(jax.random.key(0), jnp.ones((3, 2)))


@pytest.mark.parametrize(
    ("which", "by", "reason", "called"),
    [
        ("quantize", "params", "stop_gradient", "jax.lax.stop_gradient(quantized"),
        ("perplexity", "x", "integer", "jnp.argmax("),
        ("perplexity", "params", "integer", "jnp.argmax("),
    ],
)
def test_a_cut_in_a_package_is_named_with_its_own_line(which, by, reason, called):
    loss, params = quantized(which)
    flow = sg.flow(loss, xs=by)(params, jnp.ones((3, 2)))
    cuts = [cut for cut in flow.cuts if cut.reason == reason]
    (cut,) = cuts
    assert cut.site.expr.startswith("hk.nets.VectorQuantizer(2, 5, 0.25)(x")
    assert cut.inside.file == "haiku/_src/nets/vqvae.py"
    file = pathlib.Path(inspect.getsourcefile(hk.nets.VectorQuantizer))
    line = file.read_text().splitlines()[cut.inside.line - 1]
    assert called in line
    assert called in cut.inside.expr
    page = str(flow.explain(by))
    assert f"{cut.inside.place} in VectorQuantizer" in page
    assert cut.words in page
    assert line.strip() in page
    assert f"({cut.inside.place})" in str(flow)
    told = [c.words for c in flow.cuts if any(row.startswith(by) for row in c.inputs)]
    assert sum(page.count(f". {words}") for words in {*told}) == len(told)


def test_a_loop_inside_a_package_is_no_loop_of_the_user():
    net = eqx.nn.MLP(3, 3, 3, 3, key=jax.random.key(0))

    def once(x):
        h = net(x)
        return jnp.sum(h)

    def thrice(x):
        h = x
        for _ in range(3):
            h = net(h)
        return jnp.sum(h)

    for f, times in ((once, 1), (thrice, 3)):
        steps = sg.flow(f)(jnp.ones(3)).steps
        assert [step.repeat for step in steps if step.label == "h"][-1] == times


def test_files_elsewhere_are_printed_from_their_package_or_project(tmp_path):
    package = tmp_path / "acme" / "losses"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    project = tmp_path / "project" / "src"
    project.mkdir(parents=True)
    (project.parent / "pyproject.toml").write_text("")
    lone = tmp_path / "somewhere"
    lone.mkdir()
    places = {
        package / "mpo.py": "acme/losses/mpo.py",
        project / "train.py": "src/train.py",
        lone / "script.py": "somewhere/script.py",
    }
    for file, printed in places.items():
        file.write_text(
            "import jax\ndef f(x):\n    y = jax.numpy.round(x)\n    return y\n"
        )
        space = runpy.run_path(str(file))
        (cut,) = sg.flow(space["f"])(1.0).cuts
        assert cut.site.place == f"{printed}:3"
