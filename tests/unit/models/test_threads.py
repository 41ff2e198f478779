"""Threads by the size of a model, and where its size is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctpo_megatron.models.threads import hidden_size_in, useful_threads


def test_a_small_model_has_one() -> None:
    assert [useful_threads(8, size) for size in (64, 255, 256, 4096, None)] == [1, 1, 8, 8, 8]
    assert useful_threads(0, 4096) == useful_threads(0, None) == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [('{"hidden_size": 128}', 128), ('{"hidden_size": "128"}', None), ("{}", None), ("[]", None), ("{", None), (None, None)],
)
def test_what_is_not_told_is_not_known(tmp_path: Path, text: str | None, size: int | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert hidden_size_in(tmp_path) == size
