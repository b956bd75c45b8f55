"""Text from a model: sampling token by token, greedy and beam search."""

from .sampling import check_sampling, filter_logits, generate
from .search import Hypothesis, beam_search, greedy

__all__ = ["Hypothesis", "beam_search", "check_sampling", "filter_logits", "generate", "greedy"]
