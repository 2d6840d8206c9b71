"""Exports: checkpoints to Hugging Face folders and back, their proof, their publication; the mean of checkpoints."""
