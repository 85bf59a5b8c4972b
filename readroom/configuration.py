"""Writes docs/configuration.md from the settings: `python -m readroom.configuration > docs/configuration.md`."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from readroom.settings import PREFIX, SECRET_SETTINGS, Settings

# A section begins at the named setting and holds those declared after it, so that a new setting finds its place.
SECTIONS = {
    "home": "Where things are",
    "blip_model": "Models",
    "max_batch": "Batches, messages, decoding",
    "lease_s": "Attempts, leases, repair",
    "max_file_mb": "Limits on what is read",
    "flower_host": "Flower and logs",
}
INTRODUCTION = """\
<!-- Written by `make docs` from readroom/settings.py. Change the settings, not this page. -->
# Configuration

Settings are environment variables with the prefix `READROOM_`, or lines of a file `.env` in the folder where a command
is started. The environment wins over the file. An empty value counts as not set. A value that makes no sense ends the
command with exit status 2 and names the variable, never its value.

Nothing has to be set. Without any setting Readroom runs on one machine, with its own Valkey and SQLite under
`~/.readroom`. `.env.example` shows what a compose stack needs.
"""
SECRETS = """\
## Secrets

A secret can stand in a file instead: set the same variable with `_FILE` behind it to the file's path, as Docker and
Kubernetes secrets do. A variable with `_FILE` wins over the one without. It is read from the environment only, not
from `.env`.

{variables}
"""
KINDS = {
    Path: "path",
    SecretStr: "secret text",
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
}


def render_configuration() -> str:
    """The page as Markdown."""
    rows = "\n".join(_render_rows())
    variables = "\n".join(f"- `{PREFIX}{name.upper()}_FILE`" for name in SECRET_SETTINGS)
    return "\n".join([INTRODUCTION + rows, "", SECRETS.format(variables=variables)])


def _render_rows() -> Iterator[str]:
    for name, setting in Settings.model_fields.items():
        if name in SECTIONS:
            yield from ["", f"## {SECTIONS[name]}", ""]
            yield from ["| variable | value | default | meaning |", "| --- | --- | --- | --- |"]
        cells = [f"`{PREFIX}{name.upper()}`", _describe_value(setting), _describe_default(setting)]
        yield f"| {' | '.join([*cells, setting.description or ''])} |"


def _describe_value(setting: FieldInfo) -> str:
    kind = _unwrap(setting.annotation)
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    return KINDS[kind] + _describe_range(_find_bounds(setting))


def _unwrap(annotation: Any) -> Any:
    """The type inside `X | None` and `Annotated[X, ...]`."""
    if typing.get_origin(annotation) in {typing.Union, types.UnionType}:
        return _unwrap(next(a for a in typing.get_args(annotation) if a is not type(None)))
    if typing.get_origin(annotation) is typing.Annotated:
        return _unwrap(typing.get_args(annotation)[0])
    return annotation


def _find_bounds(setting: FieldInfo) -> dict[str, Any]:
    """The limits of a number: keys `ge`, `gt`, `le`, `lt`, wherever the annotation holds them."""
    marks: list[Any] = list(setting.metadata)
    for part in typing.get_args(setting.annotation):
        if typing.get_origin(part) is typing.Annotated:
            marks += [m for extra in part.__metadata__ for m in getattr(extra, "metadata", [extra])]
    return {key: getattr(mark, key) for mark in marks for key in ("ge", "gt", "le", "lt") if hasattr(mark, key)}


def _describe_range(bounds: dict[str, Any]) -> str:
    words = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
    parts = [f"{words[key]} {bounds[key]:,}" for key in words if key in bounds]
    return f", {' '.join(parts)}" if parts else ""


def _describe_default(setting: FieldInfo) -> str:
    value = setting.default
    if value is None:
        return "unset"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, int | float) else f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(render_configuration())
