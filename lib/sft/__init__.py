"""Supervised finetuning of OLMo models: five stages that talk through files on disk."""
