"""Derivatives beside differences: `check_gradients`."""
