"""Which documents and examples are held out of training, where nobody names any: the last of every ten."""

HELD_OUT = 10


def is_held_out(number: int, every: int = HELD_OUT) -> bool:
    """Whether the one of this number, from 0, is held out, where one in ``every`` is."""
    return number % every == every - 1
