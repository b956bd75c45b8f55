"""The names of :mod:`fastllm.generate.search`."""

from .generate.search import Hypothesis, beam_search, greedy

__all__ = ["Hypothesis", "beam_search", "greedy"]
