"""Writes docs/commands.md from the console command: `python -m readroom.manual > docs/commands.md`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

import click

from readroom.cli import main

INTRODUCTION = """\
<!-- Written by `make docs` from readroom/cli.py. Change the commands, not this page. -->
# Commands

Exit status 0: done as asked. 1: some items failed, and they are named. 2: a bad call or wrong settings. Progress goes
to standard error, and only on a terminal. `--json` prints one JSON document on standard output.
"""


def render_commands() -> str:
    """The page as Markdown: each command with its arguments and options."""
    sections = [_render_command(path, command) for path, command in walk_commands(main, "readroom")]
    return "\n".join([INTRODUCTION, *sections])


def walk_commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name, `readroom failures list` for instance; groups come before their commands."""
    yield path, command
    if isinstance(command, click.Group):
        for name, child in sorted(command.commands.items()):
            yield from walk_commands(child, f"{path} {name}")


def _render_command(path: str, command: click.Command) -> str:
    heading = "##" if path == "readroom" or " " not in path.removeprefix("readroom ") else "###"
    return "\n".join(
        [f"{heading} {_render_usage(path, command)}", "", _describe(command), *_render_options(command), ""]
    )


def _render_usage(path: str, command: click.Command) -> str:
    arguments = [_render_argument(p) for p in command.params if isinstance(p, click.Argument)]
    return f"`{' '.join([path, *arguments])}`"


def _render_argument(argument: click.Argument) -> str:
    choices = argument.type.choices if isinstance(argument.type, click.Choice) else None
    name = "|".join(map(str, choices)) if choices else (argument.name or "").upper()
    name = f"{name}..." if argument.nargs == -1 else name
    return name if argument.required else f"[{name}]"


def _describe(command: click.Command) -> str:
    """The command's help; a paragraph that click keeps as it is (`\\b`) stays as it is."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    return "\n\n".join(_render_paragraph(p) for p in paragraphs)


def _render_paragraph(paragraph: str) -> str:
    if not paragraph.startswith("\b"):
        return paragraph
    return "```text\n" + paragraph.removeprefix("\b\n") + "\n```"


def _render_options(command: click.Command) -> Iterator[str]:
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    if options:
        yield from ["", "| option | default | meaning |", "| --- | --- | --- |"]
    for option in options:
        yield f"| {_render_names(option)} | {_render_default(option)} | {option.help or ''} |"


def _render_names(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    choices = option.type.choices if isinstance(option.type, click.Choice) else ()
    values = " or ".join(f"`{choice}`" for choice in choices)
    return f"{names} {values}".strip()


def _render_default(option: click.Option) -> str:
    """What `--help` shows; options without a shown default have an empty cell."""
    if not option.show_default or option.default is None:
        return ""
    if option.is_flag and option.secondary_opts:
        return f"`{(option.opts if option.default else option.secondary_opts)[0]}`"
    values = option.default if isinstance(option.default, tuple) else (option.default,)
    return ", ".join(f"`{value}`" for value in values)


if __name__ == "__main__":
    sys.stdout.write(render_commands())
