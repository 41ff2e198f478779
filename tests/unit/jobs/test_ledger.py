"""`ctpo ledger` over a run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ctpo_megatron.cli import app
from ctpo_megatron.errors import InputError
from ctpo_megatron.jobs.ledger import ledger_job


def test_the_tables_show_what_is_favoured(tmp_path: Path) -> None:
    attempts = [{"attempt": 0, "status": "finished", "reward": 0.5, "tokens": 40}]
    lines = [
        {"step": 1, "group": "g00000000", "end": "trained", "reward": 0.5, "tokens": 40, "attempts": attempts},
        {
            "step": 1,
            "group": "g00000001",
            "end": "filtered",
            "reward": 0.0,
            "tokens": 120,
            "attempts": [attempts[0] | {"reward": 0.0, "tokens": 120}],
        },
        {"step": 2, "group": "g00000002", "end": "trained", "reward": 0.5, "tokens": 40, "attempts": attempts},
        {"back": 1},
    ]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = CliRunner().invoke(app, ["ledger", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    cells = [[cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")] for line in shown.output.splitlines()]
    assert ["all", "1", "1", "0", "0", "50%"] in cells, "the step that the run went back from does not count"
    assert ["64", "1", "0", "0", "0", "100%"] in cells
    assert ["128", "0", "1", "0", "0", "0%"] in cells
    assert "0.500 times the tokens of all that ended, +0.250 of their reward" in shown.output


def test_a_directory_without_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no ledger"):
        ledger_job(tmp_path)
