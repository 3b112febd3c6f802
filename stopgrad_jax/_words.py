"""Every sentence that the debugger can print, and the condition under which it is true.

One section for each thing that speaks. A sentence is here once, whatever prints it; its
comment is what must have been seen before it may be said.
"""

from __future__ import annotations

# What `flow` and the contracts say of an input ---------------------------------------


# Why a gradient ends ------------------------------------------------------------------


# What `find_nonfinite` says -----------------------------------------------------------


# What `check_gradients` says ----------------------------------------------------------


# What a training step says ------------------------------------------------------------
