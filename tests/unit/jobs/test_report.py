"""`ctpo report`: what is written where, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctpo_megatron.cli import app
from ctpo_megatron.errors import InputError
from ctpo_megatron.jobs.report import report_job
from tests.support import run_dirs
from tests.support.html_pages import leave_out_the_library


@pytest.fixture(autouse=True)
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_the_library(monkeypatch)


def command(*words: str | Path) -> None:
    """Run the command line as far as its errors, which come out."""
    app(["report", *map(str, words)], standalone_mode=False)


def test_the_page_lies_in_the_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = run_dirs.write_run(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    command(run_dir)
    page = run_dir / "report.html"
    assert str(page) in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert {path.name: path.read_bytes() for path in run_dir.iterdir() if path != page} == before


def test_single_figures_and_another_place(tmp_path: Path) -> None:
    run_dir = run_dirs.write_run(tmp_path / "run")
    command(
        run_dir, "--out", tmp_path / "new" / "page.html", "--png", tmp_path / "png", "--figure", "reward", "--figure", "by_length"
    )
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == ["by_length.png", "reward.png"]
    assert (tmp_path / "new" / "page.html").is_file()
    assert not (run_dir / "report.html").exists()


def test_numbers_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = run_dirs.write_run(tmp_path / "run")
    command(run_dir, "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["runs"][0]["overview"]["step"] == 12
    assert not (run_dir / "report.html").exists()


def test_a_figure_that_there_is_not(tmp_path: Path) -> None:
    run_dir = run_dirs.write_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"--figure rewrd: there is none\. Did you mean 'reward'\? Allowed: reward, accuracy"):
        report_job([run_dir], out=None, png=None, only=["rewrd"], as_json=False, paper=False)
    assert not (run_dir / "report.html").exists()
