"""Packaged as miles.workflows."""
