"""Scores with 95 % intervals: the percentile bootstrap (Efron and Tibshirani 1993, chapter 13) over pictures. No torch.

What is resampled is a picture with everything that was asked about it, for questions about one picture are right or
wrong together. Every score draws the same resamples, so that two models' scores on the same pictures can be paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
SEED = 2026
TAILS = (2.5, 97.5)  # percentiles: 95 % lie between
MAX_WEIGHTS = 20_000_000  # of one piece of the resamples, 160 MB: 214,000 questions would need 1.7 GB at once

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Score:
    """`value` over `n` items, and the bounds of its 95 % interval; all 0 where there was nothing to score."""

    value: float
    n: int
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        """As a JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Tally:
    """A score before it is a number.

    `parts` [pictures, k] is what each picture adds, `combine` turns sums [..., k] into scores [...] (NaN for nothing
    to score), `n` is the number of items that count.
    """

    parts: Numbers
    combine: Callable[[Numbers], Numbers]
    n: int

    @property
    def value(self) -> float:
        """The score, to four decimals; 0 for nothing to score."""
        exact = float(self.combine(self.parts.sum(axis=0)))
        return 0.0 if np.isnan(exact) else round(exact, 4)


def tally_share(hits: Numbers, asked: Numbers) -> Tally:
    """The share of hits among what was asked, both [pictures]."""
    return Tally(np.stack([hits, asked], axis=-1), divide_sums, round(asked.sum()))


def divide_sums(sums: Numbers) -> Numbers:
    """The first of two sums over the second."""
    return divide(sums[..., 0], sums[..., 1])


def divide(above: Numbers, below: Numbers) -> Numbers:
    """NaN where there is nothing below."""
    out = np.full(np.shape(below), np.nan)
    np.divide(above, below, out=out, where=np.asarray(below) > 0)
    return out


def measure_tallies(tallies: Mapping[str, Tally]) -> dict[str, Score]:
    """The score of each tally with its interval, to four decimals."""
    resampled: dict[str, list[Numbers]] = {name: [] for name in tallies}
    for count in {len(tally.parts) for tally in tallies.values()}:
        for weights in draw_weights(count):
            for name, tally in tallies.items():
                if len(tally.parts) == count:
                    resampled[name].append(tally.combine(weights @ tally.parts))
    return {name: _make_score(tally, np.concatenate(resampled[name])) for name, tally in tallies.items()}


def draw_weights(count: int) -> Iterator[Numbers]:
    """How often each of `count` pictures is drawn, [resamples, count] in pieces."""
    rng = np.random.default_rng(SEED)
    piece = max(1, min(RESAMPLES, MAX_WEIGHTS // max(1, count)))
    for start in range(0, RESAMPLES, piece):
        rows = min(piece, RESAMPLES - start)
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=rows) if count else np.zeros((rows, 0))
        yield drawn.astype(np.float64)


def _make_score(tally: Tally, resampled: Numbers) -> Score:
    known = resampled[~np.isnan(resampled)]
    if not tally.n or not len(known):
        return Score(0.0, 0, 0.0, 0.0)
    low, high = (round(float(bound), 4) for bound in np.percentile(known, TAILS))
    return Score(tally.value, tally.n, low, high)
