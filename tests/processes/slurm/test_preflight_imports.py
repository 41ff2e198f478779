"""What a node tries to import before a run, each in a process of its own with a bound."""

from __future__ import annotations

from ctpo_megatron.slurm.preflight import local


def test_an_import_that_fails_or_hangs_is_a_finding_with_its_reason() -> None:
    imports = local.Imports({"broken": "raise RuntimeError('no such kernel')", "slow": "import time; time.sleep(60)", "fine": ""})
    found = {each.topic: each for each in imports.findings(2.0)}
    assert found["import broken"].meaning == "RuntimeError: no such kernel"
    assert (found["import slow"].state, found["import fine"].state) == ("bad", "ok")
