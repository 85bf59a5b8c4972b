"""The pins: complete, installed as written, and under licences that ask nothing of users."""

from __future__ import annotations

import importlib.metadata as metadata
import tomllib
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.architecture.source import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = list(PYPROJECT["project"]["optional-dependencies"])
COPYLEFT = ("GPL", "GENERAL PUBLIC")


def read_pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): version for name, version in pairs}


def walk_requirements(name: str, extras: tuple[str, ...], seen: set[tuple[str, str]]) -> Iterator[str]:
    """Names of all installed packages a package needs, through the extras it asks for."""
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        if not any(requirement.marker is None or requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
            continue
        key = (canonicalize_name(requirement.name), ",".join(sorted(requirement.extras)))
        if key not in seen:
            seen.add(key)
            yield key[0]
            yield from walk_requirements(requirement.name, tuple(requirement.extras), seen)


def needed_packages() -> set[str]:
    return set(walk_requirements("readroom", tuple(EXTRAS), set()))


def test_every_pin_has_one_exact_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = read_pins()
    assert len(pins) == len(lines) > 80
    assert [name for name, version in pins.items() if not version or "+" in version or "*" in version] == []


def test_pins_hold_every_needed_package_and_no_other() -> None:
    assert not {name for name in needed_packages() if not name.startswith(("nvidia-", "cuda-", "triton"))} - set(
        read_pins()
    )
    # colorama and tzdata are needed on other systems only; setuptools builds Readroom itself.
    assert set(read_pins()) - needed_packages() <= {"setuptools", "colorama", "tzdata"}


def test_torchvision_and_celery_batches_are_not_pinned() -> None:
    assert not {"torchvision", "torchaudio", "celery-batches", "pylibjpeg-libjpeg"} & set(read_pins())


def test_installed_versions_are_the_pinned_ones() -> None:
    installed = {name: metadata.version(name).split("+")[0] for name in read_pins()}
    assert installed == read_pins()


def test_makefile_installs_every_extra() -> None:
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("EXTRAS :="))
    assert sorted(line.split(":=")[1].strip().split(",")) == sorted(EXTRAS)


@pytest.mark.parametrize("name", sorted(read_pins()))
def test_package_is_under_a_permissive_licence(name: str) -> None:
    about = metadata.metadata(name)
    classifiers = [line for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    words = " ".join([about.get("License-Expression") or about.get("License") or "", *classifiers]).upper()
    assert not any(word in words[:2000] for word in COPYLEFT)
