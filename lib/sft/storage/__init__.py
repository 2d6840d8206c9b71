"""Verified copies between folders, buckets (gs://) and the Hugging Face hub (hf://)."""
