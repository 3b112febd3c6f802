"""stopgrad_jax: say, query, see and test where gradients flow in JAX."""

from ._errors import AddressError as AddressError
from .points import capture as capture
from .points import edit as edit
from .points import name as name
from .points import op as op
from .points import perturb as perturb
from .points import point as point
from .query import gradients as gradients
from .query import value_and_gradients as value_and_gradients

__all__ = [
    "AddressError",
    "capture",
    "edit",
    "gradients",
    "name",
    "op",
    "perturb",
    "point",
    "value_and_gradients",
]
