"""Step folders in OLMo-core's layout: writing, reading, and their model descriptions; Hugging Face folders of weights."""
