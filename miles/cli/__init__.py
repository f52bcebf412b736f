"""Typer commands: read arguments, call one function, print with rich. No logic, no torch."""
