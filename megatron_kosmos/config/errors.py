"""What a configuration that cannot run raises."""


class ConfigError(ValueError):
    """A configuration that cannot run; the message names file, field, value and what is legal."""
