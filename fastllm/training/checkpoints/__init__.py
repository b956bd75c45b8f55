"""Checkpoints, whole or in shards, and saving while training goes on."""
