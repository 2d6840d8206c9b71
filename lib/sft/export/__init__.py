"""Checkpoints to Hugging Face folders and back, with a proof; uploads to the hub; means of checkpoints."""
