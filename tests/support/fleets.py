"""Lists of fleets, and the sources they name."""

from __future__ import annotations

from pathlib import Path

from tests.support.tiny import write_huggingface

DEFAULTS = 'targets = ["cpu", "webgpu"]\nprecision = "int4"\nquantizer = "rtn"\n'


def write_fleet(folder: Path, models: str, defaults: str = DEFAULTS) -> Path:
    """Write fleet.toml, whose packages go to the folder `made`."""
    file = folder / "fleet.toml"
    file.write_text(f'out = "made"\n\n[defaults]\n{defaults}\n{models}', encoding="utf-8")
    return file


def model(source: str, more: str = "") -> str:
    return f'[[model]]\nsource = "{source}"\n{more}\n'


def broken(folder: Path) -> Path:
    """Write a source whose weights are cut off."""
    write_huggingface(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder
