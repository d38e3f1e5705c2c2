"""DirectML's own kernels, on Vulkan in software: what our packages compute on them.

python -m benchmarks.trials.directml.run WORK_FOLDER [--tiny] [--remove]

Makes a root with Wine (once; --remove removes it), a Windows Python with onnxruntime-directml and
onnxruntime-genai-winml, and packages for directml. Prints its tables and writes them to
docs/targets.md, and what is wrong in ONNX Runtime to docs/findings; exits with status 1 if a case
fails. Which provider ran is asked in each case.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.trials.directml.c_library import library_cases
from benchmarks.trials.directml.findings import finding_cases
from benchmarks.trials.directml.operators import operator_cases
from benchmarks.trials.directml.our_commands import command_cases
from benchmarks.trials.directml.place import HERE, make_place
from benchmarks.trials.directml.root import Root
from benchmarks.trials.directml.tokens import conversation_cases, token_cases
from llama_onnx.runtime.bundles.wheel_libraries import download_wheels
from tests.support.tables import show

DOCS = HERE.parents[2] / "docs"


def processor() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "an unknown processor"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tiny", action="store_true", help="without SmolLM2-135M")
    parser.add_argument("--remove", action="store_true", help="remove the root and end")
    arguments = parser.parse_args()
    work: Path = arguments.work.absolute()
    if arguments.remove:
        shutil.rmtree(work, ignore_errors=True)
        return
    root = Root.make(work / "root", work / "work")
    wheels = download_wheels(root.work / "wheels")
    place = make_place(root, tiny=arguments.tiny)
    tables = [
        ("llama-onnx on DirectML | what happened", list(command_cases(place))),
        ("package | capture | tokens equal to the CPU's", list(token_cases(place))),
        ("three turns | how | tokens equal to the CPU's", list(conversation_cases(place))),
        ("llama_onnx.dll | what happened", list(library_cases(place, wheels))),
        ("single operators | DirectML", list(operator_cases(place))),
        ("docs/findings | its reproduce.py", list(finding_cases(place, DOCS / "findings"))),
    ]
    private = [root.windows_path(root.work).rstrip("\\")]
    holds = show(DOCS / "targets.md", "directml", tables, private)
    print(f"on {processor()}, {subprocess.getoutput('nproc')} processors")
    if not holds:
        sys.exit("a case failed.")


if __name__ == "__main__":
    main()
