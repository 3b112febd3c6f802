"""stopgrad_jax: say, query, see and test where gradients flow in JAX."""

from ._errors import AddressError as AddressError
from .cotangents import clip_gradient as clip_gradient
from .cotangents import clip_gradient_norm as clip_gradient_norm
from .cotangents import replace_nonfinite_gradient as replace_nonfinite_gradient
from .cotangents import transform_gradient as transform_gradient
from .diagnosis.contracts import assert_gradient as assert_gradient
from .diagnosis.contracts import assert_no_gradient as assert_no_gradient
from .diagnosis.flow import flow as flow
from .diagnosis.statistics import gradient_stats as gradient_stats
from .estimators import quantize as quantize
from .estimators import recurrent as recurrent
from .estimators import sample as sample
from .estimators import score as score
from .estimators import surrogate as surrogate
from .freezing import freeze as freeze
from .freezing import migrate_state as migrate_state
from .gates import mask_gradient as mask_gradient
from .gates import per_example as per_example
from .gates import prevent_gradient as prevent_gradient
from .gates import reversal_schedule as reversal_schedule
from .gates import reverse_gradient as reverse_gradient
from .gates import scale_gradient as scale_gradient
from .gates import stop_gradient as stop_gradient
from .points import capture as capture
from .points import edit as edit
from .points import name as name
from .points import op as op
from .points import perturb as perturb
from .points import point as point
from .points import var as var
from .query import gradients as gradients
from .query import value_and_gradients as value_and_gradients
from .substitution import replace_value as replace_value
from .substitution import straight_through as straight_through
from .substitution import with_backward as with_backward
from .trees import combine as combine
from .trees import mask as mask
from .trees import partition as partition

__all__ = [
    "AddressError",
    "assert_gradient",
    "assert_no_gradient",
    "capture",
    "clip_gradient",
    "clip_gradient_norm",
    "combine",
    "edit",
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
    "transform_gradient",
    "value_and_gradients",
    "var",
    "with_backward",
]
