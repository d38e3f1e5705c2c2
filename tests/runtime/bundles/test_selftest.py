"""Self-tests from certificates: the stretch of tokens with the widest lead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.bundles import selftest
from llama_onnx.runtime.bundles.make import certificate_of
from llama_onnx.runtime.bundles.selftest import LENGTH, SelfTest
from llama_onnx.runtime.measure.certificate import Certificate
from llama_onnx.runtime.measure.metrics import TopK
from llama_onnx.runtime.measure.situations import Passage
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import MANIFEST, ModelPackage, write_manifest
from tests.support.packages import greedy, make_package


def certificate(*passages: tuple[list[int], list[int], list[float]], k: int = 2) -> Certificate:
    """A certificate of passages: ids, likeliest next tokens, their leads over the second one."""
    kept = []
    for _, likeliest, leads in passages:
        ids = np.array([likeliest, [token + 1 for token in likeliest]], np.int32).T[:, :k]
        logits = np.array([leads, [0.0] * len(leads)], np.float32).T[:, :k]
        none = np.zeros(len(leads))
        kept.append(TopK(ids, logits, none, none.astype(np.float32)))
    texts = tuple(Passage(np.array(ids), 1) for ids, _, _ in passages)
    return Certificate({}, (None,) * len(kept), texts, tuple(kept), tuple(kept), ())


def test_the_stretch_with_the_widest_lead_is_used() -> None:
    first = list(range(10, 30))
    second = list(range(50, 70))
    made = certificate(
        (first, [*first[1:], 0], [3.0] * 20),
        (second, [*second[1:], 0], [2.0] * 4 + [5.0] * LENGTH + [2.0] * 8),
    )
    test = SelfTest.from_certificate(made)
    assert test == SelfTest(tuple(range(50, 55)), tuple(range(55, 55 + LENGTH)))


def test_a_stretch_with_a_token_that_is_not_the_likeliest_is_not_used() -> None:
    ids = list(range(10, 20))
    likeliest = [*ids[1:], 0]
    likeliest[4] = 99
    assert SelfTest.from_certificate(certificate((ids, likeliest, [9.0] * 10))) is None


@pytest.mark.parametrize(("lead", "found"), [(0.5, False), (1.0, True)])
def test_a_small_lead_is_not_used(lead: float, found: bool) -> None:
    ids = list(range(10, 30))
    test = SelfTest.from_certificate(certificate((ids, [*ids[1:], 0], [lead] * 20)))
    assert (test is not None) is found


def test_a_certificate_without_passages_or_second_tokens_gives_none() -> None:
    ids = list(range(10, 30))
    assert SelfTest.from_certificate(certificate()) is None
    assert SelfTest.from_certificate(certificate((ids, [*ids[1:], 0], [9.0] * 20), k=1)) is None


def test_a_package_without_a_certificate_has_none(package: Path) -> None:
    assert certificate_of(ModelPackage.open(package)) is None


def test_a_certificate_of_our_own_gives_the_tokens_of_genai(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(tmp_path, "fp32")
    source = open_checkpoint(tmp_path / "checkpoint")
    prove(package, source, tokens=LENGTH + 4, longest=16, certify=True)
    made = certificate_of(ModelPackage.open(package))
    assert made
    # Random weights never prefer one token by a wide margin.
    monkeypatch.setattr(selftest, "LEAST_LEAD", 0.0)
    test = SelfTest.from_certificate(made)
    assert test and len(test.expected) == LENGTH
    assert greedy(package, test.prompt, LENGTH) == list(test.expected)
    for content in (b"", b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 40):
        check_damaged(package, tmp_path / "damaged", content)


def check_damaged(package: Path, copy: Path, content: bytes) -> None:
    """A package whose reference.safetensors is `content` is refused in one sentence."""
    shutil.copytree(package, copy)
    (copy / "parity" / "reference.safetensors").write_bytes(content)
    manifest = json.loads((copy / MANIFEST).read_text("utf-8"))
    with pytest.raises(PackageError, match=r"reference\.safetensors is .*\.$"):
        certificate_of(write_manifest(copy, manifest))
    shutil.rmtree(copy)
