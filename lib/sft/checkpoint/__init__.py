"""Step folders in OLMo-core's layout and Hugging Face folders of weights: writing, reading, model descriptions."""
