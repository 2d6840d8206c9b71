"""Configurations of other trainers as recipes (make import-config): what is the same, and by name what is not."""
