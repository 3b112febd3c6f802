"""Gradients for what has none: spikes, quantizers, samples, likelihood ratios."""
