"""Plant every fault of tests/support/faults.py in tiny packages of every precision; print which
check finds it and what bisect names. Then validate sound packages of every kind, all of which must
pass.

    python benchmarks/faults.py [--write docs/faults.md]

prints the tables, or writes them between the markers of a file. Exit status 1 if a fault is not
found, if bisect names something else, or if a sound package is refused.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from llama_onnx.exporter.parity.bisect.search import Finding, bisect
from llama_onnx.exporter.parity.measure.open_subject import open_subject
from llama_onnx.exporter.parity.measure.report import ParityReport
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import ModelPackage
from tests.support.faults import FAULTS, Fault
from tests.support.parity import EXPORTS, Make, figures, maker, report_on

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


@dataclass(frozen=True)
class Outcome:
    """What happened to a fault in one precision; `figure` is the worst that `found_by` measured."""

    precision: str
    found_by: str
    figure: str
    named: str
    ok: bool


def try_fault(fault: Fault, precision: str, make: Make, folder: Path) -> Outcome:
    sound, source = make(precision)
    package = Path(shutil.copytree(sound, folder / "package"))
    try:
        fault.plant(package)
        altered = integrity(package)
        report = report_on(package, source, tokens=6, longest=20)
        subject = open_subject(package, open_checkpoint(source))
        finding = bisect(subject, report, folder / "bisect").finding
    except PackageError as error:
        reason = str(error).rpartition("Status Message: ")[2].replace(f"{package}/", "")
        return Outcome(precision, "refused", reason, "", fault.found_by == ("refused",))
    finally:
        shutil.rmtree(package)
        shutil.rmtree(folder / "bisect", ignore_errors=True)
    found = measures(report) | ({"integrity": ""} if altered else {})
    found_by = [name for name in fault.found_by if name in found]
    named = name_of(finding) if fault.layer and finding else ""
    ok = found_by == list(fault.found_by) and (not fault.layer or is_right(fault, finding))
    return Outcome(precision, " and ".join(found_by), found[fault.found_by[0]], named, ok)


def integrity(package: Path) -> bool:
    """Return whether a file differs from the manifest."""
    try:
        return bool(ModelPackage.open(package).verify())
    except PackageError:
        return True


def measures(report: ParityReport) -> dict[str, str]:
    """Return, for each missed measure, the metric that exceeds its limit most."""
    found: dict[str, tuple[float, str]] = {}
    for check in report.checks:
        if not check.passed:
            row = check.threshold
            beyond = check.value / row.limit if row.limit else math.inf
            text = f"{row.metric} {check.value:.2g}"
            found[row.measure] = max(found.get(row.measure, (0.0, "")), (beyond, text))
    texts = {measure: text for measure, (_, text) in found.items()}
    wrong_tokens = report.tokenizer is not None and not report.tokenizer.passed
    return texts | ({"tokenizer": "other ids"} if wrong_tokens else {})


def is_right(fault: Fault, finding: Finding | None) -> bool:
    if finding is None or finding.layer != fault.layer:
        return False
    return any(fault.op in node for node in (finding.op, *finding.others))


def name_of(finding: Finding) -> str:
    """Return layer, module and operator, and which part if not all of it is wrong."""
    # Figures of a tensor mean little for another model.
    places = (w for w in finding.where if not w.startswith("[") and not w.endswith(" weights"))
    where = "; ".join(places)
    text = f"{finding.layer}, {finding.module}: {finding.op_type}"
    if finding.others:
        text += f" (or {', '.join(node.rpartition('/')[2] for node in finding.others)})"
    return f"{text}; {where}" if where else text


def fault_table(make: Make, folder: Path, wrong: list[str]) -> Iterator[str]:
    yield "| fault | in | found by | figure | bisect names |"
    yield "| --- | --- | --- | --- | --- |"
    for fault in FAULTS:
        outcomes = [try_fault(fault, p, make, folder) for p in fault.precisions]
        wrong += [f"{fault.name}, {o.precision}" for o in outcomes if not o.ok]
        cells = (
            fault.name,
            ", ".join(fault.precisions),
            _merged([o.found_by for o in outcomes]),
            _merged([o.figure for o in outcomes]),
            _merged([o.named for o in outcomes]),
        )
        yield "| " + " | ".join(cells) + " |"
        print(f"{fault.name}: {', '.join('ok' if o.ok else 'WRONG' for o in outcomes)}",
              file=sys.stderr)  # fmt: skip


def _merged(texts: list[str]) -> str:
    """Return one text if all are the same, otherwise one per line."""
    return "<br>".join(dict.fromkeys(text or "-" for text in texts))


def sound_table(make: Make, wrong: list[str]) -> Iterator[str]:
    yield "| sound package | verdict | worst graph relative L2 | farthest weight, steps |"
    yield "| --- | --- | --- | --- |"
    for name in EXPORTS:
        package, source = make(name)
        report = report_on(package, source)
        wrong += [] if report.passed else [f"{name} is refused"]
        rows = figures(report).items()
        worst = max(row["relative_l2"] for key, row in rows if key.startswith("graph "))
        verdict = "passed" if report.passed else "REFUSED"
        yield f"| {name} | {verdict} | {worst:.1e} | {report.weights.steps:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="replace the tables in this file")
    target: Path | None = parser.parse_args().write
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        make = maker(Path(temporary, "made"))
        faults = list(fault_table(make, Path(temporary), wrong))
        sound = list(sound_table(make, wrong))
    text = "\n".join([*faults, "", *sound])
    if target:
        before, _, rest = target.read_text("utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        target.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")
    else:
        print(text)
    if wrong:
        raise SystemExit("wrong: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
