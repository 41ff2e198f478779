"""The page in a browser: drawn, clicked through, by keyboard, on a phone, in the dark, and without a fault for axe-core."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from ctpo_megatron.loop.ledger import NAME as LEDGER
from ctpo_megatron.report.report import make_report, write_page
from tests.support import chromium, run_dirs
from tests.support.run_dirs import HOSTILE

PHONE = (390, 844)
# of charts the words that are cut off at the right, as a legend's that has too many in a row; and the last cells of long rows
CUT_OFF = """
const beyond = (each, edge) => each.getBoundingClientRect().right > edge + 8;
const edge = (place) => place.getBoundingClientRect().right;
const words = (place) => [...place.querySelectorAll('svg text')].filter((each) => beyond(each, edge(place)));
const cells = [...document.querySelectorAll('table.rows td:last-child')].filter((each) => beyond(each, innerWidth));
return [...[...document.querySelectorAll('[data-chart]')].flatMap(words), ...cells].map((each) => each.textContent);
"""
PICTURES = ("svg",)  # they are hidden from readers of the page: their places have the words


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs, one of which has hostile text in an event, in its setting and in its directory's name."""
    root = tmp_path_factory.mktemp("pages")
    told = run_dirs.events()
    told[-1:] = [{"time": run_dirs.T0 + 150, "event": "part lost", "reason": HOSTILE}, told[-1]]
    hostile = run_dirs.write_run(root / HOSTILE.replace("/", ""), told=told, settings=run_dirs.config(model={"path": HOSTILE}))
    runs = [run_dirs.write_run(root / "well"), hostile]
    assert all((run / LEDGER).is_file() for run in runs)
    write_page(make_report(runs), root / "report.html")
    return root / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium.browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def loaded(browser: webdriver.Chrome, page: Path) -> webdriver.Chrome:
    """The page in a window of a desk, with every chart drawn."""
    browser.set_window_size(1440, 900)
    for log in ("browser", "performance"):
        browser.get_log(log)  # what was there before is no fault of the page
    load(browser, page)
    return browser


@pytest.fixture
def opened(loaded: webdriver.Chrome) -> webdriver.Chrome:
    """The same, at its beginning, whatever the test before has done."""
    loaded.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    return loaded


def load(browser: webdriver.Chrome, page: Path) -> None:
    """Load the page until every chart is drawn."""
    browser.get(f"{page.as_uri()}?all")
    count = "document.querySelectorAll('[data-chart]{}').length"
    wait(browser, f"return {count.format('')} === {count.format(' svg')}")


def wait(browser: webdriver.Chrome, script: str) -> None:
    WebDriverWait(browser, chromium.PATIENCE_S).until(lambda _: browser.execute_script(script), script)


def errors(browser: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_it_draws_all_charts_from_the_disk_and_asks_for_nothing(opened: webdriver.Chrome) -> None:
    assert errors(opened) == []
    asked = set(
        re.findall(r'"url":"((?:https?|wss?|ftp):[^"]*)"', " ".join(entry["message"] for entry in opened.get_log("performance")))
    )
    assert asked == set()
    assert opened.execute_script("return document.querySelectorAll('[data-chart] svg').length") > 40
    assert opened.execute_script("return window.broken") is None
    assert HOSTILE in opened.find_element(By.TAG_NAME, "main").text


def test_links_of_findings_and_of_the_menu_lead_to_their_places(opened: webdriver.Chrome) -> None:
    opened.find_element(By.CSS_SELECTOR, ".menu summary").click()
    link = opened.find_element(By.CSS_SELECTOR, "nav a[href='#run1--ledger']")
    link.click()
    assert opened.execute_script("return location.hash") == "#run1--ledger"
    assert not opened.find_element(By.CSS_SELECTOR, "nav").is_displayed()
    finding = opened.find_element(By.CSS_SELECTOR, "#run2--overview .finding a")
    finding.send_keys(Keys.ENTER)
    target = opened.execute_script("return document.querySelector(location.hash).getBoundingClientRect().top")
    assert 0 <= target < 900


def test_events_are_searched_by_keyboard(opened: webdriver.Chrome) -> None:
    opened.find_element(By.TAG_NAME, "body").send_keys("/")
    field = opened.switch_to.active_element
    assert field.get_attribute("type") == "search"
    field.send_keys("READY")
    rows = opened.find_elements(By.CSS_SELECTOR, "#run1--events-table tbody tr")
    assert [row.is_displayed() for row in rows] == [False, True, False]
    assert opened.find_element(By.CSS_SELECTOR, "[data-count='run1--events-table']").text == "1 events"


def test_sections_by_keyboard(opened: webdriver.Chrome) -> None:
    body = opened.find_element(By.TAG_NAME, "body")
    hashes = []
    for key in ("j", "j", "k"):
        body.send_keys(key)
        wait(opened, "return document.querySelector(location.hash).getBoundingClientRect().top < 80")
        hashes.append(opened.execute_script("return location.hash"))
    assert hashes == ["#run1--overview", "#run1--health", "#run1--overview"]


def test_dark_changes_the_charts_too(opened: webdriver.Chrome) -> None:
    def stroke() -> str | None:
        return opened.execute_script("return document.querySelector('#run1--reward svg .mark-line path')?.getAttribute('stroke')")

    colours = []
    for _ in range(2):
        ground, line = opened.execute_script("return getComputedStyle(document.body).backgroundColor"), stroke()
        colours.append((ground, line))
        opened.find_element(By.TAG_NAME, "body").send_keys("t")
        WebDriverWait(opened, chromium.PATIENCE_S).until(lambda _, old=line: stroke() not in (None, old))
    assert colours[0][0] != colours[1][0]
    assert colours[0][1] != colours[1][1]


def test_a_phone_needs_no_sideways_scrolling(opened: webdriver.Chrome, page: Path) -> None:
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": PHONE[0], "height": PHONE[1], "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        load(opened, page)
        assert opened.execute_script("return document.documentElement.scrollWidth") <= PHONE[0]
        assert opened.find_element(By.CSS_SELECTOR, ".finding a").is_displayed()
        assert opened.execute_script(CUT_OFF) == [], "words of charts, or of what happened, are beyond the edge"
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_prints_with_everything_unfolded(opened: webdriver.Chrome) -> None:
    opened.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert opened.execute_script("return [...document.querySelectorAll('details')].every((each) => each.open)")
    assert len(opened.print_page()) > 10_000


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened: webdriver.Chrome, theme: str) -> None:
    opened.execute_script(f"document.documentElement.dataset.theme = '{theme}'")
    assert chromium.violations(opened, without=PICTURES) == []


def test_axe_would_find_a_fault(opened: webdriver.Chrome) -> None:
    opened.execute_script(
        "document.querySelector('main').insertAdjacentHTML('beforeend', '<img><p style=\"color:#888;background:#999\">pale</p>')"
    )
    assert {each.partition(":")[0] for each in chromium.violations(opened, without=PICTURES)} >= {"image-alt", "color-contrast"}
