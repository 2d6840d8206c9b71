"""Copies of stages between this machine and the storages of clusters: make sync, make fetch, uploads of steps."""
