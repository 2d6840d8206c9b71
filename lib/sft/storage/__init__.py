"""Verified copies between folders, buckets (gs://, s3://) and the Hugging Face hub (hf://)."""
