"""The gate: one value's bits, another value's derivative, by a given rule."""
