"""Likelihood ratios."""
