"""Runs that are killed, damaged and refused by the disk, and what must be true of them afterwards."""
