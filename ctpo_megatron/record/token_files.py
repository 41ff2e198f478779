"""What training made of each token that the policy wrote: a file a step in RUN_DIR/tokens.

step_00000012.safetensors holds, of the samples of rollouts/step_00000012.jsonl in their order (a trajectory, then its branches):

    lengths      [samples] int64, tokens of each that the policy wrote
    gap          [tokens] float16, the trainer's log-prob minus the engine's, before the step's first optimizer step
    log_ratio    [tokens] float16, what the objective clipped or judged
    fate         [tokens] uint8, what became of the token's gradient: see `FATES`

The streams of samples stand one behind the other. NaN: the token was in no optimizer step that was applied, or its
sample had no pass (`data.sparing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ctpo_megatron.errors import InputError, storing
from ctpo_megatron.record.files import Through, at_once

FATES = ("trained", "held back from growing", "held back from shrinking", "cut by the dual clip", "not trained")
NOT_TRAINED = FATES.index("not trained")
STREAMS = {"gap": np.float16, "log_ratio": np.float16, "fate": np.uint8}
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """Streams [tokens] of the tokens that the policy wrote, sample by sample; `lengths` [samples] of them belong to each."""

    lengths: NDArray[np.int64]
    gap: NDArray[np.floating[Any]]
    log_ratio: NDArray[np.floating[Any]]
    fate: NDArray[np.uint8]


class TokenFiles:
    """The files of a run. Those of `first_step` or later, which an earlier attempt wrote, are deleted.

    `through`: how files are written, each as a whole.
    """

    def __init__(self, run_dir: Path, first_step: int = 0, through: Through = at_once) -> None:
        self._directory, self._through = run_dir / "tokens", through
        for path in self._directory.glob("step_*.safetensors"):
            number = path.stem.rpartition("_")[2]
            if number.isdigit() and int(number) >= first_step:
                with storing(path):
                    path.unlink()

    def write(self, step: int, record: TokenRecord) -> None:
        """Write what became of the tokens of training step `step`, from 1. Raises StorageError."""
        tensors: dict[str, NDArray[Any]] = {"lengths": np.asarray(record.lengths, np.int64)}
        for name, kind in STREAMS.items():
            stream = getattr(record, name)
            tensors[name] = (stream if kind is np.uint8 else np.clip(stream, -_LARGEST, _LARGEST)).astype(kind)
        self._through(partial(self._write, self._directory / token_file(step), tensors))

    def _write(self, path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
        with storing(path):
            self._directory.mkdir(exist_ok=True)
            part = path.with_name(f".{path.name}.part")
            part.write_bytes(save(dict(tensors)))
            part.replace(path)


def token_file(step: int) -> str:
    """Returns the name of the file of a training step."""
    return f"step_{step:08d}.safetensors"


class StoredTokens:
    """A file that was written, read sample by sample. Raises InputError where it is not one."""

    def __init__(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="numpy")
            self.lengths: NDArray[np.int64] = file.get_tensor("lengths")
            self._streams = {name: file.get_slice(name) for name in STREAMS}
            sizes = {tuple(each.get_shape()) for each in self._streams.values()}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: this is no record of tokens: {error}.") from error
        self._ends = np.concatenate([[0], np.cumsum(self.lengths)])
        if sizes != {(int(self._ends[-1]),)}:
            raise InputError(f"{path}: its streams do not have the {int(self._ends[-1])} tokens of its samples.")

    def samples(self, first: int, count: int) -> TokenRecord:
        """Returns the streams of `count` samples from number `first` on, in memory."""
        begin, end = int(self._ends[first]), int(self._ends[first + count])
        streams = {name: np.asarray(each[begin:end]) for name, each in self._streams.items()}
        return TokenRecord(self.lengths[first : first + count], **streams)
