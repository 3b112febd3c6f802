"""stopgrad_jax: say, query, see and test where gradients flow in JAX."""

from . import train
from ._address import Address
from ._check.check import check_gradients
from ._errors import AddressError
from ._flow.contracts import assert_gradient, assert_no_gradient
from ._flow.flow import Flow, flow
from ._nonfinite.nonfinite import find_nonfinite
from ._nonfinite.report import Nonfinite
from ._statistics import Stats, gradient_stats
from ._where import Where
from .cotangents import (
    clip_gradient,
    clip_gradient_norm,
    replace_nonfinite_gradient,
    transform_gradient,
)
from .estimators import quantize, recurrent, sample, score, surrogate
from .freezing import freeze, migrate_state
from .gates import (
    mask_gradient,
    per_example,
    prevent_gradient,
    reversal_schedule,
    reverse_gradient,
    scale_gradient,
    stop_gradient,
)
from .points import capture, edit, name, op, perturb, point, var
from .query import gradients, value_and_gradients
from .substitution import replace_value, straight_through, with_backward
from .trees import combine, mask, partition

__version__ = "0.1.0"

__all__ = [
    "Address",
    "AddressError",
    "Flow",
    "Nonfinite",
    "Stats",
    "Where",
    "__version__",
    "assert_gradient",
    "assert_no_gradient",
    "capture",
    "check_gradients",
    "clip_gradient",
    "clip_gradient_norm",
    "combine",
    "edit",
    "find_nonfinite",
    "flow",
    "freeze",
    "gradient_stats",
    "gradients",
    "mask",
    "mask_gradient",
    "migrate_state",
    "name",
    "op",
    "partition",
    "per_example",
    "perturb",
    "point",
    "prevent_gradient",
    "quantize",
    "recurrent",
    "replace_nonfinite_gradient",
    "replace_value",
    "reversal_schedule",
    "reverse_gradient",
    "sample",
    "scale_gradient",
    "score",
    "stop_gradient",
    "straight_through",
    "surrogate",
    "train",
    "transform_gradient",
    "value_and_gradients",
    "var",
    "with_backward",
]


def __dir__() -> list[str]:
    return __all__
