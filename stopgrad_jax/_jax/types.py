"""Types of values: shapes, shardings and the mesh axes that a value differs over.

Part of `_jax`, the only door to JAX that is version-dependent or not public.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import core


def stacked(length: int, aval: Any, mesh_axis: Any = None) -> Any:
    """Type of `length` values of this type on a new leading axis.

    `mesh_axis`: what the new axis is sharded over, where that is part of the type.
    """
    return core.unmapped_aval(length, 0, aval, mesh_axis)


def type_of_result(function: Callable[[], Any]) -> Any:
    """Type of the one array that a function of nothing returns."""
    (var,) = jax.make_jaxpr(function)().jaxpr.outvars
    return var.aval


def is_differentiable(aval: Any) -> bool:
    """Real or complex floating point: the dtypes that carry a gradient."""
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def carries_gradient(leaf: Any) -> bool:
    """Tell a leaf that has derivatives: a float or complex number or array."""
    if isinstance(leaf, float | complex):
        return True
    arrays = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    return isinstance(leaf, arrays) and is_differentiable(leaf)


# Mesh axes ----------------------------------------------------------------------


def varying(aval: Any) -> frozenset[str]:
    """Mesh axes a value differs over, inside `shard_map(check_vma=True)`."""
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(manual.varying) if manual else frozenset(getattr(aval, "vma", ()))


def also_varying(aval: Any, axes: frozenset[str]) -> Any:
    """Type of a value that differs over more axes."""
    if axes <= varying(aval):
        return aval
    manual = jax.sharding.ManualAxisType(varying=varying(aval) | axes)
    return aval.update(manual_axis_type=manual)


def unchecked_axes() -> frozenset[str]:
    """Mesh axes of the `shard_map(check_vma=False)` that is being traced."""
    # Without checks not even the index of a device is known to differ.
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return frozenset(a for a in axes if not varying(jax.typeof(jax.lax.axis_index(a))))


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Mark a value as different on each device along `axes` (no communication)."""
    missing = tuple(axes - varying(jax.typeof(x)))
    if not missing:
        return x
    pcast = getattr(jax.lax, "pcast", None)
    if pcast is not None:
        return pcast(x, missing, to="varying")
    return getattr(jax.lax, "pvary")(x, missing)  # noqa: B009 (gone from JAX 0.12)


def vary_exactly(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Bring a cotangent to the axes of its value: summed over those it has too many."""
    excess = varying(jax.typeof(x)) - axes
    return vary(jax.lax.psum(x, tuple(excess)) if excess else x, axes)


# Shardings ----------------------------------------------------------------------


def explicit_sharding(aval: Any) -> Any:
    """Sharding of a value where it is part of its type (`AxisType.Explicit`)."""
    sharding = getattr(aval, "sharding", None)
    return sharding if sharding is not None and sharding.mesh.explicit_axes else None


def sharded_as(x: jax.Array, aval: Any) -> jax.Array:
    """Give a value the sharding of a type, where shardings are part of types."""
    sharding = explicit_sharding(aval)
    if sharding is None or jax.typeof(x).sharding == sharding:
        return x
    return jax.sharding.reshard(x, sharding)


def resharded(x: jax.Array, mesh: Any, spec: Any) -> jax.Array:
    """Shard a value over axes of a mesh, where shardings are part of types."""
    axes = {a for e in spec if e for a in (e if isinstance(e, tuple) else (e,))}
    if axes.isdisjoint(mesh.explicit_axes):
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, spec))


def sharded_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Give a value the other's sharding, where shardings are part of the type."""
    return sharded_as(x, jax.typeof(like))


def mapped_like(x: jax.Array, axis: int, like: jax.Array) -> jax.Array:
    """Shard an axis of a value as the first one of another: `jax.vmap` wants that."""
    sharding = explicit_sharding(jax.typeof(like))
    if sharding is None:
        return x
    spec = list(jax.typeof(x).sharding.spec)
    spec[axis] = sharding.spec[0]
    spec = jax.sharding.PartitionSpec(*spec)
    if jax.typeof(x).sharding.spec == spec:
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(sharding.mesh, spec))


# Values of a type ---------------------------------------------------------------

_WIDE = frozenset({"float64", "complex128", "int64", "uint64"})


@contextlib.contextmanager
def at_width_of(*values: Any) -> Iterator[None]:
    """Let what follows have 64 bits, if one of these values or types has.

    It may come from a `with jax.enable_x64(True)` in the user's function, which an
    equation does not remember.
    """
    if not any(map(is_wider_here, values)):
        yield
        return
    with jax.enable_x64(True):
        yield


def is_wider_here(x: Any) -> bool:
    """Tell a value or type of 64 bits where JAX makes none of so many."""
    name = getattr(getattr(x, "dtype", None), "name", "")
    return name in _WIDE and not jax.config.jax_enable_x64


def zeros(aval: Any) -> jax.Array:
    """Zeros of this type: PRNG keys, explicit shardings and varying axes too."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), aval.dtype))
        raw = jnp.zeros((*aval.shape, *data.shape), data.dtype)
        keys = jax.random.wrap_key_data(raw, impl=aval.dtype._impl.name)
        return vary(sharded_as(keys, aval), varying(aval))
    return vary(filled(aval, 0), varying(aval))


def filled(aval: Any, value: Any) -> jax.Array:
    """Return an array of one value with this type's shape, dtype and sharding."""
    with at_width_of(aval):
        return _filled(aval, value)


def _filled(aval: Any, value: Any) -> jax.Array:
    sharding = explicit_sharding(aval)
    # `full` has a weak type of a Python number alone, and then the default width: what
    # is wider or narrower gets a strong one.
    if getattr(aval, "weak_type", False) and sharding is None:
        weak = jax.lax.full(aval.shape, aval.dtype.type(value).item())
        if weak.dtype == aval.dtype:
            return weak
    array = np.asarray(value).astype(aval.dtype)
    return jax.lax.full(aval.shape, array, sharding=sharding)


def number_like(x: Any, aval: Any) -> Any:
    """Return a Python number as an array of this type's dtype, all else as it is."""
    numeric = jnp.issubdtype(aval.dtype, jnp.number) or aval.dtype == bool
    if numeric and isinstance(x, bool | int | float | complex):
        with at_width_of(aval):
            return jnp.asarray(x, aval.dtype)
    return x


def is_traced(x: Any) -> bool:
    """Tell a value that is not known yet from one that is."""
    return isinstance(x, jax.core.Tracer)


def is_tracer(x: Any) -> bool:
    """As `is_traced` of any object, and no code of its own is run, as a proxy has."""
    return jax.core.Tracer in type(x).__mro__


def is_key(x: Any) -> bool:
    """Tell a PRNG key, or another value of a dtype that NumPy does not have."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended)


def mark(array: Any, owner: object) -> None:
    """Note on an array what owns it; copies and aliases have no mark.

    An attribute, where arrays can have one: a registry of weak references would take
    as long as the call of a compiled step. Without a mark an array is copied, not lost.
    """
    if isinstance(array, jax.Array) and not is_traced(array):
        with contextlib.suppress(AttributeError):
            array._stopgrad_jax_owner = owner  # type: ignore


def owner_of(array: Any) -> object | None:
    """Return what `mark` was last called with for this very array."""
    return getattr(array, "_stopgrad_jax_owner", None)


# Tracing at a place -------------------------------------------------------------


def as_argument(aval: Any) -> jax.ShapeDtypeStruct:
    """Describe a type in full: weak or not, sharding, varying axes."""
    sharding = getattr(aval, "sharding", None)
    return jax.ShapeDtypeStruct(
        aval.shape,
        aval.dtype,
        sharding=None if sharding is None or sharding.mesh.empty else sharding,
        weak_type=getattr(aval, "weak_type", False),
        manual_axis_type=getattr(aval, "manual_axis_type", None),
    )


def traced_at(eqn: Any, function: Callable[..., Any], *avals: Any) -> Any:
    """Trace a function of values of these types, where an equation stands.

    The program is returned without its constants; `closed_at` returns those, too.
    """
    closed = closed_at(eqn, function, *avals)
    return getattr(closed, "jaxpr", closed)


def closed_at(eqn: Any, function: Callable[..., Any], *avals: Any) -> Any:
    """Trace a function of values of these types, where an equation stands.

    On the same mesh, with its axes of the same kinds: a rule is asked what it is asked
    in the program. Collectives are only known inside the `shard_map` whose axes they
    name.
    """
    types = jax.tree.leaves(avals)
    with at_width_of(*types, *(v.aval for v in eqn.outvars)):
        return _closed_at(eqn, function, *avals)


def _closed_at(eqn: Any, function: Callable[..., Any], *avals: Any) -> Any:
    mesh, arguments = eqn.ctx.cur_abstract_mesh, jax.tree.map(as_argument, avals)
    around = _around(mesh)

    def trace() -> Any:
        return jax.make_jaxpr(lambda *args: function(*args))(*arguments)

    def inside(check_vma: bool) -> Any:
        """Trace inside a `shard_map`, which knows the names of the axes.

        The program is no array and cannot be returned from it: it is put aside.
        """
        jaxprs = list[Any]()

        def body() -> tuple[()]:
            jaxprs.append(trace())
            return ()

        jax.eval_shape(
            jax.shard_map(
                body,
                mesh=around,
                in_specs=(),
                out_specs=(),
                axis_names=frozenset(mesh.manual_axes),
                check_vma=check_vma,
            )
        )
        return jaxprs[0]

    with jax.sharding.use_abstract_mesh(around):
        if not mesh.manual_axes:
            closed = trace()
        elif not _varies(eqn):  # so it is, too, in all of a shard_map without checks
            closed = inside(check_vma=False)
        else:
            try:
                closed = inside(check_vma=True)
            except Exception:
                # Without checks, but in a shard_map with them: then they differ.
                if len({varying(atom.aval) for atom in eqn.invars}) == 1:
                    raise
                closed = inside(check_vma=False)
    return closed


def _around(mesh: Any) -> Any:
    """Mesh outside of the `shard_map`s whose axes are manual in this one."""
    auto, manual = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Manual
    kinds = tuple(auto if kind == manual else kind for kind in mesh.axis_types)
    return mesh.update(axis_types=kinds) if mesh.manual_axes else mesh


def _varies(eqn: Any) -> bool:
    """Tell whether a value of an equation, or one inside it, differs over an axis."""
    if any(varying(atom.aval) for atom in (*eqn.invars, *eqn.outvars)):
        return True
    inner = (getattr(x, "jaxpr", x) for x in core.jaxprs_in_params(eqn.params))
    return any(_varies(below) for jaxpr in inner for below in jaxpr.eqns)
