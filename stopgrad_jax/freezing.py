"""Optimizers for which frozen means frozen, bit for bit.

A stopped gradient is a zero gradient, and an optimizer that decays weights or has
momentum moves a weight whose gradient is zero. `freeze` hides the frozen leaves from
the optimizer instead: no state, no decay, no momentum, no part in any norm.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import stopgrad_jax._jax as _jax

from ._address import leaf_paths, printed
from ._edge import public
from ._errors import beats, shortened, type_of, wrong
from ._trees import Split
from ._where import Where, is_predicate, leaves_like, selected

__all__ = ["freeze", "migrate_state"]


@public
def freeze(
    optimizer: optax.GradientTransformation, where: Where
) -> optax.GradientTransformationExtraArgs:
    """Hide the leaves that `where` selects from an optimizer.

    Forward: updates of the other leaves are those of the optimizer on them alone; that
    of a frozen leaf is -0.0, which leaves every bit of it as it is. (Save subnormal
    numbers, below 1.2e-38, where `optax.apply_updates` runs on its own on a CPU: XLA's
    addition takes them for zero.)
    Backward: gradients at frozen leaves are ignored; to not compute them, differentiate
    by one part of `sg.partition`.

    Args:
      optimizer: any optax transformation, or whatever has `init` and `update`.
      where: what to freeze: a path from the parameters' root, a list of paths, a
        boolean pytree, or a predicate (path, leaf). Leaves that carry no gradient are
        always frozen.

    Returns:
      An optax transformation. Its state is the optimizer's own, with
      `optax.MaskedNode()` at frozen leaves. `update(updates, state, params)` takes all
      gradients, or None at leaves that do not train. What is given to it by keyword is
      of all parameters too: a tree like them (`grad`) is hidden as the gradients are,
      a function of them (`value_fn` of `optax.lbfgs`) is called with the frozen leaves
      put in. At strings, functions and keys its updates are None, which
      `equinox.apply_updates` passes over.

    Raises:
      AddressError: `where` selects no leaf that carries a gradient.
      ValueError: a leaf that trains has no gradient, the structures differ, or `where`
        selects other leaves in `update` than in `init` (flax's nnx.Optimizer shows its
        boxes to `init` only: select by path there).

    Example:
        >>> import jax, optax, stopgrad_jax as sg
        >>> params = {"encoder": 1.0, "head": 1.0}
        >>> tx = sg.freeze(optax.adamw(0.1, weight_decay=0.1), "encoder")
        >>> state = tx.init(params)
        >>> gradients = {"encoder": None, "head": 2.0}
        >>> updates, state = tx.update(gradients, state, params)
        >>> new = optax.apply_updates(params, updates)
        >>> print(new["encoder"], f"{new['head']:.3f}")
        1.0 0.890
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise wrong(
            TypeError,
            "freeze(optimizer, where)",
            "an optax transformation",
            f"{optimizer!r:.60}",
            "sg.freeze(optax.adam(1e-3), where)",
        )
    if not isinstance(optimizer, optax.GradientTransformation):  # optax.MultiSteps
        pair = (optimizer.init, optimizer.update)
        optimizer = optax.GradientTransformationExtraArgs(*pair)
    inner = optax.with_extra_args_support(optimizer)
    selections: dict[tuple[str, ...], list[bool]] = {}  # only to compare, see below

    @public
    def init(params: Any) -> Any:
        trains = _trains(params, where, "init(params)")
        selections[_places(params)] = trains
        return inner.init(_hidden(params, trains))

    @public
    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        called = "update(updates, state, params)"
        if params is None:
            return _update_alone(inner, where, updates, state, extra)
        trains = _trains(params, where, called)
        if selections.get(_places(params), trains) != trains:
            before = selections[_places(params)]
            raise ValueError(_changed(params, before, trains, called))
        wanted = _wanted(updates, params, trains, called)
        extra = {k: _given(x, params, trains) for k, x in extra.items()}
        new, state = inner.update(wanted, state, _hidden(params, trains), **extra)
        return _filled(new, params, trains), state

    return optax.GradientTransformationExtraArgs(init, update)


@public
def migrate_state(
    state: Any,
    old: optax.GradientTransformation,
    new: optax.GradientTransformation,
    params: Any,
) -> Any:
    """Carry an optimizer's state over to the same optimizer with another `where`.

    For freezing or thawing in mid-training.

    Forward: what both states hold (moments of leaves that train in both, counts,
    accumulated gradients, hyperparameters) is kept; what only the new one holds (leaves
    that are thawed) is fresh; what only the old one held is dropped.
    Backward: none.

    Args:
      state: a state of `old`.
      old: the optimizer so far, frozen or not.
      new: the same optimizer under another `freeze`, or under none.
      params: the parameters.

    Returns:
      A state of `new`.

    Raises:
      ValueError: `state` is no state of `old`, the two are not the same optimizer, or
        it keeps something of several parameters in one array (`optax.flatten`).

    Example:
        >>> import jax.numpy as jnp, optax, stopgrad_jax as sg
        >>> params = {"encoder": 1.0, "head": 1.0}
        >>> old = optax.sgd(0.1, momentum=0.9)
        >>> _, state = old.update({"encoder": 2.0, "head": 3.0}, old.init(params))
        >>> new = sg.freeze(old, "encoder")
        >>> state = sg.migrate_state(state, old, new, params)
        >>> print(state[0].trace["encoder"], state[0].trace["head"])
        MaskedNode() 3.0
    """
    called = "migrate_state(state, old, new, params)"
    expected = jax.eval_shape(lambda: old.init(params))
    fresh = new.init(params)
    if _described(state) != _described(expected):
        raise wrong(
            ValueError,
            called,
            f"state is a state of old on these params, {_described(expected)}",
            str(_described(state)),
            "the state that old.init or old.update returned",
        )
    _require_same_optimizer(expected, fresh, called)
    known = dict(jax.tree_util.tree_flatten_with_path(state)[0])
    flat, structure = jax.tree_util.tree_flatten_with_path(fresh)
    for path, leaf in flat:
        was = known.get(path, leaf)
        if jnp.shape(was) != jnp.shape(leaf):  # as of `optax.flatten`
            raise wrong(
                ValueError,
                called,
                "an optimizer whose state has an array for each parameter",
                f'"{printed(path)}" of shape {list(jnp.shape(was))}, where new has '
                f"{list(jnp.shape(leaf))}",
                "new.init(params), to begin with a fresh state",
            )
    return structure.unflatten([known.get(path, leaf) for path, leaf in flat])


def _trains(tree: Any, where: Where, called: str) -> list[bool]:
    frozen = selected(tree, where, f"freeze(optimizer, {where!r:.60}).{called}")
    leaves = jax.tree.leaves(tree)
    pairs = zip(leaves, frozen, strict=True)
    return [_jax.carries_gradient(leaf) and not f for leaf, f in pairs]


def _places(tree: Any) -> tuple[str, ...]:
    """Paths of the leaves, the same with flax's boxes as without."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return tuple(printed(path).removesuffix("/value") for path, _ in flat)


def _changed(tree: Any, before: list[bool], now: list[bool], called: str) -> str:
    triples = zip(_places(tree), before, now, strict=True)
    path, trained, _ = next(t for t in triples if t[1] != t[2])
    words = ("frozen", "training") if not trained else ("training", "frozen")
    return beats(
        f"freeze(optimizer, where).{called}",
        "where selects the same leaves as in init",
        f'"{path}" {words[0]} in init and {words[1]} here',
        "where as paths: a predicate may be shown other leaves (flax boxes) here",
    )


def _update_alone(
    inner: Any, where: Where, updates: Any, state: Any, extra: Any
) -> Any:
    """Update without parameters: a None is frozen if `where` says so, else no leaf."""
    called = "update(updates, state)"
    is_none = lambda g: g is None  # noqa: E731
    # A number stands for each None, so that the place has a path.
    places = jax.tree.map(lambda g: -0.0 if g is None else g, updates, is_leaf=is_none)
    if is_predicate(where):
        raise wrong(
            TypeError,
            f"freeze(optimizer, where).{called}",
            "params, for a function in where to be asked of",
            "none",
            "update(updates, state, params)",
        )
    trains = _trains(places, where, called)
    gradients = jax.tree.leaves(updates, is_leaf=is_none)
    structure = jax.tree.structure(places)
    wanted = _masked(structure, gradients, trains)
    try:
        new, state = inner.update(wanted, state, None, **extra)
    except (TypeError, ValueError) as error:
        raise wrong(
            ValueError,
            f"freeze(optimizer, where).{called}",
            "gradients that fit the optimizer's state",
            shortened(error),
            "update(updates, state, params): only params tell which leaves carry "
            "no gradient",
        ) from error
    return _filled(new, places, trains), state


def _hidden(tree: Any, trains: list[bool]) -> Any:
    return _masked(jax.tree.structure(tree), jax.tree.leaves(tree), trains)


def _masked(structure: Any, leaves: list[Any], trains: list[bool]) -> Any:
    pairs = zip(leaves, trains, strict=True)
    return structure.unflatten([x if t else optax.MaskedNode() for x, t in pairs])


def _wanted(gradients: Any, tree: Any, trains: list[bool], called: str) -> Any:
    """Return the gradients of the leaves that train, in a tree that hides the rest."""
    structure = jax.tree.structure(tree)
    try:
        leaves = leaves_like(gradients, tree)
    except (ValueError, TypeError):
        raise wrong(
            ValueError,
            called,
            f"gradients have the structure of params, {structure}",
            str(jax.tree.structure(gradients)),
            "jax.grad(loss)(params), or None at frozen leaves",
        ) from None
    for k, (gradient, train) in enumerate(zip(leaves, trains, strict=True)):
        if train and gradient is None:
            path = leaf_paths(tree)[k]
            raise wrong(
                ValueError,
                called,
                "a gradient at each leaf that trains",
                f'None at "{path}", which is not frozen',
                f'sg.freeze(optimizer, [..., "{path}"]), or '
                'unconnected_gradients="zero"',
            )
    return _masked(structure, leaves, trains)


def _given(x: Any, params: Any, trains: list[bool]) -> Any:
    """Turn what is given by keyword, of all parameters, into the optimizer's own."""
    structure, leaves = jax.tree.structure(params), jax.tree.leaves(params)
    hidden = jax.tree.structure(_hidden(params, trains))

    def whole(tree: Any) -> Any:
        if jax.tree.structure(tree) != hidden:
            return tree
        return structure.unflatten(Split(trains).joined(jax.tree.leaves(tree), leaves))

    if is_predicate(x):

        @functools.wraps(x)  # a line search asks which arguments it takes
        def of_whole(*args: Any, **kwargs: Any) -> Any:
            return x(*map(whole, args), **kwargs)

        return of_whole
    if jax.tree_util.all_leaves([params]) or not _is_like(x, params):
        return x
    return _masked(structure, leaves_like(x, params), trains)


def _is_like(tree: Any, params: Any) -> bool:
    """Tell a gradient, or what else has an array like it for each parameter."""
    try:
        pairs = zip(leaves_like(tree, params), jax.tree.leaves(params), strict=True)
    except (ValueError, TypeError):
        return False
    same = (
        x is None or (hasattr(x, "shape") and x.shape == jnp.shape(p))
        for x, p in pairs
        if _jax.carries_gradient(p)
    )
    return tree is not None and all(same)


def _filled(updates: Any, tree: Any, trains: list[bool]) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    triples = zip(structure.flatten_up_to(updates), leaves, trains, strict=True)
    return structure.unflatten([u if t else _nothing(x) for u, x, t in triples])


def _nothing(leaf: Any) -> Any:
    """Return the update that leaves every bit as it is: -0.0 + -0.0 is -0.0."""
    if _jax.carries_gradient(leaf):
        zero = complex(-0.0, -0.0) if jnp.iscomplexobj(leaf) else -0.0
        return jnp.full_like(leaf, zero)
    if isinstance(leaf, bool | int):
        return jnp.zeros_like(leaf)
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return None  # a string, a function, a key: nothing can be added to it
    return jnp.zeros_like(leaf)


def _described(state: Any) -> dict[str, str]:
    """Return the path and the type of each array, but for its weakness."""
    pairs = zip(leaf_paths(state), jax.tree.leaves(state), strict=True)
    return {path: type_of(jax.typeof(x)) for path, x in pairs}


def _require_same_optimizer(old: Any, new: Any, called: str) -> None:
    """Compare two states, but for what is hidden in either."""

    def is_hidden(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    flat = [
        jax.tree_util.tree_flatten_with_path(s, is_leaf=is_hidden)[0]
        for s in (old, new)
    ]
    hidden = {path for pairs in flat for path, x in pairs if is_hidden(x)}

    def seen(pairs: Any) -> set[Any]:
        paths = {path for path, _ in pairs}
        above = {p: {p[:k] for k in range(len(p) + 1)} for p in paths}
        return {printed(p) for p in paths if not above[p] & hidden}

    ours, theirs = map(seen, flat)
    if ours != theirs:
        raise wrong(
            ValueError,
            called,
            f"new is the optimizer of old under another freeze: {sorted(ours)}",
            str(sorted(theirs)),
            "new.init(params), to begin with a fresh state",
        )
