"""A report as one HTML page, and the file it is written to.

The parts are data (parts.py, svg.py), their appearance is in report.html.jinja and report.css.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from llama_onnx.targets.errors import ResourceError, UsageError


def check_report_file(file: Path) -> None:
    """Raise `UsageError` if no report can be written to `file`. Call it before measuring."""
    if not file.parent.is_dir():
        raise UsageError(
            f"{file} cannot be written: {file.parent} is not a folder: create it first."
        )
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UsageError(f"{file} cannot be written: choose another file for the report.")


def write_page(page: str, file: Path) -> None:
    """Write `page` to `file`, which appears complete or not at all; raises `ResourceError`."""
    aside = file.with_name(f"{file.name}.partial")
    try:
        aside.write_text(page, encoding="utf-8")
        aside.replace(file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ResourceError(f"{file} cannot be written: {error.strerror or error}.") from None


def render_page(template: str, **values: Any) -> str:
    """Return `template`, which extends "report", with `values`, each of which is escaped."""
    here = files(__package__)
    base = here.joinpath("report.html.jinja").read_text("utf-8")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=DictLoader({"report": base}),
    )
    css = Markup(here.joinpath("report.css").read_text("utf-8"))
    return environment.from_string(template).render(css=css, **values)
