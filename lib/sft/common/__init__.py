"""Errors, files, hashes, locks and processes: what every layer uses, and nothing of this project's formats."""
