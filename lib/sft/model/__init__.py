"""The transformer, its attention and loss, how ranks share it, and estimates of its memory and FLOPs."""
