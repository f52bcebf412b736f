"""Packaged as miles.kernels."""
