"""Prompts, samples, sampling order, chat templates, packing and data-parallel balance."""
