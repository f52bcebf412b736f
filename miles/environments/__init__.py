"""Multi-turn environments, tools and agents (none yet)."""
