"""Recipes and cluster files: the options, their checks, model presets and named chat templates. Standard library only."""
