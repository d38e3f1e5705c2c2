"""Our commands on DirectML: each that takes a provider, on the tiny packages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.trials.directml.place import DEVICE, DIRECTML, LOST, PRECISIONS, Place
from tests.support.tables import Case

NEW_TOKENS = 32
PROMPT = "the quick brown"


def command_cases(place: Place) -> Iterator[Case]:
    """Each command that takes a provider, on the tiny packages."""
    found = {entry["name"]: entry for entry in place.ours("doctor").get("findings", ())}
    probe = found.get("provider directml", {"status": "missing", "found": "no such finding"})
    yield Case("`doctor`", probe["status"] == "ok", probe["found"])
    for name in PRECISIONS:
        package = place.root.windows_path(place.packages[name])
        options = ("--provider", "directml")
        yield _inspected(name, place.ours("inspect", package, *options))
        yield _verified(name, place.ours("verify", package, *options))
        counted = ("--max-new-tokens", str(NEW_TOKENS))
        yield _generated(name, place, package, counted)
    yield _lost(place, ("--max-new-tokens", "8"))


def _inspected(name: str, report: Mapping[str, Any]) -> Case:
    what = f"`inspect --provider directml`, {name}"
    if "placement" not in report:
        return Case(what, False, report.get("error", str(report)[:200]))
    nodes = {p["provider"]: p["nodes"] for p in report["placement"]["providers"]}
    small = [entry["op"] for entry in report["placement"].get("elsewhere", ())]
    elsewhere = sum(nodes.values()) - nodes.get(DIRECTML, 0)
    said = f"{nodes.get(DIRECTML, 0)} of {sum(nodes.values())} nodes on DirectML"
    said += f"; the others work out one length ({', '.join(sorted(set(small)))})" if small else ""
    return Case(what, nodes.get(DIRECTML, 0) > 0 and elsewhere <= 2, said)


def _verified(name: str, report: Mapping[str, Any]) -> Case:
    what = f"`verify --provider directml`, {name}"
    if "passed" not in report or not report["placement"]:
        return Case(what, False, report.get("error", str(report)[:200]))
    share = next(p for p in report["placement"]["providers"] if p["provider"] == DIRECTML)
    worst = max(s["shipped"]["max_abs"] for s in report["situations"])
    alike = sum(entry is None for entry in report["divergences"])
    said = (
        f"passed: {share['fraction']['macs_per_token']:.0%} of the work on DirectML; logits "
        f"differ from PyTorch's by {worst:.2g} at most; {alike} of {len(report['divergences'])} "
        "continuations match"
    )
    return Case(what, report["passed"] is True and share["fraction"]["macs_per_token"] == 1, said)


def _generated(name: str, place: Place, package: str, options: Sequence[str]) -> Case:
    what = f"`generate --provider directml`, {name}"
    texts, devices = [], []
    for provider in ("directml", "cpu"):
        answer = place.ours("generate", package, PROMPT, "--provider", provider, *options)
        if "text" not in answer:
            return Case(what, False, answer.get("error", str(answer)[:200]))
        texts.append(answer["text"])
        devices.append(answer["provider"]["device"])
    same = "the CPU's text" if texts[0] == texts[1] else "another text than the CPU's (next table)"
    return Case(what, devices[0] == DEVICE and bool(texts[0]), f"ran on {devices[0]}; {same}")


def _lost(place: Place, options: Sequence[str]) -> Case:
    """The device is lost, a planted fault: the command says so and ends as after any error."""
    package = place.root.windows_path(place.packages["int4"])
    arguments = ("generate", package, PROMPT, "--provider", "directml", *options)
    printed = place.run("-m", "llama_onnx.exporter.cli", *arguments, fault=LOST)
    _, found, rest = " ".join(printed.split()).partition("the graphics device was lost")
    said = (found + rest).partition(" X connection")[0] if found else printed[-200:]
    return Case("`generate`, the device is lost", bool(found), said)
