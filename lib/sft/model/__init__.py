"""The model, its loss and attention, its names in Hugging Face's files, and what it costs in memory and FLOPs."""
