"""How near a text is to people's: BLEU, ROUGE-L and CIDEr of captions, soft accuracy of answers. No torch, no Java.

The caption metrics are those of the COCO caption evaluation (Chen et al. 2015, Microsoft COCO Captions) and equal it
on the same words. Its words come from Stanford's PTBTokenizer, a Java program; `split_words` is simpler.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from readroom.errors import BadCall
from training.intervals import Numbers, Tally, divide_sums
from training.questions import soft_scores

Words = Sequence[str]
Grams = Counter[tuple[str, ...]]

WORDS_VERSION = "words-1"  # of `split_words`: scores are comparable where it is the same
LONGEST_GRAM = 4
# COCO's BLEU adds these above and below each precision, so that texts without any common 4-gram score a little.
ABOVE, BELOW = 1e-15, 1e-9
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0  # words by which lengths may differ, as a standard deviation
CIDER_SCALE = 10.0
WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")

NO_REFERENCE = "a caption is scored against one reference at least"

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}


def split_words(text: str) -> list[str]:
    """Lower case words: runs of letters and digits, hyphens inside kept, other marks dropped; `man's` is two."""
    return WORD.findall(text.lower())


def tally_captions(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Tally]:
    """`bleu_1` to `bleu_4`, `rouge_l` and `cider` of captions, each against all of its image's references.

    CIDEr's rarity of words is that of all references here, also when images are resampled. Raises BadCall for a caption
    without a reference.
    """
    if not all(references):
        raise BadCall(NO_REFERENCE)
    said = [split_words(text) for text in texts]
    wanted = [[split_words(text) for text in known] for known in references]
    pairs = list(zip(said, wanted, strict=True))
    counts = np.array([count_matches(words, known) for words, known in pairs]).reshape(-1, 2 * LONGEST_GRAM + 2)
    tallies = {f"bleu_{n}": Tally(counts, partial(combine_bleu, n), len(pairs)) for n in range(1, LONGEST_GRAM + 1)}
    tallies["rouge_l"] = tally_mean([score_rouge(words, known) for words, known in pairs])
    tallies["cider"] = tally_mean(score_cider(said, wanted))
    return tallies


def tally_mean(values: Sequence[float]) -> Tally:
    """The mean over pictures."""
    column = np.array(values, dtype=np.float64)
    return Tally(np.stack([column, np.ones_like(column)], axis=-1), divide_sums, len(column))


def count_grams(words: Words, longest: int = LONGEST_GRAM) -> Grams:
    """How often each run of 1 to `longest` words occurs."""
    sizes = range(1, longest + 1)
    return Counter(tuple(words[at : at + size]) for size in sizes for at in range(len(words) - size + 1))


# BLEU (Papineni et al. 2002) -----------------------------------------------------------------------------------------


def count_matches(words: Words, references: Sequence[Words]) -> list[float]:
    """Matched runs of 1 to 4 words, all runs of 1 to 4 words, the length, and the nearest reference's length.

    A run matches as often as it occurs in the reference that has it most.
    """
    known: Grams = Counter()
    for reference in references:
        known |= count_grams(reference)
    matched = [0.0] * LONGEST_GRAM
    for gram, count in count_grams(words).items():
        matched[len(gram) - 1] += min(count, known[gram])
    runs = [float(max(0, len(words) - n)) for n in range(LONGEST_GRAM)]
    nearest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
    return [*matched, *runs, float(len(words)), float(nearest)]


def combine_bleu(longest: int, sums: Numbers) -> Numbers:
    """BLEU of runs up to `longest` words, from sums of `count_matches`: geometric mean and brevity penalty."""
    matched, runs = sums[..., :longest], sums[..., LONGEST_GRAM : LONGEST_GRAM + longest]
    mean = np.prod((matched + ABOVE) / (runs + BELOW), axis=-1) ** (1 / longest)
    ratio = (sums[..., -2] + ABOVE) / (sums[..., -1] + BELOW)
    bleu: Numbers = np.where(sums[..., -1] > 0, mean * np.exp(np.minimum(0, 1 - 1 / ratio)), np.nan)
    return bleu


# ROUGE-L (Lin 2004) --------------------------------------------------------------------------------------------------


def score_rouge(words: Words, references: Sequence[Words]) -> float:
    """The F measure of the longest common subsequence; precision and recall each from the reference that suits best.

    Raises BadCall without a reference.
    """
    if not references:
        raise BadCall(NO_REFERENCE)
    common = [(measure_common(words, reference), len(reference)) for reference in references]
    precision = max(length for length, _ in common) / max(1, len(words))
    recall = max(length / max(1, size) for length, size in common)
    if not precision:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def measure_common(one: Words, other: Words) -> int:
    """The length of the longest subsequence of words that both have."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for at, match in enumerate(other):
            row.append(before[at] + 1 if word == match else max(before[at + 1], row[at]))
    return row[-1]


# CIDEr (Vedantam et al. 2015), in the form of COCO's evaluation ------------------------------------------------------


def score_cider(said: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Ten times the mean cosine of rarity-weighted runs of words, a caption each.

    A run counts in the caption as often as in the reference at most, and lengths that differ cost.
    """
    rarity = measure_rarity(references)
    return [
        CIDER_SCALE * float(np.mean([compare_grams(words, reference, rarity) for reference in known]))
        for words, known in zip(said, references, strict=True)
    ]


def measure_rarity(references: Sequence[Sequence[Words]]) -> dict[tuple[str, ...], float]:
    """The logarithm of one over the share of images whose references hold a run of words; the empty run's is of one."""
    images = Counter(gram for known in references for gram in {g for words in known for g in count_grams(words)})
    most = math.log(max(1, len(references)))
    return {gram: most - math.log(count) for gram, count in images.items()} | {(): most}


def compare_grams(words: Words, reference: Words, rarity: dict[tuple[str, ...], float]) -> float:
    """The mean over run lengths 1 to 4 of the cosine, times the penalty for another length."""
    ours, theirs = weigh_grams(words, rarity), weigh_grams(reference, rarity)
    # COCO's evaluation counts runs of two words here, so one word is as long as none.
    apart = max(0, len(words) - 1) - max(0, len(reference) - 1)
    cosines = [_measure_cosine(one, other) for one, other in zip(ours, theirs, strict=True)]
    return sum(cosines) / LONGEST_GRAM * math.exp(-(apart**2) / (2 * CIDER_SIGMA**2))


def weigh_grams(words: Words, rarity: dict[tuple[str, ...], float]) -> list[dict[tuple[str, ...], float]]:
    """Count times rarity of each run of words, by its length; runs that no reference has are the rarest."""
    weighed: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST_GRAM)]
    for gram, count in count_grams(words).items():
        weighed[len(gram) - 1][gram] = count * rarity.get(gram, rarity[()])
    return weighed


def _measure_cosine(ours: dict[tuple[str, ...], float], theirs: dict[tuple[str, ...], float]) -> float:
    length = math.hypot(*ours.values()) * math.hypot(*theirs.values())
    return sum(min(ours[gram], theirs[gram]) * theirs[gram] for gram in ours.keys() & theirs.keys()) / (length or 1.0)


# Answers (Antol et al. 2015, VQA) ------------------------------------------------------------------------------------


def normalise_answer(text: str) -> str:
    """Lower case without articles, marks and apostrophes, `two` as 2; a point or comma inside a number stays or goes.

    The VQA evaluation sets missing apostrophes by a list; here `dont` and `don't` are alike because neither has one.
    """
    plain = re.sub(r"(?<=\d),(?=\d)|['\u2019]", "", text.lower())
    words = re.sub(r"(?!(?<=\d)\.\d)[^\w\s]|_", " ", plain).split()
    return " ".join(DIGITS.get(word, word) for word in words if word not in ARTICLES)


def score_answer(answer: str, people: Sequence[str]) -> float:
    """An answer's agreement with people's, 0 to 1: the VQA evaluation's soft accuracy."""
    given = normalise_answer(answer)
    return float(soft_scores([normalise_answer(text) for text in people], {given: 1}, 2)[1])
