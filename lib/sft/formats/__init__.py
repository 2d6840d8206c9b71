"""The files that stages hand to each other: one module per format, a frozen dataclass with `read` and `write`."""
