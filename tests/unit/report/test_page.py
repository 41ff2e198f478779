"""The page: one file that asks for nothing, and text of a run that stays text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from markupsafe import Markup

from ctpo_megatron.report.page.page import embedded
from ctpo_megatron.report.page.render import moment, percent, short, span
from ctpo_megatron.report.report import make_report
from ctpo_megatron.report.section import Section
from tests.support import run_dirs
from tests.support.html_pages import elements
from tests.support.run_dirs import HOSTILE


def hostile(directory: Path) -> Path:
    """A run in which every text that a report shows is hostile."""
    settings = run_dirs.config(name=HOSTILE, model={"path": HOSTILE}, algorithm={"objective": {"type": HOSTILE}})
    told = run_dirs.events()
    told[0] |= {"host": HOSTILE, "commit": HOSTILE, "command": ["ctpo", HOSTILE]}
    told[-1:] = [
        {"time": run_dirs.T0 + 150, "event": HOSTILE, "why": HOSTILE},
        {"time": run_dirs.T0 + 150, "event": "part lost", "reason": HOSTILE},
        {
            "time": run_dirs.T0 + 150,
            "event": "setting differs",
            "key": HOSTILE,
            "before": HOSTILE,
            "now": HOSTILE,
            "meaning": HOSTILE,
        },
        told[-1] | {"how": "failed", "reason": HOSTILE},
    ]
    rows = [run_dirs.metrics(step, **{f"reward/term/{HOSTILE}": 1.0, HOSTILE: 1.0}) for step in range(1, 13)]
    run_dir = run_dirs.write_run(directory, settings=settings, told=told, rows=rows)
    (run_dir / "environment.json").write_text(json.dumps({HOSTILE: {HOSTILE: {"value": HOSTILE, "why": HOSTILE}}}))
    return run_dir


def test_text_of_a_run_makes_no_element(tmp_path: Path) -> None:
    calm, other = make_report([run_dirs.write_run(tmp_path / "run")]), make_report([hostile(tmp_path / "hostile")])
    html = other.html()
    assert HOSTILE not in html
    assert "broken" in html  # it is shown
    found = elements(html)
    assert [attributes for tag, attributes in found if tag == "img"] == []
    assert [name for _, attributes in found for name in attributes if name.startswith("on")] == []
    scripts = [sum(1 for tag, _ in elements(each) if tag == "script") for each in (calm.html(), html)]
    assert scripts[0] == scripts[1] == 3


def test_a_page_of_runs_with_a_hostile_directory_name(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "")
    html = make_report([run_dirs.write_run(tmp_path / name), run_dirs.write_run(tmp_path / "b")]).html()
    assert [attributes for tag, attributes in elements(html) if tag == "img"] == []
    assert name not in html


def test_every_link_has_its_place_and_none_leads_out(tmp_path: Path) -> None:
    html = make_report([run_dirs.write_run(tmp_path / name) for name in ("a", "b")]).html()
    found = elements(html)
    ids = {attributes.get("id") for _, attributes in found}
    links = [attributes["href"] for tag, attributes in found if tag == "a"]
    assert len(links) > 20
    assert [link for link in links if link is None or not link.startswith("#") or link[1:] not in ids] == []
    assert [attributes for _, attributes in found if "src" in attributes or (attributes.get("rel") or "") == "stylesheet"] == []
    (policy,) = [attributes["content"] for _, attributes in found if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_each_chart_has_its_place(tmp_path: Path) -> None:
    report = make_report([run_dirs.write_run(tmp_path / "run")])
    found = elements(report.html())
    places = [attributes["data-chart"] for _, attributes in found if "data-chart" in attributes]
    assert sorted(map(str, places)) == sorted(report.figures())
    assert all(attributes["aria-label"] for _, attributes in found if "data-chart" in attributes)


def test_a_section_from_elsewhere_is_joined_with_its_style_and_script(tmp_path: Path) -> None:
    viewer = Section(
        "trajectories",
        "Trajectories",
        Markup("<p id='seen'>x</p>"),
        styles="main > .seen::before { content: '&'; }",
        scripts="seen = '<b>' && 1;",
    )
    html = make_report([run_dirs.write_run(tmp_path / "run")]).html(viewer)
    assert '<a href="#trajectories">' in html
    assert "<p id='seen'>x</p>" in html
    assert "main > .seen::before { content: '&'; }" in html
    assert re.search(r"<script nonce=\"[^\"]+\" type=\"module\">seen = '<b>' && 1;</script>", html)


def test_json_in_a_page_ends_no_script() -> None:
    text = embedded({"a": "</script><!-- & \u2028"})
    assert "<" not in text
    assert json.loads(text) == {"a": "</script><!-- & \u2028"}


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, "–"), (3.21, "3.2 s"), (310, "5 min 10 s"), (7380, "2 h 3 min"), (363600, "4 d 5 h")]
)
def test_lengths_of_time(seconds: float | None, words: str) -> None:
    assert span(seconds) == words


def test_other_words_for_numbers() -> None:
    assert [short(each) for each in (None, 0.123456, 12345.6, 3.0, float("inf"))] == ["–", "0.1235", "12,346", "3", "inf"]
    assert (percent(0.1234), percent(None)) == ("12.3%", "–")
    assert (moment(0.0), moment(1e300), moment(-1.0)) == ("1970-01-01 00:00:00", "–", "–")
