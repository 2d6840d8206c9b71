"""Plain rows from JSON lines or Arrow columns to rendered text in compiled code, without a Python object for each row."""
