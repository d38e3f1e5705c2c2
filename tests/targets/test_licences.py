"""One rule for which files travel with a model, and for what is a Llama."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from llama_onnx.targets.licences import (
    TERMS,
    file_patterns,
    kind_of,
    llama_generation,
    of_kind,
    required_kinds,
)

NAMES = {
    "LICENSE": "license",
    "LICENSE.txt": "license",
    "licence.md": "license",
    "LICENSE-2.txt": "license",
    "USE_POLICY.md": "use policy",
    "Use_Policy": "use policy",
    "NOTICE": "notice",
    "Notice.txt": "notice",
    "README.md": "model card",
    "tokenizer.json": None,
    "MY_LICENSE": None,
    "parity/LICENSE": None,
    "README.md.orig": None,
}


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_a_file_s_name_says_what_it_is(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_the_patterns_select_what_the_rule_knows(name: str, kind: str | None) -> None:
    selected = any(fnmatchcase(name, pattern) for pattern in file_patterns())
    assert selected is (kind is not None)


@pytest.mark.parametrize(
    ("name", "generation"),
    [
        ("openlm-research/open_llama_3b", None),  # 3 billion weights, Apache 2.0
        ("open-llama-3b-v2", None),
        ("meta-llama/Llama-3.2-3B", 3),
        ("NousResearch/Llama-2-7b-hf", 2),
    ],
)
def test_a_name_tells_metas_llamas_from_others(name: str, generation: int | None) -> None:
    assert llama_generation(name, []) == generation


def test_a_model_card_says_nothing_about_terms() -> None:
    assert of_kind(["README.md", "NOTICE", "config.json", "LICENSE"], *TERMS) == [
        "NOTICE",
        "LICENSE",
    ]


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("LICENSE.txt", "LLAMA 2 COMMUNITY LICENSE AGREEMENT\n", 2),
        ("LICENSE", "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n", 3),
        ("NOTICE", "Llama 2 is licensed under the LLAMA 2 Community License", 2),
        ("LICENSE", "Apache License\nVersion 2.0, January 2004", None),
        ("LICENSE", "x" * 5000 + "LLAMA 2 COMMUNITY LICENSE", None),
        ("README.md", "a model that is better than Llama 2", None),
    ],
)
def test_a_license_tells_a_llama_that_is_called_otherwise(
    tmp_path: Path, file: str, text: str, expected: int | None
) -> None:
    (tmp_path / file).write_text(text, encoding="utf-8")
    assert llama_generation("mine", [tmp_path / file]) == expected


def test_the_name_comes_before_the_license(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("LLAMA 2 COMMUNITY LICENSE", encoding="utf-8")
    assert llama_generation("Llama-3.2-1B", [tmp_path / "LICENSE"]) == 3


def test_only_a_llama_needs_a_use_policy() -> None:
    assert required_kinds(None) == ("license",)
    assert required_kinds(2) == ("license", "use policy")
