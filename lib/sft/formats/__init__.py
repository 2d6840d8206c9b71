"""The files that stages exchange: one module for each format, a frozen dataclass with `read` and `write`."""
