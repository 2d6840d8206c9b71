"""Dataset rows to conversations, and conversations to text with the stretches that the model learns to emit."""
