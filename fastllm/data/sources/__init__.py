"""Readers: which files a source has, and the documents in them."""

from .limits import Failure, Limits, Raw
from .plan import NAMES, SINGLE, SourceEntry, plan_sources
from .read import read

__all__ = ["NAMES", "SINGLE", "Failure", "Limits", "Raw", "SourceEntry", "plan_sources", "read"]
