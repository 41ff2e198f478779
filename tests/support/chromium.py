"""The system's Chromium without a screen, as a person would use it, and what axe-core finds in a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_core_python.base import AXE_FILE_PATH
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

WAIT_S = 60.0  # for something on a page; it is there at once where the machine has nothing else to do
PATIENCE_S = 120.0  # for a page or a script, beside other work
SERIOUS = ("serious", "critical")
AXE = """
const [without, done] = arguments;
const failed = (error) => done({violations: [{id: String(error), impact: 'critical', nodes: [{html: ''}]}]});
axe.run({exclude: without}, {resultTypes: ['violations']}).then(done, failed);
"""


@contextmanager
def browser(profile: Path, width: int = 1440) -> Iterator[Chrome]:
    """A browser with a profile of its own; the test is skipped where there is none."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = ChromeOptions()
    options.binary_location = chromium
    quiet = ("--disable-background-networking", "--no-first-run", "--disable-gpu", "--no-sandbox", "--disable-dev-shm-usage")
    for each in ("--headless=new", *quiet, f"--user-data-dir={profile}", f"--window-size={width},1000"):
        options.add_argument(each)
    options.add_argument("about:blank")  # and not the start page that a distribution may have chosen
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = Chrome(options, Service(driver))  # named, so that nothing looks for one on the network
    made.set_page_load_timeout(PATIENCE_S)
    made.set_script_timeout(PATIENCE_S)
    try:
        yield made
    finally:
        made.quit()


def violations(page: Chrome, *, without: tuple[str, ...] = ()) -> list[str]:
    """What axe-core finds that is serious: the rule, and the first place. `without`: selectors of what is not looked at."""
    # not as a script of the page, whose policy may allow none
    page.execute_cdp_cmd("Runtime.evaluate", {"expression": f"{Path(AXE_FILE_PATH).read_text(encoding='utf-8')};0"})
    found = page.execute_async_script(AXE, [[each] for each in without])
    return [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found["violations"] if each["impact"] in SERIOUS]
