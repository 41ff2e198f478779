"""The trajectory viewer in a browser, opened from the disk: parts beside the page, filters, keys, colours, hostile text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from ctpo_megatron.report.page.page import page as whole_page
from ctpo_megatron.report.viewer import section as sections
from ctpo_megatron.report.viewer.store import PartStore
from tests.support.chromium import WAIT_S, browser, violations
from tests.support.trajectory_runs import HOSTILE, write_step, write_tokenizer


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def write_page(run: Path, page: Path) -> None:
    section = sections.trajectories_section([run], page)
    assert section is not None
    page.write_text(whole_page("a run", "now", [("a run", [section])], {}), encoding="utf-8")


def until(chrome: Chrome, script: str) -> None:
    """Wait until an expression in the page holds."""
    WebDriverWait(chrome, WAIT_S, poll_frequency=0.02).until(lambda _: chrome.execute_script(f"return Boolean({script})"), script)


def shown(chrome: Chrome, name: str) -> None:
    until(chrome, f"document.querySelector('.tv')?.dataset.shown === '{name}'")


def find(chrome: Chrome, selector: str) -> WebElement:
    return chrome.find_element("css selector", selector)


def colour(chrome: Chrome) -> str:
    """What the tokens of the version before the newest are coloured with, in the legend too."""
    find(chrome, "input[value=version]").click()
    return find(chrome, ".tv-legend [data-c=v1]").value_of_css_property("background-color")


def names(chrome: Chrome) -> list[str]:
    return [row.text for row in chrome.find_elements("css selector", ".tv-row b")]


def counted(chrome: Chrome, words: str) -> None:
    until(chrome, f"document.querySelector('.tv-status')?.textContent.startsWith('{words}')")


def test_a_trajectory_is_found_and_read(chrome: Chrome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "PartStore", lambda directory: PartStore(directory, inside=0))
    run, page = tmp_path / "run", tmp_path / "a page #1.html"
    for step in (1, 2):
        write_step(run, step, "one", "two é\n", HOSTILE)
    write_tokenizer(run / "model")
    write_page(run, page)
    chrome.get(page.as_uri())
    shown(chrome, "g00000001.0")  # the worst
    assert names(chrome) == [f"g0000000{step}.{place}" for place in range(3) for step in (1, 2)]
    click_through(chrome)
    filters(chrome)
    assert violations(chrome) == []
    assert colour(chrome) == "rgba(227, 238, 252, 1)"
    find(chrome, "#theme").click()
    assert colour(chrome) == "rgba(29, 47, 74, 1)"
    assert violations(chrome) == []
    assert [entry["message"] for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"] == []


def click_through(chrome: Chrome) -> None:
    find(chrome, "[data-order=best]").click()
    shown(chrome, "g00000001.2")
    assert "window.harmed=1" in find(chrome, ".tv-tokens").text
    assert "⟨U+202E⟩" in find(chrome, ".tv-tokens").text
    assert "⟨U+001B⟩" in find(chrome, ".tv-tokens").text
    assert chrome.execute_script("return window.harmed === undefined && document.querySelector('.tv img, .tv b b') === null")
    fold = find(chrome, ".tv-tool")
    assert not fold.get_property("open")
    find(chrome, ".tv-list").send_keys("t")
    assert fold.get_property("open")
    assert "tool <b>bold</b>" in fold.text
    find(chrome, ".tv-list").send_keys(Keys.UP, "j")  # it stays at the first, then goes on
    shown(chrome, "g00000002.2")
    find(chrome, ".tv-list").send_keys("kj")
    find(chrome, "[data-order=drifted]").click()
    find(chrome, "input[value=clip]").click()
    assert "held back from growing" in find(chrome, ".tv-legend").text
    clipped = chrome.find_elements("css selector", ".tv-tokens [data-c=f1]")
    assert "".join(each.text for each in clipped) == HOSTILE[:2]
    find(chrome, ".tv-tokens").send_keys("n")  # the next token of note
    assert "held back from growing" in find(chrome, ".tv-readout").text
    assert "version" in find(chrome, ".tv-readout").text
    find(chrome, ".tv-tokens").send_keys(Keys.ARROW_RIGHT)
    assert "token 7 of" in find(chrome, ".tv-readout").text
    find(chrome, "input[value=author]").click()
    assert len(chrome.find_elements("css selector", ".tv-tokens [data-c=a3]")) == 1  # <|end|> behind what the tool said
    find(chrome, "input[value=version]").click()
    assert "version 1" in find(chrome, ".tv-legend").text


def filters(chrome: Chrome) -> None:
    labels = {each.text.split("\n")[0]: each for each in chrome.find_elements("css selector", ".tv-filters label")}
    text = labels["Text"].find_element("css selector", "input")
    text.send_keys("TWO")
    counted(chrome, "2 of 6")
    text.clear()
    text.send_keys("harmed=1'>")
    counted(chrome, "2 of 6")
    text.clear()
    text.send_keys("bold")  # what the tool said, of which the index knows nothing
    counted(chrome, "0 of 6")
    find(chrome, ".tv-filters button").click()
    counted(chrome, "6 of 6 trajectories, found in whole texts")
    text.clear()
    text.send_keys(Keys.SPACE, Keys.BACKSPACE)
    labels["Step from"].find_element("css selector", "input").send_keys("2")
    labels["Reward from"].find_element("css selector", "input").send_keys("1")
    counted(chrome, "2 of 6")
    chrome.execute_script("location.hash = '#trajectories/step_00000001/g00000001.1'")
    shown(chrome, "g00000001.1")
    assert "Branch 1" in find(chrome, ".tv-tokens").text
    assert "two ·é" in find(chrome, ".tv-tokens").text  # the letter is two tokens


def test_a_page_without_its_folder_says_what_is_missing(chrome: Chrome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "PartStore", lambda directory: PartStore(directory, inside=0))
    run, page = tmp_path / "run", tmp_path / "page.html"
    write_step(run, 1, "one")
    write_page(run, page)
    (tmp_path / "page_files").rename(tmp_path / "elsewhere")
    chrome.get(page.as_uri())
    counted(chrome, "page_files/trajectories/index.js is not there")


def test_without_a_tokenizer_tokens_are_their_numbers(chrome: Chrome, tmp_path: Path) -> None:
    run, page = tmp_path / "run", tmp_path / "page.html"
    write_step(run, 1, HOSTILE, tokens=False)
    write_page(run, page)
    chrome.get(page.as_uri())
    shown(chrome, "g00000001.0")
    assert find(chrome, ".tv-turn").text.startswith("87 104 97 116 63")
    assert "window.harmed=1" in find(chrome, ".tv-text").text
    assert not find(chrome, "[data-order=clipped]").is_enabled()
    assert chrome.execute_script("return window.harmed === undefined")
    assert violations(chrome) == []
