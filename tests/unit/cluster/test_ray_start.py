"""Ray that cannot start on this host: one sentence with its own words, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from ctpo_megatron.cluster.ray_cluster import connect
from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import CtpoError, told

CONFIG = RunConfig.model_validate(
    {"name": "r", "run_dir": "r", "model": {"path": "m"}, "data": {"train": "d"}, "cluster": {"device": "cpu"}}
)


def test_rays_own_words_come_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 30)))  # longer than the name of a socket may be
    with pytest.raises(CtpoError, match=r"Ray did not start on this host\. It says: .*107 bytes.*start again") as caught:
        connect(CONFIG, 1)
    message, code = told(caught.value)
    assert code == 1
    assert "unexpected" not in message


def test_a_ray_that_is_there_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that RAY_ADDRESS names: cluster.address does that here."""
    asked: list[str] = []
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "init", lambda address=None, **_: asked.append(address))
    connect(CONFIG, 1)
    assert asked == ["local"]


def test_a_directory_that_ray_cannot_make_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    with pytest.raises(OSError) as caught:
        connect(CONFIG, 1)
    message, code = told(caught.value)
    assert code == 1
    assert str(tmp_path / "file") in message
    assert "unexpected" not in message
