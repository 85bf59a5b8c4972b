"""Words for phantom films: the short caption a captioner learns, and the report a radiologist would dictate.

The caption has one order and few choices, so that a small model spends its capacity on looking. The report text has
several phrasings, negations and hedges; labels follow CheXpert: 1 present, 0 denied, -1 uncertain, absent unmentioned.
"""

from dataclasses import dataclass

import numpy as np

from training.findings import DEVICES, Finding, Truth

Labels = dict[str, int]

LATERAL_CAPTION = "lateral chest radiograph."
CHEXPERT_NAMES = {
    "atelectasis": "Atelectasis",
    "cardiomegaly": "Cardiomegaly",
    "consolidation": "Consolidation",
    "pulmonary edema": "Edema",
    "nodule": "Lung Lesion",
    "pleural effusion": "Pleural Effusion",
    "pneumothorax": "Pneumothorax",
    **dict.fromkeys(DEVICES, "Support Devices"),
}


@dataclass(frozen=True)
class ReportText:
    """A report in two sections, and what it says of each finding in CheXpert's terms."""

    findings: str
    impression: str
    labels: Labels


def caption_truth(truth: Truth) -> str:
    """The captioner's target. Heart and pleura are always stated, the rest only when present."""
    if truth.view == "LL":
        return LATERAL_CAPTION
    sentences = ["frontal chest radiograph", _caption_heart(truth), _caption_pleura(truth)]
    for name in ("pneumothorax", "consolidation", "pulmonary edema", "atelectasis", "nodule", *DEVICES):
        finding = truth.find(name)
        if finding is not None:
            sentences.append(_caption_other(finding))
    return ". ".join(sentences) + "."


def _caption_heart(truth: Truth) -> str:
    return "cardiomegaly" if truth.find("cardiomegaly") else "normal heart size"


def _caption_pleura(truth: Truth) -> str:
    finding = truth.find("pleural effusion")
    if finding is None:
        return "no pleural effusion"
    return f"{finding.size} {finding.side} pleural effusion" + ("s" if finding.side == "bilateral" else "")


def _caption_other(finding: Finding) -> str:
    if finding.name == "atelectasis":
        return f"{finding.side} basal atelectasis"
    if finding.name == "consolidation":
        return f"{finding.side} {finding.zone} zone consolidation"
    if finding.name == "nodule":
        return f"{finding.side} lung nodule"
    return f"{finding.side} {finding.name}".strip()


# Each string is one unit: where it holds two sentences, the second leans on the first and is never moved away from it.
_PHRASES: dict[str, tuple[str, ...]] = {
    "pleural effusion": (
        "There is a {size} {side} pleural effusion.",
        "A {size} {side} pleural effusion is present.",
        "{Size} {side} pleural effusion with blunting of the costophrenic angle.",
    ),
    "pneumothorax": (
        "There is a {size} {side} pneumothorax.",
        "A {size} {side} apical pneumothorax is seen with a visible pleural line.",
    ),
    "consolidation": (
        "There is consolidation in the {side} {zone} zone.",
        "Consolidation is seen in the {side} {zone} zone. This may represent pneumonia.",
        "Airspace consolidation in the {side} {zone} zone, suspicious for pneumonia.",
    ),
    "atelectasis": (
        "There is linear atelectasis at the {side} base.",
        "Linear opacity at the {side} base is consistent with atelectasis.",
    ),
    "nodule": (
        "There is a {mm} mm nodule in the {side} {zone} zone.",
        "A rounded nodule measuring {mm} mm projects over the {side} {zone} zone.",
    ),
    "pulmonary edema": (
        "There is {size} pulmonary edema.",
        "Perihilar haze with Kerley B lines is consistent with {size} pulmonary edema.",
    ),
    "cardiomegaly": (
        "The heart is enlarged, with {size} cardiomegaly.",
        "There is {size} cardiomegaly.",
        "The cardiac silhouette is enlarged.",
    ),
    "pacemaker": ("A left chest pacemaker is in place.", "There is a left-sided pacemaker with one lead."),
    "central line": (
        "A right central line ends in the superior vena cava.",
        "A right central venous line terminates in the SVC.",
    ),
    "endotracheal tube": (
        "An endotracheal tube ends above the carina.",
        "The patient is intubated with an endotracheal tube.",
    ),
    "enteric tube": ("An enteric tube courses below the diaphragm.", "The enteric tube tip projects over the stomach."),
    "sternal wires": ("Median sternotomy wires are intact.", "Sternal wires are noted."),
}
_DENIALS: dict[str, tuple[str, ...]] = {
    "cardiomegaly": (
        "The heart is normal in size.",
        "Heart size is within normal limits.",
        "The cardiac silhouette is not enlarged.",
    ),
    "pleural effusion": (
        "There is no pleural effusion.",
        "No pleural effusion is seen.",
        "The costophrenic angles are sharp.",
    ),
    "pneumothorax": ("There is no pneumothorax.", "No evidence of pneumothorax."),
    "consolidation": ("The lungs are clear without focal consolidation.", "No focal consolidation."),
    "pulmonary edema": ("No pulmonary edema.", "There is no evidence of pulmonary edema."),
}


def write_report(truth: Truth, rng: np.random.Generator) -> ReportText:
    """Dictate a report of `truth`. Sentences that lean on each other stay together however the order falls."""
    labels: Labels = {}
    units = [_state_finding(finding, rng, labels) for finding in truth.findings]
    units += _deny_findings(truth, rng, labels)
    order = rng.permutation(len(units))
    findings = " ".join(units[i] for i in order)
    if all(finding.name in DEVICES for finding in truth.findings):
        labels["No Finding"] = 1
    return ReportText(findings, _conclude(truth, rng), labels)


def _state_finding(finding: Finding, rng: np.random.Generator, labels: Labels) -> str:
    phrase = str(rng.choice(_PHRASES[finding.name]))
    labels[CHEXPERT_NAMES[finding.name]] = 1
    if "pneumonia" in phrase:
        labels["Pneumonia"] = -1
    return _fill(phrase, finding)


def _fill(phrase: str, finding: Finding) -> str:
    text = phrase.format(
        size=finding.size, Size=finding.size.capitalize(), side=finding.side, zone=finding.zone, mm=finding.millimetres
    )
    if finding.side != "bilateral":
        return text
    plural = text.replace("There is a ", "There are ").replace("A ", "", 1) if not text.startswith("There") else text
    plural = plural.replace("There is a ", "There are ").replace("effusion is", "effusions are")
    plural = plural.replace("pleural effusion", "pleural effusions").replace("effusionss", "effusions")
    return (plural[0].upper() + plural[1:]).replace("costophrenic angle.", "costophrenic angles.")


def _deny_findings(truth: Truth, rng: np.random.Generator, labels: Labels) -> list[str]:
    """Deny what is absent; the heart is always mentioned, other denials are left out now and then."""
    said = []
    for name, phrases in _DENIALS.items():
        if truth.find(name) is None and (name == "cardiomegaly" or rng.random() < 0.75):
            said.append(str(rng.choice(phrases)))
            labels[CHEXPERT_NAMES[name]] = 0
    return said


def _conclude(truth: Truth, rng: np.random.Generator) -> str:
    """The impression: what matters, numbered when there is more than one; devices are left to the findings."""
    items = [_conclusion(finding) for finding in truth.findings if finding.name not in DEVICES]
    if not items:
        return str(rng.choice(["No acute cardiopulmonary process.", "No acute cardiopulmonary abnormality."]))
    if len(items) == 1:
        return items[0]
    return " ".join(f"{i}. {item}" for i, item in enumerate(items, start=1))


def _conclusion(finding: Finding) -> str:
    name = f"{finding.name}s" if finding.side == "bilateral" else finding.name
    where = f"{finding.side} {finding.zone} zone" if finding.zone and finding.name != "atelectasis" else finding.side
    words = [finding.size, where, name]
    return (" ".join(word for word in words if word) + ".").capitalize()


def every_word() -> list[str]:
    """All sentences these functions can be built from, for the tokenizer's vocabulary."""
    fillers = "small moderate large mild severe right left bilateral upper middle lower zone basal lung mm 1 2 3 4 5 6"
    stock = [p for group in (*_PHRASES.values(), *_DENIALS.values()) for p in group]
    clean = [p.format(size="", Size="", side="", zone="", mm="") for p in stock]
    ends = ["no acute cardiopulmonary process abnormality", "frontal chest radiograph", LATERAL_CAPTION]
    return [*clean, *ends, "effusions angles", fillers, *DEVICES, *CHEXPERT_NAMES, "normal heart size"]
