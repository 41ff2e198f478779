"""The verdict on all nodes, and what a node can find out by itself."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ctpo_megatron.slurm.preflight import local
from ctpo_megatron.slurm.preflight.report import Finding, NodeReport, as_table, judge, silent


def node(host: str, versions: str = "torch==2 ray==3", *findings: Finding) -> NodeReport:
    return NodeReport(host=host, findings=findings, same={"versions": versions})


def shown(nodes: list[NodeReport]) -> str:
    text = io.StringIO()
    Console(file=text, width=150).print(as_table(judge(nodes)))
    return text.getvalue()


def test_the_node_that_differs_is_named_with_what_differs() -> None:
    verdict = judge([node("n1"), node("n2", "torch==2 ray==4"), node("n3")])
    assert (verdict.exit_code, verdict.sentence) == (2, "The run cannot start. n2: versions.")
    bad = [each for each in verdict.nodes[1].findings if each.state == "bad"]
    assert bad[0].meaning == "must be the same on all nodes: ray==4 here, ray==3 elsewhere"


def test_a_silent_node_is_named() -> None:
    verdict = judge([node("n1"), silent("n2", "its task did not come")])
    assert (verdict.exit_code, verdict.sentence) == (2, "The run cannot start. n2: report.")
    assert "its task did not come" in shown([node("n1"), silent("n2", "its task did not come")])


def test_nodes_that_agree_may_start_and_share_a_row() -> None:
    nodes = [node(host, "torch==2", Finding(topic="GPUs", state="ok", found="no GPU")) for host in ("n1", "n2")]
    assert (judge(nodes).exit_code, judge(nodes).sentence) == (0, "All 2 nodes can start.")
    assert shown(nodes).count("no GPU") == 1


def test_words_of_a_node_are_not_markup() -> None:
    assert "[red]x[/red]" in shown([node("n1", "v", Finding(topic="a", state="bad", found="[red]x[/red]"))])


@given(st.lists(st.sampled_from(["a==1", "a==2"]), min_size=1, max_size=6))
def test_the_verdict_is_good_only_where_all_are_alike(versions: list[str]) -> None:
    verdict = judge([node(f"n{index}", each) for index, each in enumerate(versions)])
    assert (verdict.exit_code == 0) == (len(set(versions)) == 1)


def test_a_report_survives_its_way_as_json() -> None:
    report = node("n1", "v", Finding(topic="a", state="note", found='"', meaning="\n"))
    assert NodeReport.model_validate_json(report.model_dump_json()) == report


def test_inputs_that_are_not_readable_are_named(tmp_path: Path) -> None:
    found = local.inputs([str(tmp_path), str(tmp_path / "none"), ""])
    assert (found.state, found.found) == ("bad", f"not readable: {tmp_path / 'none'}")
    assert local.inputs([str(tmp_path), ""]).state == "ok"


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local.memory().state == "ok"
    monkeypatch.setattr(local, "_group_room", lambda: [2**29])
    assert (local.memory().state, local.memory().found) == ("bad", "0.5 GiB")


def test_versions_name_the_packages_and_the_source() -> None:
    words = dict(word.split("==") for word in local.versions().split())
    assert {"python", "torch", "source"} <= set(words)
    assert words["transformer-engine"] == "none" or words["transformer-engine"][0].isdigit()
