"""Judge Python and the wheels: flavors, versions, whether they match and load."""

from __future__ import annotations

from collections.abc import Mapping

from llama_onnx.runtime.doctor.facts import Encodings, Loaded, Python, Wheels
from llama_onnx.runtime.doctor.finding import Finding
from llama_onnx.runtime.doctor.requirements import distribution, numbers, unmet
from llama_onnx.runtime.placement.wheels import install_wheels
from llama_onnx.targets.extras import install_command
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU, PROVIDERS


def judge_python(python: Python) -> Finding:
    """Judge whether onnxruntime has wheels for this Python."""
    found = f"{python.version}, {python.bits}-bit, {python.machine}"
    if python.bits == 64:
        return Finding("Python", "ok", found)
    return Finding(
        "Python",
        "trouble",
        f"{found}: onnxruntime has no 32-bit wheels",
        "install a 64-bit Python from https://www.python.org/downloads, and llama-onnx in it",
    )


def judge_onnxruntime(wheels: Wheels, loaded: Loaded) -> Finding:
    """Judge whether there is one flavor, new enough, not overwritten, and whether it loads."""
    name, flavours = "onnxruntime", wheels.onnxruntime
    if not flavours:
        return Finding(name, "trouble", "not installed", install_wheels(CPU))
    trouble = (
        _clash(flavours)
        or _broken(flavours, loaded)
        or _outdated(flavours, wheels.extras.get(wanted(wheels).extra, ()))
    )
    if trouble:
        return Finding(name, "trouble", trouble, _replace(wheels))
    return Finding(name, "ok", listed(flavours))


def judge_genai(wheels: Wheels, loaded: Loaded) -> Finding:
    """Judge the same for onnxruntime-genai, and whether its flavor matches onnxruntime's."""
    name, flavours, provider = "onnxruntime-genai", wheels.genai, wanted(wheels)
    if not flavours:
        found = "not installed: `generate` and `chat` need it"
        if provider.genai_wheel is None:
            return Finding(name, "warning", f"{found}, and there is none for {provider.wheel}")
        return Finding(name, "trouble", found, _replace(wheels))
    trouble = _clash(flavours) or _mismatch(wheels) or _broken(flavours, loaded)
    if trouble:
        return Finding(name, "trouble", trouble, _replace(wheels))
    return Finding(name, "ok", listed(flavours))


def judge_export(wheels: Wheels) -> Finding:
    """Judge whether `export` can run here; running packages does not need that."""
    name, here = "llama-onnx", wheels.llama_onnx or "version unknown: run from its source"
    lacking = unmet(wheels.extras.get("export", ()), wheels.others)
    if not lacking:
        found = f"{here}, with what `export` needs" if wheels.extras else here
        return Finding(name, "ok", found)
    absent = [distribution(text) for text in lacking if distribution(text) not in wheels.others]
    if len(absent) == len(lacking):
        found = f"{here}, to run packages; `export` and `validate` need {', '.join(absent)} too"
        return Finding(name, "ok", found)
    command = install_command(f"export,{wanted(wheels).extra}")
    install = f"run `{command} --upgrade` in a clone of llama-onnx"
    return Finding(name, "warning", f"{here}; `export` needs {', '.join(lacking)}", install)


def judge_telemetry(value: str | None) -> Finding:
    """Judge whether ONNX Runtime sends usage reports; `value` is that of ORT_DISABLE_TELEMETRY."""
    if value is None:
        found = (
            "ORT_DISABLE_TELEMETRY is not set: llama-onnx sets it to 1 for itself, but your own "
            "programs report to Microsoft unless they set it to 1 too"
        )
        return Finding("telemetry", "ok", found)
    state = "on, as you chose" if value == "0" else "off"
    return Finding("telemetry", "ok", f"{state} (ORT_DISABLE_TELEMETRY={value})")


def judge_encodings(encodings: Encodings, platform: str) -> Finding:
    """Judge whether every character can be printed, and used in file names."""
    name = "text encoding"
    places = {"output": encodings.stdout, "files": encodings.files, "names": encodings.names}
    other = {place: found for place, found in places.items() if not _is_utf8(found)}
    if not other:
        return Finding(name, "ok", "UTF-8")
    command = "setx PYTHONUTF8 1" if platform == "win32" else "export PYTHONUTF8=1 LC_ALL=C.UTF-8"
    said = ", ".join(f"{place} in {found}" for place, found in other.items())
    lost = f"{said}: characters that it lacks are printed as ?"
    return Finding(name, "warning", lost, f"run `{command}` and open a new terminal"
                   if platform == "win32" else f"run `{command}`")  # fmt: skip


def wanted(wheels: Wheels) -> Provider:
    """Return the provider that these wheels are for."""
    installed = {*wheels.onnxruntime, *wheels.genai}
    for provider in PROVIDERS.values():
        if provider != CPU and installed & {provider.wheel, provider.genai_wheel}:
            return provider
    return CPU


def listed(flavours: Mapping[str, str]) -> str:
    """Return "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1"."""
    return " and ".join(f"{name} {version}" for name, version in sorted(flavours.items()))


def _clash(flavours: Mapping[str, str]) -> str | None:
    if len(flavours) < 2:
        return None
    return f"{listed(flavours)} are installed at once and overwrite each other's files"


def _broken(flavours: Mapping[str, str], loaded: Loaded) -> str | None:
    if loaded.error:
        return f"{listed(flavours)} does not load: {loaded.error}"
    (version,) = flavours.values()
    if loaded.version and numbers(loaded.version) != numbers(version):
        return (
            f"{listed(flavours)} is installed, but {loaded.version} is loaded: "
            "another wheel or folder hides it"
        )
    return None


def _outdated(flavours: Mapping[str, str], requirements: tuple[str, ...]) -> str | None:
    own = [text for text in requirements if distribution(text) in flavours]
    lacking = unmet(own, flavours)
    return f"{listed(flavours)}, but llama-onnx needs {', '.join(lacking)}" if lacking else None


def _mismatch(wheels: Wheels) -> str | None:
    ((genai, version),) = wheels.genai.items()
    pairs = {provider.genai_wheel: provider.wheel for provider in PROVIDERS.values()}
    partner = pairs.get(genai)
    if wheels.onnxruntime and partner and partner not in wheels.onnxruntime:
        return f"{genai} goes with {partner}, but {listed(wheels.onnxruntime)} is installed"
    own = [text for text in wheels.requires.get(genai, ()) if distribution(text) == partner]
    lacking = unmet(own, wheels.onnxruntime) if wheels.onnxruntime else ()
    if lacking:
        there = listed(wheels.onnxruntime)
        return f"{genai} {version} needs {', '.join(lacking)}, but {there} is installed"
    return None


def _replace(wheels: Wheels) -> str:
    return install_wheels(wanted(wheels), {**wheels.onnxruntime, **wheels.genai})


def _is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("-", "").replace("_", "") in ("utf8", "cp65001", "utf8sig")
