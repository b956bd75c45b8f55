"""The alarm of a time limit, at once: how busy a machine is must not decide what a limit leaves time for."""

import signal
import time


def ring() -> None:
    """As if the innermost :func:`fastllm.time_limit.time_limit` had passed; there must be one."""
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    signal.setitimer(signal.ITIMER_REAL, 1e-6)
    time.sleep(60)
