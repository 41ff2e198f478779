"""What pages name is there: links, commands, settings, code, files; and the site leads to each page. Planted faults are found."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from tests.support.page_commands import commands, missing_keys, words_of, wrong_commands, wrong_yaml
from tests.support.page_faults import broken_links, known, missing_files, missing_targets, wrong_code
from tests.support.pages import ROOT, Page, pages, read_page

Check = Callable[[Page], Iterator[str]]
CHECKS: list[Check] = [
    broken_links,
    wrong_commands,
    wrong_yaml,
    missing_keys,
    wrong_code,
    missing_files,
    missing_targets,
]
DOCS = ROOT / "docs"


def load_navigation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("navigation", DOCS / "site" / "navigation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAVIGATION = load_navigation()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_pages_say_what_is_so(check: Check) -> None:
    assert [fault for path in pages() for fault in check(known(path))] == []


def planted(text: str) -> list[str]:
    """The faults of a page in docs/ with this text, by all checks."""
    page = read_page(DOCS / "planted.md", text)
    return [fault for check in CHECKS for fault in check(page)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("# A\n\n[x](none.md)", "planted.md:3: none.md: there is no such file"),
        ("[x](data.md#none)", "data.md#none: data.md has no such heading"),
        ("# A\n\n[x](#b)", "#b: planted.md has no such heading"),
        ("![x](none.svg)", "none.svg: there is no such file"),
        ("[x](../../etc)", "../../etc: there is no such file"),
        ("```\nctpo trian CONFIG\n```", "planted.md:2: ctpo trian CONFIG: there is no command 'trian'"),
        ("```\n.venv/bin/ctpo watch runs/a --onec\n```", "No such option: --onec"),
        ("```\nctpo train   # what?\n```", "ctpo train: Missing parameter: config"),
        ("```\nctpo train CONFIG \\\n    train.stepps=3\n```", "train.stepps: unknown key"),
        ("```\nctpo train CONFIG 'trace.steps=[ten]'\n```", "trace.steps"),
        ("```\nctpo plan configs/none.yaml\n```", "`configs/none.yaml`: there is no such file"),
        ("see `ctpo reprot RUN_DIR`", "there is no command 'reprot'"),
        ("see `ctpo data CONFIG --sample 3`", "no such option: --sample"),
        ("```yaml\ntrain: [\n```", "not valid YAML"),
        ("```yaml\ntrain: {stepps: 3}\n```", "train.stepps: unknown key"),
        ("```yaml\ntrain: {steps: three}\n```", "train.steps"),
        ("```yaml site\npartitoin: gpu\n```", "partitoin: unknown key"),
        ("`train.stepps=3`", "`train.stepps=3`: there is no such key"),
        ("```python\nx = (\n```", "planted.md:2: '(' was never closed"),
        ("```python\nfrom ctpo_megatron.algorithms import police_loss\n```", "ctpo_megatron.algorithms.police_loss"),
        ("```python\nimport ctpo_megatron.none\n```", "ctpo_megatron.none: there is no such thing"),
        ('```json\n{"a": }\n```', "planted.md:2: Expecting value"),
        ("`loop/none.py`", "`loop/none.py`: there is no such file"),
        ("`none.py`", "`none.py`: there is no such file"),
        ("`none/train.py`", "`none/train.py`: there is no such file"),
        ("`none/`", "`none/`: there is no such folder"),
        ("`tests/none/`", "`tests/none/`: there is no such folder"),
        ("```\npython tools/none.py\n```", "`tools/none.py`: there is no such file"),
        ("`make nothing`", "make nothing: no such target"),
        ("```\nmake install nothing   # both\n```", "make nothing: no such target"),
    ],
)
def test_a_planted_fault_is_found(text: str, told: str) -> None:
    found = planted(text)
    assert len(found) == 1, found
    assert told in found[0]


def test_what_is_right_is_no_fault() -> None:
    right = [
        "## Its `name`, twice\n\n## Its `name`, twice\n\n[x](#its-name-twice) [y](#its-name-twice-1) [z](https://host/none.md#a)",
        "[x](../README.md#start) [y](operations/slurm.md) [z](concepts.svg)",
        "```\n$ ctpo train CONFIG [--resume [auto]]\n```",
        "```\nctpo data CONFIG [key=value ...] [--samples 2] [--as train|sft] | less\n```",
        "`train.steps=3` `loop.train` `loop/train.py` `tests/unit/` `algorithms/objectives/NAME.py`",
        "`train/loss` `train/` `rollouts/` `RUN_DIR/x.md`",
        "```python\nfrom ctpo_megatron.config.load import load_config\n```",
    ]
    assert [fault for text in right for fault in planted(text)] == []


def test_the_checks_see_much() -> None:
    """Nobody notices when a reader no longer finds what it is to check."""
    read = [known(path) for path in pages()]
    assert len([each for page in read for each in commands(page)]) > 40
    assert len([link for page in read for link in page.links]) > 200
    assert len([block for page in read for block in page.blocks if block.info.startswith(("yaml", "python"))]) > 15
    assert words_of("ctpo data CONFIG [--as train|sft] 'a=[1,2]'") == ["data", "CONFIG", "--as", "train", "a=[1,2]"]


def off_the_index(text: str) -> list[str]:
    """The pages to which the navigation of an index with this text does not lead, or leads twice."""
    led = [(DOCS / f"{page}.md").resolve() for entries in NAVIGATION.entries(text).values() for _, page in entries]
    wanted = [path for path in pages() if path != DOCS / "index.md"]
    return [str(path.relative_to(ROOT)) for path in wanted if led.count(path) != 1]


def test_the_site_leads_to_every_page() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert off_the_index(index) == []
    assert off_the_index(index.replace("(data.md)", "(chat.md)")) == ["docs/chat.md", "docs/data.md"]
    for caption in ("Start", "Your data", "Your model", "Your cluster", "Operations", "Seeing a run", "Extending", "Reference"):
        assert f":caption: {caption}\n" in NAVIGATION.tables(index)


def test_what_makes_the_site_is_pinned() -> None:
    lines = (DOCS / "site" / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", line)] == []
    assert {"sphinx", "myst-parser", "furo"} <= {pin.partition("==")[0] for pin in pins}
