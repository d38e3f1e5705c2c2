"""Self-tests out of certificates: the stretch that leads by most, read without numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.bundles import selftest
from llama_onnx.runtime.bundles.selftest import LENGTH, SelfTest
from llama_onnx.targets.errors import PackageError
from tests.support.packages import greedy, make_package


def write_reference(folder: Path, passages: list[tuple[list[int], list[int], list[float]]]) -> Path:
    """A certificate's arrays, as far as they matter: ids, likeliest next tokens, their leads."""
    arrays: dict[str, np.ndarray] = {}
    for index, (ids, likeliest, leads) in enumerate(passages):
        arrays[f"{index}.ids"] = np.array(ids, np.int32)
        second = [token + 1 for token in likeliest]
        arrays[f"{index}.package.ids"] = np.array([likeliest, second], np.int32).T.copy()
        logits = np.array([leads, [0.0] * len(leads)], np.float32).T
        arrays[f"{index}.package.logits"] = logits.copy()
    (folder / "parity").mkdir(exist_ok=True)
    save_file(arrays, folder / "parity" / "reference.safetensors")
    return folder


def test_the_stretch_that_leads_by_most_is_taken(tmp_path: Path) -> None:
    first = list(range(10, 30))
    second = list(range(50, 70))
    write_reference(
        tmp_path,
        [
            (first, [*first[1:], 0], [3.0] * 20),
            (second, [*second[1:], 0], [2.0] * 4 + [5.0] * LENGTH + [2.0] * 8),
        ],
    )
    test = SelfTest.from_certificate(tmp_path)
    assert test == SelfTest(tuple(range(50, 55)), tuple(range(55, 55 + LENGTH)))


def test_a_stretch_with_another_token_than_the_likeliest_is_none(tmp_path: Path) -> None:
    ids = list(range(10, 20))
    likeliest = [*ids[1:], 0]
    likeliest[4] = 99
    write_reference(tmp_path, [(ids, likeliest, [9.0] * 10)])
    assert SelfTest.from_certificate(tmp_path) is None


def test_a_lead_that_is_small_is_none(tmp_path: Path) -> None:
    ids = list(range(10, 30))
    write_reference(tmp_path, [(ids, [*ids[1:], 0], [0.5] * 20)])
    assert SelfTest.from_certificate(tmp_path) is None


def test_a_package_without_certificate_has_none(tmp_path: Path) -> None:
    assert SelfTest.from_certificate(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 40, b"\x02" * 9])
def test_a_damaged_certificate_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "parity").mkdir()
    (tmp_path / "parity" / "reference.safetensors").write_bytes(content)
    with pytest.raises(PackageError, match=r"reference\.safetensors is damaged: "):
        SelfTest.from_certificate(tmp_path)


def test_a_certificate_of_our_own_gives_the_tokens_of_genai(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(tmp_path, "fp32")
    source = open_checkpoint(tmp_path / "checkpoint")
    prove(package, source, tokens=LENGTH + 4, longest=16, certify=True)
    # Random weights are never sure of anything.
    monkeypatch.setattr(selftest, "LEAST_LEAD", 0.0)
    test = SelfTest.from_certificate(package)
    assert test and len(test.expected) == LENGTH
    assert greedy(package, test.prompt, LENGTH) == list(test.expected)
