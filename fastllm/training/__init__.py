"""Objectives, optimizers, checkpoints, the loop."""
