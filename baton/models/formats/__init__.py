"""Readers of checkpoint and tokenizer formats."""
