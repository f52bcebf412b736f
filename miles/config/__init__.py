"""The run file: pydantic models of the TOML, presets, overrides, error messages. No torch."""
