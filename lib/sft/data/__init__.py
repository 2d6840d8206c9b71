"""Rows to tokens on disk: encoding, label masks and their proof, mixing."""
