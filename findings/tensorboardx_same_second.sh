#!/bin/sh
# tensorboardX 2.6.5 with TensorBoard 2.21.0: two SummaryWriters that are made for one directory within one second lose points.
#
# The name of an event file holds the second, the host and nothing of the process or the writer. Two writers of the same second
# open the same file, each at its beginning, and write over each other's records. No error comes, neither when writing nor when
# reading: TensorBoard shows what happens to be left. torch.utils.tensorboard and TensorBoard's own writer add a process id and a
# counter to the name. Trainers that make one writer for training and one for evaluation, or one on each of several ranks of a
# host, do this. `filename_suffix` keeps the files apart.
#
# Seen (Python 3.11): one file; of 50 points of each of two tags 100 were written and 50 were read back.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tensorboardX==2.6.5 tensorboard==2.21.0 "setuptools<81"
cat > "$work/write.py" <<'PROGRAM'
import logging
import sys
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import SummaryWriter

POINTS = 50


def read_back(directory: Path, suffixes: tuple[str, str]) -> tuple[int, int]:
    """Number of event files, and of points that TensorBoard reads, of two writers made at the beginning of one second."""
    time.sleep(1.02 - time.time() % 1)
    writers = [SummaryWriter(str(directory), filename_suffix=suffix) for suffix in suffixes]
    for writer, tag in zip(writers, ("train", "eval")):
        for step in range(POINTS):
            writer.add_scalar(tag, float(step), step)
    for writer in writers:
        writer.close()
    found = EventAccumulator(str(directory))
    found.Reload()
    return len(list(directory.iterdir())), sum(len(found.Scalars(tag)) for tag in found.Tags()["scalars"])


logging.disable(logging.CRITICAL)  # the reader may complain of what it cannot parse
root = Path(sys.argv[1])
same, apart = read_back(root / "same", ("", "")), read_back(root / "apart", (".train", ".eval"))
print(f"two writers of one second: {same[0]} file, {same[1]} of {2 * POINTS} points read back")
print(f"with suffixes of their own: {apart[0]} files, {apart[1]} of {2 * POINTS} points read back")
sys.exit(not (same[0] == 1 and same[1] < 2 * POINTS and apart == (2, 2 * POINTS)))
PROGRAM
if "$work/venv/bin/python" "$work/write.py" "$work/runs"; then
    echo "as described: points of one writer are lost"
else
    echo "the behaviour has changed" >&2
    exit 1
fi
