"""Readers: which files a source has, and the documents in them."""

from .limits import Failure, Limits, Raw
from .plan import NAMES, SINGLE, Entry, plan
from .read import read

__all__ = ["NAMES", "SINGLE", "Entry", "Failure", "Limits", "Raw", "plan", "read"]
