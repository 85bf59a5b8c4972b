"""Markdown pages of this repository, read as blocks, links and words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = re.compile(r"<!--\s*not run:\s*(?P<reason>.+?)\s*-->")
ENDS_WITH = re.compile(r"<!--\s*ends with status (?P<status>\d+):\s*.+?\s*-->")
FENCE = re.compile(r"^```(?P<language>\w*)\s*$")
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. A comment above it can say why it is not run (`left_out`), or its exit status (`status`)."""

    page: str
    line: int
    language: str
    text: str
    left_out: str | None
    status: int


def list_pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def read_blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page, with what the comment on the nearest line above says."""
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
    above = ""
    for number, line in lines:
        fence = FENCE.match(line)
        if not fence:
            above = line if line.strip() else above
            continue
        body = []
        for _, inner in lines:
            if inner.startswith("```"):
                break
            body.append(inner)
        mark, end = NOT_RUN.search(above), ENDS_WITH.search(above)
        reason, status = mark["reason"] if mark else None, int(end["status"]) if end else 0
        yield Block(page.name, number, fence["language"], "\n".join(body), reason, status)
        above = ""


def read_links(page: Path) -> list[str]:
    """Targets of links and pictures outside fenced blocks."""
    return [match["target"] for match in LINK.finditer(strip_blocks(page.read_text(encoding="utf-8")))]


def strip_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def list_anchors(page: Path) -> set[str]:
    """The anchors GitHub makes of headings: lower case, spaces as hyphens, punctuation dropped."""
    headings = re.findall(r"^#+ (.+)$", strip_blocks(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def read_table(page: Path, first_column: str) -> list[list[str]]:
    """The rows of the table whose first header cell is `first_column`, cells without back-ticks around them."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split(" | ")])
    return rows
