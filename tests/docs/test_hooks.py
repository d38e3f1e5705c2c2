"""The hooks of the documentation site, loaded by path, as MkDocs does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import click
import pytest

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/hooks/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OnDemand(click.Group):
    """Like a group that loads its commands on demand, it finds them only by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["nested", "secret"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return {"nested": nested, "secret": secret}.get(cmd_name)


@click.group(cls=OnDemand, context_settings={"help_option_names": ["-h", "--help"]})
def root() -> None:
    """All of it."""


@click.group()
def nested() -> None:
    """Hold one more."""


@click.command(hidden=True)
def secret() -> None:
    """Not to be shown."""


@nested.command()
@click.argument("source")
@click.option("--mode", type=click.Choice(["a", "b"]), default="a", show_default=True, help="A|B.")
@click.option("--quiet", hidden=True, is_flag=True)
def leaf(source: str, mode: str) -> None:
    """Read *SOURCE* and `*write*` <OUT>."""


def test_commands_at_every_depth_are_rendered() -> None:
    page = load("cli").render(root, "tool")
    assert "## tool\n" in page
    assert "### tool nested leaf\n" in page
    assert "tool nested leaf [OPTIONS] SOURCE" in page
    assert "[`nested`](#tool-nested)" in page
    assert "[`leaf`](#tool-nested-leaf)" in page
    assert r"Read \*SOURCE\* and `*write*` \<OUT>." in page
    row = r"| <code>--mode [a&#124;<wbr>b]</code> | A\|B. \[default: a\] |"
    assert row in page
    assert "<code>-h, --help</code>" in page
    assert "<code>SOURCE</code>" not in page
    assert "secret" not in page
    assert "--quiet" not in page


def test_the_page_has_every_command_and_option() -> None:
    from llama_onnx.exporter.cli import main

    page = load("cli").on_page_markdown((ROOT / "docs/cli.md").read_text(encoding="utf-8"))
    context = click.Context(main, info_name="llama-onnx")
    names = main.list_commands(context)
    assert len(names) > 10
    for name in names:
        command = main.get_command(context, name)
        assert command is not None
        _, _, section = page.partition(f"### llama-onnx {name}\n")
        for parameter in command.params:
            shown = isinstance(parameter, click.Option) and not parameter.hidden
            for option in parameter.opts if shown else ():
                assert option in section


@pytest.mark.parametrize(
    ("text", "suffix", "found"),
    [
        ('<script src="https://cdn.example/x.js"></script>', ".html", ["https://cdn.example/x.js"]),
        ('<link rel="stylesheet" href="//fonts.example/c">', ".html", ["//fonts.example/c"]),
        ("@import 'https://fonts.example/c';", ".css", ["https://fonts.example/c"]),
        ('<a href="https://example.org">a link</a><script src="x.js"></script>', ".html", []),
        ("a { background: url(x.svg) }", ".css", []),
    ],
)
def test_what_a_browser_would_load_from_elsewhere_is_found(
    text: str, suffix: str, found: list[str]
) -> None:
    assert load("offline").foreign(text, suffix) == found
