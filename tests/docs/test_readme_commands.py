"""The bash blocks of README and quickstart, executed as a reader would: in order, in one shell, from the root.

The shell has a home folder of its own and no setting of whoever runs the tests. Blocks that cannot run here are left
out; the comment above each says why, and the counts below say how many there are.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT, Block, read_blocks

README = ROOT / "README.md"
QUICKSTART = ROOT / "docs" / "quickstart.md"
# A block more or less is a change of the page: count again, and see that what is left out has to be.
EXPECTED = {README: (6, 2), QUICKSTART: (12, 5)}
PAGE_LIMIT_S = 600


def bash_blocks(page: Path) -> tuple[list[Block], list[Block]]:
    """The blocks to run and the ones left out."""
    blocks = [block for block in read_blocks(page) if block.language == "bash"]
    return [b for b in blocks if b.left_out is None], [b for b in blocks if b.left_out]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of somebody who has just cloned the repository; the stack they leave up is ended."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "LC_", "LANG", "SSL_"))}
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        **kept,
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "READROOM_FLOWER_PORT": str(free_port()),
    }
    yield environment
    readroom = ROOT / ".venv" / "bin" / "readroom"
    if readroom.exists():
        subprocess.run([readroom, "down"], cwd=ROOT, env=environment, timeout=200, capture_output=True)


def write_script(block: Block) -> str:
    """The block as shell text: every command must succeed, or the last one must end with the stated status."""
    announcement = f"echo '>>> {block.page} line {block.line}'\n"
    if block.status == 0:
        return announcement + block.text
    checked = f"set +e\n{block.text}\nended=$?\nset -e\n[ $ended = {block.status} ]"
    return f"{announcement}{checked} || {{ echo ended with $ended; exit 99; }}"


def run_page(page: Path, environment: dict[str, str]) -> str:
    """Run the page's blocks; the output of the shell. Fails with the block that failed and what it said."""
    run, _ = bash_blocks(page)
    script = "set -euo pipefail\n" + "\n".join(map(write_script, run)) + "\necho '>>> all blocks done'\n"
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PAGE_LIMIT_S,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert result.stdout.endswith(">>> all blocks done\n")
    return result.stdout


@pytest.mark.parametrize("page", EXPECTED, ids=lambda page: page.name)
def test_page_has_the_counted_blocks(page: Path) -> None:
    run, left_out = bash_blocks(page)
    assert (len(run), len(left_out)) == EXPECTED[page]


def test_every_block_with_commands_says_that_it_is_bash() -> None:
    pages = [README, QUICKSTART]
    assert [b for page in pages for b in read_blocks(page) if b.language not in {"bash", "text", "mermaid"}] == []


@pytest.mark.slow
@pytest.mark.timeout(PAGE_LIMIT_S + 120)
def test_readme_commands_do_what_the_page_says(reader: dict[str, str]) -> None:
    output = run_page(README, reader)
    assert (ROOT / "demo-output" / "contact-sheet.html").stat().st_size > 10_000
    results = Path(reader["HOME"], "tour", "results.csv").read_text().splitlines()
    assert len(results) > 3
    assert "no dead letters" in output
    assert ".jpg: a " in output, "the last command names each picture with its caption"


@pytest.mark.slow
@pytest.mark.timeout(PAGE_LIMIT_S + 120)
def test_quickstart_commands_do_what_the_page_says(reader: dict[str, str]) -> None:
    output = run_page(QUICKSTART, reader)
    assert Path(reader["HOME"], "quickstart", "results.parquet").stat().st_size > 1_000
    assert "would be a submission" in output
    assert "queued 0" in output, "the second enqueue of the same export queues nothing"


def test_test_target_exists_and_runs_pytest() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    make = shutil.which("make")
    assert make
    plan = subprocess.run([make, "-n", "test"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert plan.returncode == 0, plan.stderr
    assert "-m pytest" in plan.stdout


def test_every_make_target_has_its_sentence() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    shown = subprocess.run(["make", "help"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    named = [line.split()[1] for line in shown.stdout.splitlines() if line.startswith("make ")]
    assert set(named) >= {"help", "setup", "services", "demo", "test", "quick", "check", "bench", "docs", "clean"}
    assert all(line.endswith(".") for line in shown.stdout.splitlines() if line)
