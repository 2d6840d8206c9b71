"""The exception whose message is for the user."""


class SftError(Exception):
    """Bad input or a damaged file. The message names the file, the field, the values and the next command."""
