"""What pages of the documentation point to that is not there: links, files, code, targets of make. A line for each fault."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from ctpo_megatron.record.catalogue import CATALOGUE
from tests.support.pages import ROOT, Block, Page, read_page

FILE = re.compile(r"(?:[\w.-]+/)*[\w-][\w.-]*\.(?:py|md|yaml|sh|sbatch|lock|toml|j2)")
FOLDER = re.compile(r"(?:[\w.-]+/)+")
CAPITALS = re.compile(r"[A-Z]{2}")
TOPS = ("ctpo_megatron", "configs", "docs", "examples", "findings", "launch", "tests", "tools")


@cache
def known(path: Path) -> Page:
    """A page of the project, read once."""
    return read_page(path)


def broken_links(page: Page) -> Iterator[str]:
    """Links to files and headings that are not there. Those to other hosts are not followed."""
    for line, target in page.links:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = unquote(target).partition("#")
        file = (page.path.parent / name).resolve() if name else page.path
        if not file.is_relative_to(ROOT) or not (file.exists() or file == page.path):
            yield f"{page.at(line)}: {target}: there is no such file"
        elif anchor and anchor not in (page if file == page.path else known(file)).anchors:
            yield f"{page.at(line)}: {target}: {file.name} has no such heading"


def wrong_code(page: Page) -> Iterator[str]:
    """Python that does not compile or imports what this project has not, and JSON that is none."""
    for block in page.blocks:
        try:
            if block.info == "python":
                yield from (f"{page.at(block.line)}: {name}: there is no such thing to import" for name in missing_names(block))
            elif block.info == "json":
                for line in block.text.splitlines():
                    json.loads(line)
        except (SyntaxError, ValueError) as error:
            yield f"{page.at(block.line)}: {error}"


def missing_names(block: Block) -> list[str]:
    """What a block of Python imports from this project that is not there. Raises SyntaxError."""
    found = []
    for node in ast.walk(ast.parse(block.text)):
        names = [(alias.name, "") for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [(node.module, alias.name) for alias in node.names]
        own = [(module, name) for module, name in names if module.partition(".")[0] in ("ctpo_megatron", "examples")]
        found += [f"{module}.{name}".rstrip(".") for module, name in own if not is_there(module, name)]
    return found


def is_there(module: str, name: str) -> bool:
    """Whether a module of this project is there and, with a name, whether it has that: one of its own or one it imported."""
    place = ROOT / module.replace(".", "/")
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not name or not file.is_file():
        return place.is_dir() or file.is_file()
    return name in names_in(file) or (place / name).is_dir() or (place / f"{name}.py").is_file()


@cache
def names_in(file: Path) -> set[str]:
    """What a module has at its top level."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
    return found


@cache
def files() -> frozenset[str]:
    """The ends of all paths of this project, as `loop/train.py` and `train.py` are; folders have a slash at their end."""
    tops = [ROOT / name for name in TOPS]
    found = [path for path in ROOT.iterdir() if path.is_file()] + [path for top in tops for path in (top, *top.rglob("*"))]
    paths = [path for path in found if "__pycache__" not in path.parts]
    parts = [(path.relative_to(ROOT).parts, "/" * path.is_dir()) for path in paths]
    return frozenset("/".join(each[start:]) + slash for each, slash in parts for start in range(len(each)))


@cache
def others() -> frozenset[str]:
    """Names that look like those of files and folders of this project, and are a run's or the first words of metrics."""
    blocks = known(ROOT / "README.md").blocks
    (tree,) = (block.text for block in blocks if block.text.startswith("runs/NAME/"))
    return frozenset(
        {*re.findall(r"^  ([\w.]+/?)", tree, re.MULTILINE), *(f"{metric.name.partition('/')[0]}/" for metric in CATALOGUE)}
    )


def missing_files(page: Page) -> Iterator[str]:
    """Words in backticks, and paths in commands, that look like a file or folder of this project, and are none.

    The front of a path may be left out. A name in capitals stands for another.
    """
    words = list(page.spans)
    for block in page.blocks:
        if block.info == "":
            lines = enumerate(block.text.splitlines(), block.line)
            words += [(line, word) for line, text in lines for word in text.split() if word.startswith(TOPS)]
    for line, word in words:
        text = word.partition("::")[0]
        file, folder = FILE.fullmatch(text), FOLDER.fullmatch(text)
        if (file or folder) and not (text in files() or text in others() or CAPITALS.search(text)):
            yield f"{page.at(line)}: `{text}`: there is no such {'file' if file else 'folder'}"


def missing_targets(page: Page) -> Iterator[str]:
    """Targets of make, in backticks and in blocks, that the Makefile has not."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    words = page.spans + [(block.line, line) for block in page.blocks if not block.info for line in block.text.splitlines()]
    for line, text in words:
        if found := re.match(r"make ((?:[a-z-]+ ?)+)", re.split(r" {2,}| #", text)[0]):
            yield from (f"{page.at(line)}: make {name}: no such target" for name in found[1].split() if name not in targets)
