"""What the batch script tells a process on a node: a line of its input each, and the end of its input means the end."""

from __future__ import annotations

import queue
import sys
import threading
from typing import Literal, get_args

Order = Literal["USR1", "TERM", "LOST", "END"]  # LOST: the steps on the other nodes have ended
END: Order = "END"


class Orders:
    """Reads orders in a thread of its own, so that they can be asked for while something else is watched."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True, name="orders").start()

    def end(self) -> None:
        """Take it as the end of the input: the end was asked for in another way."""
        self._orders.put(END)

    def next(self, timeout_s: float) -> Order | None:
        """Returns the next order, None where none comes within `timeout_s`."""
        try:
            return self._orders.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def _read(self) -> None:
        for line in sys.stdin:
            word = line.strip()
            if word in get_args(Order):
                self._orders.put(word)  # type: ignore[arg-type]
            else:
                print(f"not understood: {word!r}", file=sys.stderr)
        self._orders.put(END)
