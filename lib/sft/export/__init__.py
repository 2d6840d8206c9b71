"""Checkpoints to Hugging Face folders and back, the proof that both are equal, model cards and pushes to the hub."""
