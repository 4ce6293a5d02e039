"""How a run is stopped from outside: a signal is a stop request, and the loop acts on it at the end of an update.

The request travels with the loss in the one all-reduce of each update, so that all ranks stop at the same one.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

# What the run returns when it was stopped and has saved: "try again later" in sysexits.h, for a scheduler to requeue.
EXIT_STOPPED = 75
# Ctrl-C reaches a rank twice, from the terminal and from the launcher: a second request counts only after this.
_SECOND_REQUEST_SECONDS = 3.0


class StopRequest:
    """Whether somebody wants this run to stop. A second signal, some seconds after the first, stops at once."""

    def __init__(self) -> None:
        self.signal_name = ""
        self._first = 0.0

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def listen(self) -> None:
        """From now on SIGINT, SIGTERM and SIGUSR1 are stop requests."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._request)

    def _request(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_name and time.monotonic() - self._first > _SECOND_REQUEST_SECONDS:
            os._exit(128 + number)
        if not self.signal_name:
            self.signal_name = signal.Signals(number).name
            self._first = time.monotonic()
