"""Corpus, tokenizer, token files."""
