"""Packaged as miles.sbatch."""
