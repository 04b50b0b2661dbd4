"""Callbacks of Stable-Baselines3."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback


class StopOnSignal(BaseCallback):
    """Ends training at the next step when the user presses Ctrl-C or the system says terminate, so that the model can be saved.

    A second signal ends it at once, by a ``KeyboardInterrupt``. Signals are caught in a ``with`` block::

        with StopOnSignal() as stop:
            model.learn(100_000, callback=stop)
        model.save("model")
    """

    def __init__(self) -> None:
        super().__init__()
        #: Number of the signal that came, 0 if none
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        print("\nStopping at the next step, to save; Ctrl-C again stops at once.", file=sys.stderr, flush=True)

    def _on_step(self) -> bool:
        return not self.signal
