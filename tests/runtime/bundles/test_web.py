"""Bundles for transformers.js: layout, parts of the weights, settings, what is refused."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from llama_onnx.runtime.bundles.make import Settings, make_bundle
from llama_onnx.runtime.bundles.web import Web
from llama_onnx.runtime.bundles.web_files import Span, cut
from llama_onnx.runtime.placement.profile import step_feeds
from llama_onnx.targets.bundle import Bundle
from llama_onnx.targets.errors import PackageError, ResourceError
from llama_onnx.targets.package import MANIFEST, ModelPackage, write_manifest
from tests.support.packages import alter_package, renew_hashes

MESSAGES = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]
SMALL = 20_000
"""Bytes in a data file: the tiny package needs several."""


def bundle(package: Path, out: Path, limit: int | None = None) -> Path:
    place = Web() if limit is None else Web(limit)
    return make_bundle(ModelPackage.open(package), out, place, Settings(licensed=True)).path


@pytest.fixture(scope="module")
def made(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose weights are cut into many files. Read only."""
    return bundle(package, tmp_path_factory.mktemp("web ä") / "out", SMALL)


def logits(graph: Path) -> list[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(graph), options, ["CPUExecutionProvider"])
    return list(session.run(None, step_feeds(session, 8)))


def read(file: Path) -> Any:
    return json.loads(file.read_text("utf-8"))


def test_the_parts_give_the_same_logits_bit_for_bit(package: Path, made: Path) -> None:
    model = made / "model"
    parts = sorted((model / "onnx").glob("model_q4.onnx_data*"))
    assert len(parts) > 3
    assert max(part.stat().st_size for part in parts) <= SMALL
    assert sum(p.stat().st_size for p in parts) == (package / "model.onnx.data").stat().st_size
    external = read(model / "config.json")["transformers.js_config"]
    assert external == {
        "dtype": "q4",
        "use_external_data_format": {"model_q4.onnx": len(parts)},
    }
    pairs = zip(
        logits(package / "model.onnx"), logits(model / "onnx" / "model_q4.onnx"), strict=True
    )
    for ours, theirs in pairs:
        assert np.array_equal(ours, theirs)


def test_one_file_below_the_limit_is_the_packages_own(package: Path, tmp_path: Path) -> None:
    onnx_folder = bundle(package, tmp_path / "out") / "model" / "onnx"
    names = sorted(path.name for path in onnx_folder.iterdir())
    assert names == ["model_q4.onnx", "model_q4.onnx_data"]
    data = (onnx_folder / "model_q4.onnx_data").read_bytes()
    assert data == (package / "model.onnx.data").read_bytes()
    onnx.checker.check_model(str(onnx_folder / "model_q4.onnx"), check_custom_domain=False)


def test_transformers_reads_the_same_settings(package: Path, made: Path) -> None:
    source, model = package.parent / "checkpoint", made / "model"
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (model, source))
    ignored = {"transformers.js_config", "_name_or_path", "dtype", "transformers_version"}
    ignored |= {"architectures", "pad_token_id"}  # exports choose a pad token
    assert {k: v for k, v in ours.items() if k not in ignored} == {
        k: v for k, v in theirs.items() if k not in ignored
    }
    generation = GenerationConfig.from_pretrained(model)
    assert generation.eos_token_id == theirs["eos_token_id"]
    assert generation.bos_token_id == theirs["bos_token_id"]
    assert generation.do_sample is False


def test_the_chat_template_is_inside_the_tokenizers_settings(package: Path, made: Path) -> None:
    assert not (made / "model" / "chat_template.jinja").exists()
    template = read(made / "model" / "tokenizer_config.json")["chat_template"]
    assert template == (package / "chat_template.jinja").read_text("utf-8")
    ours, theirs = (
        AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES, tokenize=False)
        for folder in (made / "model", package)
    )
    assert ours == theirs
    assert "Hello" in ours
    jinja2.Environment().parse(template)


def test_an_altered_bundle_is_found(made: Path, tmp_path: Path) -> None:
    opened = Bundle.open(made)
    assert opened.verify() == []
    with pytest.raises(
        PackageError, match=r"in transformers\.js's layout, which cannot run: pass --files-only"
    ):
        _ = opened.package
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    part = copy / "model" / "onnx" / "model_q4.onnx_data_1"
    part.write_bytes(b"\0" + part.read_bytes()[1:] if part.read_bytes()[0] else b"\1")
    assert Bundle.open(copy).verify() == ["model/onnx/model_q4.onnx_data_1"]


# ---- what is refused -----------------------------------------------------------------------------


def check_refused(package: Path, out: Path, match: str, limit: int | None = None) -> None:
    with pytest.raises(PackageError, match=match) as refused:
        bundle(package, out, limit)
    assert "\n" not in str(refused.value)
    assert list(out.parent.glob("out*")) == []


def test_another_target_is_refused(package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "copy"))
    write_manifest(copy, read(copy / MANIFEST) | {"target": "cuda"})
    check_refused(copy, tmp_path / "out", "made for cuda, but a bundle for web runs on the CPU")


def test_no_chat_template_is_refused(package: Path, tmp_path: Path) -> None:
    copy = alter_package(package, tmp_path / "copy", chat_template="")
    check_refused(copy, tmp_path / "out", "has no chat template")


def test_a_template_that_is_not_utf8_is_refused(package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    renew_hashes(copy)
    check_refused(copy, tmp_path / "out", r"chat_template\.jinja is not UTF-8 text")


def test_a_cache_in_8_bits_is_refused(package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "copy"))
    manifest = read(copy / MANIFEST)
    write_manifest(copy, manifest | {"recipe": manifest["recipe"] | {"cache": "int8"}})
    check_refused(copy, tmp_path / "out", "stores its cache in 8 bits")


@pytest.mark.parametrize("content", ["{", "[]", "[" * 5000, '{"rope_theta": 1e999}'])
def test_settings_that_are_not_json_are_refused(
    package: Path, tmp_path: Path, content: str
) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "copy"))
    (copy / "config.json").write_text(content)
    renew_hashes(copy)
    check_refused(copy, tmp_path / "out", r"config\.json (is|has)")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_damaged_file_is_refused(package: Path, tmp_path: Path, name: str) -> None:
    opened = ModelPackage.open(shutil.copytree(package, tmp_path / "copy"))
    content = bytearray((opened.path / name).read_bytes())
    content[-1] ^= 1
    (opened.path / name).write_bytes(content)
    with pytest.raises(PackageError, match=f"is damaged: {name} has changed"):
        make_bundle(opened, tmp_path / "out", Web(), Settings(licensed=True))
    assert list(tmp_path.glob("out*")) == []


def test_a_weight_above_the_limit_is_refused(package: Path, tmp_path: Path) -> None:
    check_refused(package, tmp_path / "out", r"files of 1,000 bytes, because .* is larger", 1000)


def test_a_full_disk_leaves_nothing(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        bundle(package, tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []


# ---- cutting -------------------------------------------------------------------------------------


@st.composite
def spans(draw: st.DrawFn) -> tuple[list[Span], int]:
    """Weights one after the other, some with a gap before them, some inside another."""
    found, end = [], 0
    for number in range(draw(st.integers(1, 12))):
        start = end + draw(st.integers(0, 3))
        end = start + draw(st.integers(1, 20))
        found.append(Span(f"w{number}", start, end))
        if draw(st.booleans()):
            inner = draw(st.integers(start, end - 1))
            found.append(Span(f"tied{number}", inner, draw(st.integers(inner + 1, end))))
    return draw(st.permutations(found)), end + draw(st.integers(0, 3))


@given(spans(), st.integers(1, 60))
def test_no_weight_is_cut_and_no_part_is_too_large(
    weights: tuple[list[Span], int], limit: int
) -> None:
    found, size = weights
    try:
        starts = cut(found, size, limit)
    except ValueError:
        # A weight does not fit, with the gap after it and, at the start, the one before it.
        assert max(span.end - span.start for span in found) + 6 > limit
        return
    bounds = [*starts, size]
    assert bounds[0] == 0
    assert bounds == sorted(bounds)
    assert all(0 <= b - a <= limit for a, b in pairwise(bounds))
    for span in found:
        part = max(i for i, start in enumerate(starts) if start <= span.start)
        assert span.end <= bounds[part + 1]


def test_the_documentation_shows_the_sample_for_node(made: Path) -> None:
    """`nox -s web` runs it, and the page beside it."""
    docs = (Path(__file__).parents[3] / "docs" / "web.md").read_text("utf-8")
    assert f"```js\n{(made / 'node.mjs').read_text('utf-8')}```" in docs


def test_only_the_place_of_weights_changes_in_the_graph(package: Path, made: Path) -> None:
    graphs = []
    for file in (package / "model.onnx", made / "model" / "onnx" / "model_q4.onnx"):
        model = onnx.load(file, load_external_data=False)
        for tensor in model.graph.initializer:
            kept = [entry for entry in tensor.external_data if entry.key == "length"]
            del tensor.external_data[:]
            tensor.external_data.extend(kept)
        graphs.append(model.SerializeToString(deterministic=True))
    assert graphs[0] == graphs[1]
