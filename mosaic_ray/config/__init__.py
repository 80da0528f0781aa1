"""Configuration: knobs, presets, validation."""
