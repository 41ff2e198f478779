"""A real TensorBoard over a directory, asked through the HTTP endpoints that its own pages use."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
import tensorboard_data_server

START_S = 120.0


class Asked:
    """A TensorBoard at `url`. A directory's own event files are its run `.`."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **query: str) -> Any:
        with urlopen(f"{self._url}data/{path}?{urlencode(query)}", timeout=30) as answer:
            return json.load(answer)

    def tags(self, plugin: str) -> list[str]:
        """The tags of the run, sorted."""
        return sorted(self.get(f"plugin/{plugin}/tags").get(".", {}))

    def scalars(self, tag: str, run: str = ".") -> list[tuple[int, float]]:
        """(step, value) of every point that its page would show."""
        return [(step, value) for _, step, value in self.get("plugin/scalars/scalars", run=run, tag=tag)]

    def sessions(self, setting: str, metric: str) -> list[Any]:
        """What its tab HParams compares, with a column for a setting and one for a metric."""
        columns = [{"hparam": setting}, {"metric": {"tag": metric, "group": ""}}]
        status = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
        wanted = {"colParams": columns, "allowedStatuses": status, "startIndex": 0, "sliceSize": 10}
        question = Request(
            f"{self._url}data/plugin/hparams/session_groups", json.dumps(wanted).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(question, timeout=30) as answer:
            return [session for group in json.load(answer)["sessionGroups"] for session in _flat(group)]

    def histogram_steps(self, tag: str) -> list[int]:
        return [step for _, step, _ in self.get("plugin/histograms/histograms", run=".", tag=tag)]

    def texts(self, tag: str) -> list[tuple[int, str]]:
        """(step, text without its HTML) of every text."""
        found = self.get("plugin/text/text", run=".", tag=tag)
        return [(each["step"], re.sub(r"<[^>]+>", "", each["text"]).strip()) for each in found]


def _flat(group: Any) -> list[Any]:
    return [{"hparams": group["hparams"], **session} for session in group["sessions"]]


@contextmanager
def tensorboard(directory: Path, home: Path, data_server: Path | None) -> Iterator[Asked]:
    """Yields a TensorBoard that has read `directory`: with the binary `data_server`, without one with its own loader."""
    own = {"TENSORBOARD_DATA_SERVER_BINARY": str(data_server)} if data_server else {}
    fast = "true" if data_server else "false"
    words = ["-m", "tensorboard.main", f"--logdir={directory}", "--host=127.0.0.1", "--port=0", f"--load_fast={fast}"]
    words += ["--reload_interval=1", "--samples_per_plugin=text=1000"]  # its pages have 10 texts of a tag, or 100
    log = home / f"tensorboard_{fast}.txt"
    with log.open("w") as sink:
        process = subprocess.Popen([sys.executable, *words], stdout=sink, stderr=sink, env={**os.environ, **own}, cwd=home)
    try:
        yield _ready(process, log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _ready(process: subprocess.Popen[bytes], log: Path) -> Asked:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())
        if found:
            asked = Asked(found[0])
            if asked.get("runs"):  # it reads in the background, and runs come when all of their files were read
                return asked
        time.sleep(0.1)
    raise AssertionError(f"TensorBoard does not answer (exit code {process.poll()}):\n{log.read_text()}")


def data_server(home: Path) -> Path:
    """The binary of TensorBoard's fast loader; skips the test where there is none, installed or from the package index."""
    installed = tensorboard_data_server.server_binary()
    if installed:
        return Path(installed)
    wanted = f"tensorboard-data-server=={importlib.metadata.version('tensorboard-data-server')}"
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", f"--dest={home}", wanted]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    for wheel in home.glob("*.whl"):
        with zipfile.ZipFile(wheel) as content:
            if "tensorboard_data_server/bin/server" in content.namelist():
                binary = Path(content.extract("tensorboard_data_server/bin/server", home))
                binary.chmod(0o755)
                return binary
    pytest.skip(f"the installed {wanted} has no binary, and no wheel with one was found: {done.stderr.strip()[-300:]}")
