"""Graders: exact, math, Python functions by path, and mixtures of them."""
