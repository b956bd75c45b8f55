"""How long a table of calls may take."""

from __future__ import annotations

import math
import time


class Budget:
    """Seconds, counted from now, within which calls may begin; ``left_out`` says which calls came too late."""

    def __init__(self, seconds: float = math.inf):
        self.seconds = seconds
        self.left_out: list[str] = []
        self._began = time.monotonic()

    def allows(self, call: str) -> bool:
        """Whether ``call`` may begin now; where not, ``left_out`` has it from here on."""
        if time.monotonic() - self._began < self.seconds:
            return True
        self.left_out.append(f"{call}: the budget of {self.seconds:g} s was spent")
        return False
