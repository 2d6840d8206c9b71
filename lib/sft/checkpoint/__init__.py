"""Checkpoints on disk: step folders in OLMo-core's layout, Hugging Face folders, and tensors read from either."""
