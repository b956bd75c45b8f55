"""Text made up from a few words, for tests that train on something."""

import numpy as np

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew strong black coffee".split()  # noqa: SIM905


def prose(paragraphs: int, seed: int = 0) -> str:
    """That many paragraphs of 5 to 29 words."""
    draw = np.random.default_rng(seed)
    return "\n\n".join(" ".join(draw.choice(WORDS, draw.integers(5, 30))) + "." for _ in range(paragraphs))
