"""The sections of the configuration: one frozen dataclass per concern, a field per key."""
