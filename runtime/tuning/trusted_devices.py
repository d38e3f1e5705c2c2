"""Which of this machine's devices to trust with a package: one on which its certificate held.

`CACHE/devices/PACKAGE/DEVICE.json` remembers the outcome; PACKAGE is the manifest's hash, DEVICE
that of the device, all display drivers and onnxruntime's version, so that an update of any of them
tests again. The record says that the test did not end until it has ended: a driver that crashes
this process is not tried twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llama_onnx.runtime import ort
from llama_onnx.runtime.doctor.gather import gather_graphics
from llama_onnx.runtime.measure.verify import verify
from llama_onnx.runtime.placement.windows_ml import Device, provider_on, rank
from llama_onnx.runtime.tuning.cache_folder import (
    UntrustedError,
    cache_folder,
    check_private,
    make_private,
)
from llama_onnx.targets.durable import replacing
from llama_onnx.targets.errors import PackageError, ProviderError
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.strict_json import JSONError, parse_json

FORMAT_VERSION = 1
NOT_ENDED = "the test of an earlier run did not end"
_MOST_BYTES = 1 << 20

Test = Callable[[ModelPackage, Device], str | None]
"""Returns why a device does not compute what a package's certificate says; None: it does."""


@dataclass(frozen=True)
class Choice:
    """The device to use, None if none passed, and the reasons against those before it."""

    device: Device | None
    refused: tuple[tuple[Device, str], ...] = ()


def choose_device(
    package: ModelPackage,
    devices: Sequence[Device],
    *,
    drivers: Sequence[str] | None = None,
    test: Test | None = None,
    again: bool = False,
) -> Choice:
    """Return the best device for `package` on which its certificate holds.

    A device is tested once, which takes as long as `verify` does; later calls remember. `again`
    tests as if nothing were remembered. `drivers` are those of the display adapters, by default
    this machine's; `test` replaces `replay`.

    Raises `PackageError` for a package without a certificate, and for one that is damaged.
    """
    graphics = gather_graphics() if drivers is None else None
    known = (*graphics.adapters, graphics.driver or "") if graphics else tuple(drivers or ())
    refused: list[tuple[Device, str]] = []
    for device in rank(package.target, devices):
        record = _record(package, device, known)
        found = None if again else _remembered(record)
        if found is None:
            found = _tested(package, device, record, test or replay)
        problem = found[0]
        if problem is None:
            return Choice(device, tuple(refused))
        refused.append((device, problem))
    return Choice(None, tuple(refused))


def replay(package: ModelPackage, device: Device) -> str | None:
    """Replay the package's certificate on `device`; return what is wrong there, None if nothing.

    Raises `PackageError` for a package without a certificate, and for one that is damaged.
    """
    try:
        report = verify(package.path, provider_on(device))
    except ProviderError as error:
        return str(error)
    if not report.intact:
        raise PackageError(
            f"{package.path} is damaged: `llama-onnx verify {package.path}` says what changed."
        )
    return None if report.passed else "it does not compute what the certificate says"


def _record(package: ModelPackage, device: Device, drivers: Sequence[str]) -> Path | None:
    """Return where to remember the outcome; None if there is no folder for caches."""
    root = cache_folder()
    if root is None:
        return None
    facts = {"device": asdict(device), "drivers": list(drivers), "onnxruntime": ort.version()}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return root / "devices" / hash_file(package.index)[:16] / f"{key}.json"


def _remembered(record: Path | None) -> tuple[str | None] | None:
    """Return the outcome of an earlier test; None without one that can be believed."""
    root = cache_folder()
    if record is None or root is None:
        return None
    try:
        check_private(root, record)
        content = parse_json(record.read_bytes(), max_bytes=_MOST_BYTES)
        problem = content["problem"]
        version = content["format_version"]
    except (OSError, UntrustedError, JSONError, KeyError, TypeError):
        return None
    if version != FORMAT_VERSION or not (problem is None or isinstance(problem, str)):
        return None
    return (problem,)


def _tested(
    package: ModelPackage, device: Device, record: Path | None, test: Test
) -> tuple[str | None]:
    """Test `device`, and remember the outcome; what `test` raises is not an outcome."""
    _remember(record, device, NOT_ENDED)
    try:
        problem = test(package, device)
    except BaseException:
        if record is not None:
            record.unlink(missing_ok=True)
        raise
    _remember(record, device, problem)
    return (problem,)


def _remember(record: Path | None, device: Device, problem: str | None) -> None:
    root = cache_folder()
    if record is None or root is None:
        return
    make_private(root, record.parent)
    content = {"format_version": FORMAT_VERSION, "device": str(device), "problem": problem}
    with replacing(record) as file:
        file.write(json.dumps(content, indent=2).encode())
