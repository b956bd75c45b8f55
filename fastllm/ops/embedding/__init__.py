"""Embedding lookups and their sums."""
