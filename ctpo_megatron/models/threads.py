"""How many threads a process that computes a model on CPUs is given."""

from __future__ import annotations

import json
from pathlib import Path

ONE_BELOW = 256  # hidden units


def useful_threads(share: int, hidden_size: int | None) -> int:
    """Returns the threads of a process whose share of its host is `share` cores, at least one.

    A model of fewer than 256 hidden units has one: its operators are so short that to wake a second thread, which sleeps
    between them, costs what it saves (docs/bench_loop.md). `hidden_size` None: the model's is not known.
    """
    return 1 if hidden_size is not None and hidden_size < ONE_BELOW else max(1, share)


def hidden_size_in(model_path: str | Path) -> int | None:
    """Returns the hidden units that the config.json of a model's directory tells; None where it does not.

    What is wrong with a directory is said elsewhere.
    """
    try:
        found = json.loads((Path(model_path) / "config.json").read_text()).get("hidden_size")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) else None
