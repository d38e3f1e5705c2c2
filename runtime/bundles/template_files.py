"""The files in templates/, from which bundles are made.

They run elsewhere, so here they are data: Python files are stored as NAME.py.template, so that no
tool or import mistakes them for modules of this project.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from string import Template

TEMPLATES = Path(__file__).parent / "templates"


def template_path(place: str, name: str) -> Path:
    """Return the path of the template of `place` for the file `name`."""
    return TEMPLATES / place / (f"{name}.template" if name.endswith(".py") else name)


def read_template(place: str, name: str) -> Template:
    """Read the template of `place` for the file `name`."""
    return Template(template_path(place, name).read_text("utf-8"))


def fill_template(place: str, name: str, folder: Path, values: Mapping[str, str]) -> None:
    """Write `folder`/`name` from its template, with each $key replaced by its value."""
    write_text(folder / name, read_template(place, name).substitute(values))


def copy_template(place: str, name: str, folder: Path) -> None:
    """Copy a template that has nothing to replace to `folder`/`name`."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(template_path(place, name), folder / name)


def write_text(file: Path, text: str) -> None:
    """Write `text` as UTF-8; lines end with LF, on Windows too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())
