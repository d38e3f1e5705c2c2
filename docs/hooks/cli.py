"""Generates docs/cli.md from the commands, so that a new command or option needs no edit."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

import click

MARKER = "<!-- commands -->"
_HEADINGS = "##", "###"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker in a page with all commands; MkDocs calls this for each page."""
    if MARKER not in markdown:
        return markdown
    from llama_onnx.exporter.cli import main

    return markdown.replace(MARKER, render(main, "llama-onnx"))


def render(root: click.Command, name: str) -> str:
    """Return the Markdown of `root` and all its subcommands, one section for each.

    Commands are looked up by name, because a group may load them on demand.
    """
    context = click.Context(root, info_name=name, **root.context_settings)
    return "\n\n".join(_sections(root, context))


def _sections(command: click.Command, context: click.Context) -> Iterator[str]:
    parents = context.command_path.count(" ")
    yield f"{_HEADINGS[min(parents, 1)]} {context.command_path}"
    yield f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```"
    yield from _paragraphs(command.help or "")
    if isinstance(command, click.Group):
        names = [name for name in command.list_commands(context) if _shown(command, context, name)]
        yield _overview(command, context, names)
        yield _options(command, context)
        for name in names:
            child = command.get_command(context, name)
            assert child is not None
            yield from _sections(child, click.Context(child, info_name=name, parent=context))
    else:
        yield _options(command, context)


def _shown(group: click.Group, context: click.Context, name: str) -> bool:
    command = group.get_command(context, name)
    return command is not None and not command.hidden


def _paragraphs(text: str) -> Iterator[str]:
    # In click, a line with only \b marks a paragraph that keeps its line breaks.
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in paragraph.splitlines()]
        if lines[:1] == ["\b"]:
            yield "```text\n" + "\n".join(lines[1:]) + "\n```"
        elif paragraph:
            yield _escape(" ".join(lines))


def _overview(group: click.Group, context: click.Context, names: list[str]) -> str:
    rows = ["| Command | What it does |", "| --- | --- |"]
    for name in names:
        command = group.get_command(context, name)
        assert command is not None
        path = f"{context.command_path} {name}"
        anchor = path.replace(" ", "-")
        rows.append(f"| [`{name}`](#{anchor}) | {_cell(command.get_short_help_str(200))} |")
    return "\n".join(rows)


def _options(command: click.Command, context: click.Context) -> str:
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    rows = ["| Option | Meaning |", "| --- | --- |"]
    for names, meaning in filter(None, records):
        if meaning:  # an argument without a help text is in the usage line already
            shown = html.escape(names).replace("|", "&#124;<wbr>")
            rows.append(f"| <code>{shown}</code> | {_cell(meaning)} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return _escape(" ".join(text.split())).replace("|", "\\|")


def _escape(text: str) -> str:
    """Escape what Markdown would read as markup, outside of code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([<*_\[\]])", r"\\\1", part) for part in parts
    )
