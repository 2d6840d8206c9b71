"""The one exception that a person, not a programmer, is meant to read."""


class SftError(Exception):
    """Bad input or a broken artefact. The message names the file, the field, the values and the next command."""
