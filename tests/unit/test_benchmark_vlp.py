"""benchmarks/vlp.py races like with like: the peer writes what VLP writes, and a race of different captions is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import vlp as benchmark
from benchmarks.vlp import PEER, VLP, VLP_OPEN, Way, race_ways
from benchmarks.vlp_peer import caption_plainly
from models.load import load_captioner
from models.vlp.decoding import SearchOptions, search_captions
from models.vlp.layout import SpecialIds
from models.vlp.network import SeenRegions
from models.vlp.regions import locate_regions
from tests.fakes.small_blip import SPECIAL
from tests.fakes.small_vlp import SPECS, save_vlp, small_config, small_model

ROOT = Path(__file__).parents[2]
IDS = SpecialIds(*(SPECIAL.index(token) for token in ("[UNK]", "[CLS]", "[SEP]", "[MASK]")))


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
@pytest.mark.parametrize("shortest", [0, 4, 11])
@torch.no_grad()
def test_peer_writes_what_vlp_writes(beams: int, shortest: int) -> None:
    lengths = set()
    for seed in range(6):
        config = small_config(SPECS["precomputed"])
        model, regions = small_model(config, seed), benchmark.draw_regions(config, 3)
        seen = SeenRegions(regions.features, locate_regions(regions.boxes, regions.classes))
        ours = search_captions(model, seen, IDS, SearchOptions(beams, 11, shortest)).tokens
        assert caption_plainly(model, seen, IDS, beams, 11, shortest) == ours
        lengths |= set(map(len, ours))
    assert min(lengths) == min(shortest + 1, 11)
    assert len(lengths) > 1 or shortest == 11


def test_drawn_regions_are_such_as_a_detector_writes() -> None:
    found = benchmark.draw_regions(small_config(SPECS["precomputed"]), 3)
    assert found.features.min() >= 0
    assert torch.allclose(found.classes.sum(dim=-1), torch.ones(3, 10))
    x1, y1, x2, y2, index, confidence = found.boxes.unbind(dim=-1)
    assert (x1 <= x2).all() and (y1 <= y2).all()
    assert torch.equal(found.classes[..., 1:].argmax(dim=-1) + 1, index.long())
    assert torch.equal(found.classes[..., 1:].amax(dim=-1), confidence)
    assert (confidence.diff(dim=1) <= 0).all()


def test_ways_take_turns() -> None:
    called: list[str] = []

    def make(name: str) -> Way:
        return Way(name, lambda: called.append(name) or [[1]], "" if name == "a" else "a", "a")

    race = race_ways([make("a"), make("b"), make("c")], count=1, rounds=4, length=1)
    assert "".join(called) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert list(race["ways"]) == ["a", "b", "c"]
    assert list(race["ratios"]) == ["b", "c"]
    assert all(len(taken) == 4 for taken in race["seconds"].values())


def test_figures_are_captions_a_second_and_ratios_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 2, 0, 10, 0, 30, 0, 5])  # a takes 2 and 5 seconds, b 10 and 30: the second round starts with b
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(ticks))
    race = race_ways([Way("a", lambda: []), Way("b", lambda: [], "a")], count=20, rounds=2)
    assert race["ways"]["a"] == {"median": 7.0, "low": 4.0, "high": 10.0}
    assert race["ratios"]["b"] == {"beside": "a", "median": 5.5, "low": 5.0, "high": 6.0}


def test_different_captions_are_no_race() -> None:
    ways = [Way("a", lambda: [[1, 2]]), Way("b", lambda: [[1, 3]], same_as="a")]
    with pytest.raises(SystemExit, match="b and a write different tokens"):
        race_ways(ways, count=1, rounds=1)


def test_captions_of_another_length_are_no_race() -> None:
    with pytest.raises(SystemExit, match="a does not write 3 tokens"):
        race_ways([Way("a", lambda: [[1, 2, 3], [1, 2]])], count=2, rounds=1, length=3)


def test_checkpoint_is_raced_from_pixels_in_its_own_ways(tmp_path: Path) -> None:
    captioner = load_captioner(str(save_vlp(tmp_path / "vlp")), "cpu")
    ways = benchmark.list_bundled_ways(captioner, 4, beams=3)
    assert [way.name for way in ways] == [VLP, VLP_OPEN, PEER]
    assert len({tuple(tokens) for tokens in ways[0].run()}) > 1
    race = race_ways(ways, 4, rounds=1)
    assert set(race["ratios"]) == {VLP_OPEN, PEER}


def test_benchmark_runs_and_writes_its_figures(tmp_path: Path) -> None:
    kept = tmp_path / "vlp.json"
    command = [sys.executable, "-m", "benchmarks.vlp", "--quick", "--threads", "1", "--json", str(kept)]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = json.loads(kept.read_text())
    assert "threads 1," in found["machine"] and f"torch {torch.__version__}" in found["machine"]
    assert [(race["batch"], race["beams"]) for race in found["random"]] == [(1, 1), (1, 3), (8, 1), (8, 3)]
    assert all(set(race["ratios"]) == {PEER, "BLIP"} for race in found["random"])
    assert set(found["bundled"]["missing"]) | set(found["bundled"]["checkpoints"]) == {"vlp", "blip"}
    rows = [line for line in printed.splitlines() if line.startswith(("| 1 |", "| 8 |"))]
    assert len(rows) == 16
