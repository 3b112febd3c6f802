"""The public edge: what a user sees of an error, and checks that nobody called."""

import gc
import pathlib
import re
import subprocess
import sys
import traceback
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

BEATS = r"[\s\S]*got: [\s\S]*write: "
W = X = jnp.ones(3, jnp.float32)


def loss(w, x):
    h = sg.name(w * x, "h")
    return jnp.sum(h)


async def slowly(w):
    return w


def yielding(w):
    yield w


def _wrong(ct, out, x):
    return (ct,)


# Tracebacks ---------------------------------------------------------------------------

WRONG = {
    "address": lambda: sg.gradients(loss, "q")(W, X),
    "when made": lambda: sg.gradients(loss, [])(W, X),
    "parameter": lambda: sg.scale_gradient(W, "x"),
    "inside": lambda: sg.gradients(lambda w: sg.mask_gradient(w, 1.0), "w")(W),
    "jitted": lambda: jax.jit(sg.gradients(loss, "q"))(W, X),
    "edit": lambda: sg.edit(loss, {"h": lambda h: h[:1]})(W, X),
    "contract": lambda: sg.assert_no_gradient(loss, "w")(W, X),
    "in one call": lambda: sg.assert_no_gradient(loss, "w", args=(W, X)),
    "prevented": lambda: jax.grad(lambda w: sg.prevent_gradient(w, "no").sum())(W),
    "prevented, jitted": lambda: jax.jit(
        jax.grad(lambda w: sg.prevent_gradient(w, "no").sum())
    )(W),
    "where": lambda: sg.stop_gradient({"a": W}, "b"),
    "call": lambda: sg.gradients(loss, argnums=0),
    "check": lambda: sg.check_gradients(loss, order=3)(W, X),
    "checked": lambda: sg.check_gradients(sg.with_backward(jnp.sin, _wrong))(W),
    "estimator": lambda: sg.quantize.fake_quant(W, "8"),
    "given": lambda: sg.sample.top_k_mask(W, 9),
    "surrogate": lambda: jax.jit(sg.surrogate.spike)(jnp.arange(3)),
    "frozen": lambda: sg.freeze(optax.sgd(1.0), "b").init({"a": W}),
    "step": lambda: sg.train.make_step(loss, optax.sgd(1.0), frozen="b").init({"a": W}),
    "nonfinite, address": lambda: sg.find_nonfinite(loss, "q")(W, X),
    "nonfinite, call": lambda: sg.find_nonfinite(loss, argnums=0),
    "nonfinite, traced": lambda: jax.jit(sg.find_nonfinite(loss))(W, X),
}


@pytest.mark.parametrize("case", WRONG)
def test_no_frame_of_the_package_is_shown(case):
    package = str(pathlib.Path(sg.__file__).parent)
    with pytest.raises((TypeError, ValueError, AssertionError, LookupError)) as caught:
        WRONG[case]()
    text = "".join(traceback.format_exception(caught.value))
    assert package not in text
    assert f'"{__file__}"' in text


def test_the_users_own_error_keeps_its_frames():
    def broken(w):
        return undefined(w)  # noqa: F821

    with pytest.raises(NameError) as caught:
        sg.gradients(broken, "w")(W)
    names = [entry.name for entry in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-1] == "broken"
    assert not {"gradients_of", "trace", "run"}.intersection(names)


def test_all_frames_on_request(monkeypatch):
    monkeypatch.setenv("STOPGRAD_TRACEBACK", "full")
    with pytest.raises(sg.AddressError) as caught:
        sg.gradients(loss, "q")(W, X)
    files = [
        entry.filename for entry in traceback.extract_tb(caught.value.__traceback__)
    ]
    assert any(file.endswith("lookup.py") for file in files)


def test_the_exception_is_called_as_users_import_it():
    with pytest.raises(sg.AddressError) as caught:
        sg.gradients(loss, "q")(W, X)
    text = "".join(traceback.format_exception(caught.value))
    assert "\nstopgrad_jax.AddressError: " in text


# Values where functions are wanted ----------------------------------------------------

CALLS = {
    "flow": lambda: sg.flow(loss(W, X)),
    "gradients": lambda: sg.gradients(loss(W, X), "w"),
    "stats": lambda: sg.gradient_stats(W, "w"),
    "capture": lambda: sg.capture(loss(W, X), "h"),
    "edit": lambda: sg.edit(W, {"h": jnp.sin}),
    "perturb": lambda: sg.perturb(W, "h"),
    "contract": lambda: sg.assert_gradient(loss(W, X), "w"),
    "nonfinite": lambda: sg.find_nonfinite(loss(W, X)),
    "straight-through": lambda: sg.straight_through(jnp.round(W), W),
    "with-backward": lambda: sg.with_backward(jnp.sin, None),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_value_in_place_of_a_function(case):
    with pytest.raises(TypeError, match=f"is a function{BEATS}") as caught:
        CALLS[case]()
    assert "Array(" not in str(caught.value)
    assert "truth value" not in str(caught.value)


@pytest.mark.parametrize("fun", [slowly, yielding], ids=["async", "generator"])
@pytest.mark.parametrize(
    "verb", [sg.gradients, sg.gradient_stats, sg.assert_gradient, sg.find_nonfinite]
)
def test_functions_that_return_no_arrays(verb, fun):
    with pytest.raises(TypeError, match=f"{fun.__name__}, a"):
        verb(fun, "w")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: sg.gradients(loss, W), r"xs must be addresses.*\n  got:   f32\[3\] "),
        (lambda: sg.gradients(loss, {"w": W}), r"gradients\(loss, {'w': f32\[3\]}\)"),
        (lambda: sg.gradients(loss), 'missing.*\n  write: gradients\\(fun, "w"\\)'),
        (lambda: sg.capture(loss), r"missing.*\n  write: capture\(fun, names\)$"),
        (
            lambda: sg.check_gradients(loss, 1),
            r"write: check_gradients\(fun, order=order",
        ),
        (lambda: sg.flow(loss, "w", None, 1), r"write: flow\(fun, xs, ys, internals=i"),
        (lambda: sg.gradients(loss, argnums=0), r"write: gradients\(fun, 0\)"),
        (lambda: sg.gradients(loss, "w", y="h"), "unexpected keyword argument 'y'"),
        (lambda: sg.flow(loss, W), r"xs must be addresses.*\n  got:   f32\[3\] "),
        (lambda: sg.flow(loss)(), r"loss\(w, x\): the arguments that it takes"),
        (lambda: sg.gradients(loss, "w")(W, y=X), "unexpected keyword argument 'y'"),
        (lambda: sg.find_nonfinite(loss, W), "xs must be addresses"),
        (lambda: sg.edit(loss, ["h"]), "edits are a dict"),
        (lambda: sg.edit(loss, {"h": 3.0}), "edits are a dict"),
        (lambda: sg.perturb(loss, "h")(W, X), "the perturbations are a dict"),
        (lambda: sg.assert_gradient(loss, "w", args=W), r"write: args=\(w, x\)"),
        (
            lambda: sg.with_backward(jnp.sin, lambda ct: (ct,))(W),
            r"a function of 3 arguments[\s\S]*write: lambda ct, out, x0: ",
        ),
        (lambda: sg.stop_gradient(loss), "what the function returns"),
        (
            lambda: sg.mask_gradient({"a": W}, "a"),
            r"write: sg.mask_gradient\(tree, sg.mask\(tree, 'a'\)\)",
        ),
        (
            lambda: sg.stop_gradient({"a": W}, sg.var("a")),
            "by their paths",
        ),
    ],
)
def test_wrong_calls_in_four_beats(call, expected):
    with pytest.raises(TypeError, match=expected) as caught:
        call()
    assert re.search(BEATS, str(caught.value))


def test_what_the_mask_error_says_to_write_works():
    tree = {"a": W, "b": X}
    gated = lambda tree: sg.mask_gradient(tree, sg.mask(tree, "a"))
    grads = jax.grad(lambda tree: sum(map(jnp.sum, gated(tree).values())))(tree)
    assert (grads["a"] == 1.0).all()
    assert (grads["b"] == 0.0).all()


# Checks that nobody called ------------------------------------------------------------

CHECKS = {
    "assert_gradient": lambda: sg.assert_gradient(loss, "w"),
    "assert_no_gradient": lambda: sg.assert_no_gradient(loss, "w"),
    "check_gradients": lambda: sg.check_gradients(loss),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_that_is_never_called_warns(name):
    with pytest.warns(RuntimeWarning, match=rf"{name}\(.*was never called") as caught:
        CHECKS[name]()
    (warning,) = caught
    of = "loss" if name == "check_gradients" else "loss, 'w'"
    assert f"write {name}({of})(*args)" in str(warning.message)
    assert "test_edge.py:" in str(warning.message)


def test_a_check_that_is_called_or_failed_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check = sg.assert_gradient(loss, "w")
        assert repr(check) == (
            "<assert_gradient(loss, 'w'): to be called with the function's arguments>"
        )
        check(W, X)
        sg.assert_gradient(loss, "w", args=(W, X))
        sg.assert_gradient(loss, "w", kwargs={"w": W, "x": X})
        with pytest.raises(AssertionError, match="expected none"):
            sg.assert_no_gradient(loss, "w")(W, X)
        with pytest.raises(TypeError):
            sg.assert_gradient(loss, "w", args=3)
        del check
        gc.collect()


def test_the_one_call_form_is_the_other():
    assert sg.assert_gradient(loss, "w", args=(W, X)) is None
    with pytest.raises(AssertionError) as one:
        sg.assert_no_gradient(loss, "w", None, (W, X))
    with pytest.raises(AssertionError) as two:
        sg.assert_no_gradient(loss, "w")(W, X)
    assert str(one.value) == str(two.value)


def test_a_test_suite_hears_of_a_contract_that_asserts_nothing(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import stopgrad_jax as sg\n"
        "def test_it():\n    sg.assert_gradient(lambda w: w, 'w')\n"
    )
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(
        run, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert "was never called, so it checks nothing" in done.stdout
