"""Pure functions on documents: text out of HTML and wikitext, Unicode, language, quality rules, personal data.

Nothing here reads a file or keeps a state, so that any engine can run it anywhere.
"""

from .config import CleanConfig, clean
from .document import Document, Rejection

__all__ = ["CleanConfig", "Document", "Rejection", "clean"]
