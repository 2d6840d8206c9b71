"""Readers and encoders of common row layouts, compiled by numba. They give the same tokens as the Python code beside them."""
