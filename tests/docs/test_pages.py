"""The pages tell the truth: links lead somewhere, commands and settings exist and are documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from readroom.cli import main
from readroom.intake import EXPECTED_REASONS
from readroom.manual import walk_commands
from readroom.records import TRANSITIONS, JobState, Priority, Reason
from tests.docs.markdown import ROOT, list_anchors, list_pages, read_blocks, read_links, read_table, strip_blocks
from tests.docs.test_configuration import COMPOSE_ONLY, known_variables
from worker.lifecycle import ExitCode

PAGES = list_pages()
HAND_WRITTEN = [page for page in PAGES if page.name not in {"commands.md", "configuration.md"}]
COMMANDS = dict(walk_commands(main, "readroom"))
# Prefixes that stand for several.
EXAMPLE_VARIABLES = {"READROOM_", "READROOM_FLOWER_"}
# Read by a test, not by Readroom.
TEST_VARIABLES = {"READROOM_PARITY_VLP"}


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def hand_written_text() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in HAND_WRITTEN)


def test_pages_were_found() -> None:
    names = {relative(page) for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= names
    assert {f"docs/{name}.md" for name in ("glossary", "quickstart", "how-it-works", "operations", "safety")} <= names
    assert len([name for name in names if name.startswith("docs/decisions/0")]) >= 6


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_of_page_lead_somewhere(page: Path) -> None:
    for target in read_links(page):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in list_anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_page_brings_no_pickled_weights(page: Path) -> None:
    # The `main` of BLIP's hub repositories holds pickles, which workers refuse: they are converted, not downloaded.
    commands = [block.text for block in read_blocks(page) if block.language == "bash"]
    assert [text for text in commands if re.search(r"hf download Salesforce/blip", text)] == []


def test_every_page_of_docs_is_linked_from_its_index() -> None:
    linked = {(ROOT / "docs" / t.split("#")[0]).resolve() for t in read_links(ROOT / "docs" / "README.md")}
    decisions = ROOT / "docs" / "decisions"
    linked |= {(decisions / t.split("#")[0]).resolve() for t in read_links(decisions / "README.md")}
    pages = {page for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert {relative(page) for page in pages - linked} == {"docs/README.md"}


def test_every_command_is_explained_in_words_somewhere() -> None:
    text = hand_written_text()
    leaves = [path for path, command in COMMANDS.items() if not hasattr(command, "commands")]
    assert len(leaves) >= 20
    assert [path for path in leaves if not _mentions(text, path)] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_named_on_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for words in re.findall(r"`readroom ([a-z][a-z-]*(?: [a-z][a-z-]*)?)", text):
        first, _, second = words.partition(" ")
        assert f"readroom {first}" in COMMANDS, words
        if second and hasattr(COMMANDS[f"readroom {first}"], "commands"):
            assert f"readroom {words}" in COMMANDS, words


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_in_blocks_of_page_take_the_options_they_are_given(page: Path) -> None:
    for block in read_blocks(page):
        if block.language != "bash":
            continue
        for line in block.text.splitlines():
            for call in re.findall(r"\breadroom ([a-z][^|;&>#)]*)", line):
                _check_options(call.split(), line)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_variables_named_on_page_are_settings(page: Path) -> None:
    named = set(re.findall(r"\bREADROOM_[A-Z_]*", page.read_text(encoding="utf-8")))
    assert named - known_variables() - EXAMPLE_VARIABLES - TEST_VARIABLES - COMPOSE_ONLY == set()


def test_make_targets_named_on_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)", hand_written_text())) | set(
        re.findall(r"^make ([a-z]+)", hand_written_text(), flags=re.MULTILINE)
    )
    assert len(named) >= 6
    assert named <= targets


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=relative)
def test_files_named_on_page_exist(page: Path) -> None:
    text = strip_blocks(page.read_text(encoding="utf-8"))
    pattern = r"`((?:readroom|producer|worker|models|training|db|tests|docs|benchmarks)/[\w/.-]+\.\w+)`"
    assert [name for name in re.findall(pattern, text) if not (ROOT / name).exists()] == []


def test_drawn_states_are_the_enumerated_ones() -> None:
    blocks = [b for b in read_blocks(ROOT / "docs" / "how-it-works.md") if b.text.startswith("stateDiagram")]
    assert len(blocks) == 1
    edges = set(re.findall(r"^\s*(\w+) --> (\w+)", blocks[0].text, flags=re.MULTILINE))
    expected = {(str(start), str(end)) for start, ends in TRANSITIONS.items() for end in ends}
    assert edges == expected
    assert len(JobState) == 6


def test_every_reason_has_its_row_with_its_exit_status() -> None:
    rows = read_table(ROOT / "docs" / "reasons.md", "reason")
    assert [row[0] for row in rows] == [str(reason) for reason in Reason]
    assert {row[0] for row in rows if row[2] == "0"} == set(EXPECTED_REASONS)


def test_every_exit_status_of_a_worker_has_its_row() -> None:
    rows = read_table(ROOT / "docs" / "operations.md", "status")
    assert {(int(row[0]), row[1]) for row in rows} == {(code.value, code.name) for code in ExitCode}


def test_glossary_has_the_words_of_states_and_priorities() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    assert [word for word in Priority if word not in text] == []
    assert len(read_table(ROOT / "docs" / "glossary.md", "word")) >= 13


def test_pages_name_no_machine_and_hold_no_secret() -> None:
    pattern = re.compile(r"/work/|/root/|/home/[a-z]+|/Users/|BEGIN [A-Z ]*PRIVATE KEY|hf_[A-Za-z0-9]{20}")
    assert [relative(page) for page in PAGES if pattern.search(page.read_text())] == []


def _mentions(text: str, path: str) -> bool:
    """`readroom failures list`, or one of several told at once: `readroom failures list|show`."""
    group, _, leaf = path.rpartition(" ")
    return bool(re.search(rf"{re.escape(group)} (?:[\w|-]+\|)?{re.escape(leaf)}\b", text))


def _check_options(words: list[str], line: str) -> None:
    path = "readroom"
    while words and f"{path} {words[0]}" in COMMANDS:
        path = f"{path} {words.pop(0)}"
    assert path != "readroom", line
    known = {name for parameter in COMMANDS[path].params for name in [*parameter.opts, *parameter.secondary_opts]}
    assert {word.split("=")[0] for word in words if word.startswith("-")} <= known | {"--help"}, line
