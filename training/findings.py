"""What a phantom film shows: findings with exact truth, drawn at random from a seed.

Side is the patient's side: the left of the picture is the patient's right, as on every frontal film.
Lengths are centimetres on the film, boxes are fractions of the picture (x0, y0, x1, y1).
"""

from dataclasses import dataclass, field, replace

import numpy as np

Box = tuple[float, float, float, float]

EFFUSION_SIZES = ("small", "moderate", "large")
SIDES = ("right", "left")
ZONES = ("upper", "middle", "lower")
DEVICES = ("pacemaker", "central line", "endotracheal tube", "enteric tube", "sternal wires")

# Cardiothoracic ratio: radiologists cut at .50; normal stops at .47 and enlarged starts at .55, so that no film is a
# coin toss.
NORMAL_CTR = (0.41, 0.47)
ENLARGED_CTR = {"mild": (0.55, 0.60), "moderate": (0.60, 0.65), "severe": (0.65, 0.70)}


@dataclass(frozen=True)
class Finding:
    """One thing to be seen. `name` is one of FINDINGS or DEVICES; fields that do not apply stay empty."""

    name: str
    side: str = ""
    size: str = ""
    zone: str = ""
    millimetres: int = 0
    box: Box | None = None

    def with_box(self, box: Box) -> "Finding":
        """This finding, with the place it was drawn at."""
        return replace(self, box=box)


@dataclass(frozen=True)
class Truth:
    """Everything that is true of one film. `ctr` is the cardiothoracic ratio drawn."""

    seed: int
    view: str
    ctr: float
    findings: tuple[Finding, ...] = field(default=())

    def find(self, name: str) -> Finding | None:
        """The finding of that name, or None."""
        return next((finding for finding in self.findings if finding.name == name), None)

    def sides(self, name: str) -> frozenset[str]:
        """The patient's sides on which `name` is present; a bilateral finding counts on both."""
        found = self.find(name)
        if found is None:
            return frozenset()
        return frozenset(SIDES) if found.side == "bilateral" else frozenset({found.side})


def sample_truth(seed: int, rng: np.random.Generator, view: str) -> Truth:
    """Draw the findings of one film. One film in six is wholly normal; the rest mix findings freely."""
    if rng.random() < 1 / 6:
        return Truth(seed, view, rng.uniform(*NORMAL_CTR))
    ctr, heart = _sample_heart(rng)
    effusion = _sample_effusion(rng)
    chest = [*heart, *effusion, *_sample_pneumothorax(rng, effusion), *_sample_opacities(rng, effusion)]
    return Truth(seed, view, ctr, (*chest, *_sample_devices(rng)))


def _sample_heart(rng: np.random.Generator) -> tuple[float, list[Finding]]:
    if rng.random() < 0.52:
        return rng.uniform(*NORMAL_CTR), []
    severity = str(rng.choice(list(ENLARGED_CTR)))
    return rng.uniform(*ENLARGED_CTR[severity]), [Finding("cardiomegaly", size=severity)]


def _sample_effusion(rng: np.random.Generator) -> list[Finding]:
    if rng.random() < 0.38:
        return []
    side = str(rng.choice(["right", "left", "bilateral"], p=[0.38, 0.38, 0.24]))
    return [Finding("pleural effusion", side=side, size=str(rng.choice(EFFUSION_SIZES, p=[0.4, 0.35, 0.25])))]


def _sample_pneumothorax(rng: np.random.Generator, effusion: list[Finding]) -> list[Finding]:
    # A large effusion leaves no room for free air on its side, and bilateral ones would hide it.
    taken = effusion[0].side if effusion and effusion[0].size != "small" else ""
    free = [side for side in SIDES if taken not in (side, "bilateral")]
    if not free or rng.random() > 0.2:
        return []
    return [Finding("pneumothorax", side=str(rng.choice(free)), size=str(rng.choice(["small", "large"])))]


def _sample_opacities(rng: np.random.Generator, effusion: list[Finding]) -> list[Finding]:
    side, zone = str(rng.choice(SIDES)), str(rng.choice(ZONES))
    drawn: list[Finding] = []
    if rng.random() < 0.18:
        drawn.append(Finding("consolidation", side=side, zone=zone))
    elif rng.random() < 0.16:
        drawn.append(Finding("pulmonary edema", size=str(rng.choice(["mild", "moderate"]))))
    if rng.random() < 0.12:
        drawn.append(Finding("atelectasis", side=str(rng.choice(SIDES)), zone="lower"))
    if rng.random() < 0.14:
        millimetres = int(rng.integers(18, 35))
        drawn.append(Finding("nodule", str(rng.choice(SIDES)), "", str(rng.choice(ZONES[:2])), millimetres))
    return [finding for finding in drawn if not _is_drowned(finding, effusion)]


def _is_drowned(finding: Finding, effusion: list[Finding]) -> bool:
    """Fluid hides what lies below its surface, and truth must not name what cannot be seen."""
    if not effusion or effusion[0].size == "small" or not finding.side:
        return False
    return effusion[0].side in (finding.side, "bilateral") and (finding.zone != "upper")


def _sample_devices(rng: np.random.Generator) -> list[Finding]:
    chances = (0.14, 0.12, 0.1, 0.1, 0.1)
    return [Finding(name) for name, chance in zip(DEVICES, chances, strict=True) if rng.random() < chance]
