"""A connection of the web server that does not wait without end for a request."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """uvicorn's, closed where no request has come whole for ``timeout_keep_alive`` seconds.

    uvicorn itself waits for ever for the first byte and for the end of a request's head. Each such connection takes
    one of ``limit_concurrency``, so that a few dozen would keep everybody out. The time that a body and an answer may
    take is the application's to limit.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._look_again(self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def _look_again(self, seen: object) -> None:
        self._watch = self.loop.call_later(self.timeout_keep_alive, self._look, seen)

    def _look(self, seen: object) -> None:
        """Close if nothing is being answered and ``seen``, the last request at the look before, still is the last."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if not answering and seen is self.cycle:
            self.transport.close()
        else:
            # A request that is being answered at this look is no sign of idleness at the next.
            self._look_again(self if answering else self.cycle)
