"""Meta's download: every way its shards are cut gives the package that the same weights give."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
import pytest
import sentencepiece
import torch
import transformers
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_onnx.exporter.checkpoints.meta import MetaCheckpoint
from llama_onnx.exporter.checkpoints.meta_params import config_from_params
from llama_onnx.exporter.cli import main
from llama_onnx.exporter.model.checkpoint import check_tensors
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.exporter.tokenizer.model_file import ModelFileFacts
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.progress import Silent
from tests.support import gguf_files, tiny
from tests.support.meta_files import CONFIG, Tensors, whole, write_checklist, write_meta
from tests.support.vocabularies import model_named, proto, spm_metadata

WEIGHTS = tiny.weights(CONFIG)
FP32 = Options(precision="fp32")

# As Llama-2-7b-chat-hf publishes it in tokenizer_config.json.
PUBLISHED_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    return model_named("plain")


@pytest.fixture
def write(tokenizer: bytes) -> Any:
    return partial(write_meta, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def folders(tokenizer: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    parent = tmp_path_factory.mktemp("ä 日本")
    return {n: write_meta(parent / f"{n} of them", tokenizer, shards=n) for n in (1, 2, 8)}


@pytest.fixture(scope="module")
def opened(folders: dict[int, Path]) -> dict[int, MetaCheckpoint]:
    return {shards: MetaCheckpoint.open(folder) for shards, folder in folders.items()}


@pytest.fixture(scope="module")
def package(folders: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(folders[2], tmp_path_factory.mktemp("meta") / "out")


def export(source: Path, out: Path, **flags: Any) -> Path:
    return export_package(source, out, TARGET, FP32, **flags).package


# --- weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_every_tensor_equals_the_original(folders: dict[int, Path], shards: int) -> None:
    checkpoint = open_checkpoint(folders[shards])
    check_tensors(checkpoint)
    assert checkpoint.format == "meta"
    assert checkpoint.config == CONFIG
    for name, weight in WEIGHTS.items():
        tensor = checkpoint.tensor(name)
        assert np.array_equal(tensor.rows(0, tensor.shape[0]), weight), name
        assert tensor.dtype == "F32"
        assert tensor.nbytes == weight.nbytes


@given(data=st.data())
@settings(deadline=None)
def test_any_range_of_rows(opened: dict[int, MetaCheckpoint], data: st.DataObject) -> None:
    checkpoint = opened[data.draw(st.sampled_from([1, 8]))]
    name = data.draw(st.sampled_from(sorted(checkpoint.names())))
    tensor = checkpoint.tensor(name)
    start = data.draw(st.integers(0, tensor.shape[0] - 1))
    stop = data.draw(st.integers(start, tensor.shape[0]))
    rows = tensor.rows(start, stop)
    assert rows.dtype == np.float32
    assert rows.shape == (stop - start, *tensor.shape[1:])
    assert np.array_equal(rows, WEIGHTS[name][start:stop])


@pytest.mark.parametrize(
    ("dtype", "code"), [(torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float64, "F64")]
)
def test_other_dtypes(tmp_path: Path, write: Any, dtype: torch.dtype, code: str) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m", shards=2, dtype=dtype))
    for name, weight in WEIGHTS.items():
        tensor = checkpoint.tensor(name)
        expected = torch.from_numpy(weight).to(dtype).float().numpy()
        assert np.array_equal(tensor.rows(0, tensor.shape[0]), expected)
        assert tensor.dtype == code


def test_memory_stays_that_of_the_rows(tmp_path: Path, write: Any) -> None:
    config = replace(CONFIG, intermediate_size=1 << 15, num_hidden_layers=1)
    params = {"multiple_of": 1 << 15, "n_layers": 1}
    checkpoint = open_checkpoint(write(tmp_path / "m", config=config, params=params, shards=2))
    total = sum(checkpoint.tensor(name).nbytes for name in checkpoint.names())
    assert total > 96 << 20
    process = psutil.Process()
    before = peak = process.memory_info().rss
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        for start in range(0, tensor.shape[0], 2048):
            tensor.rows(start, min(start + 2048, tensor.shape[0]))
            peak = max(peak, process.memory_info().rss)
    # Half: what numpy and its neighbours in this process give back to the system is up to them.
    assert peak - before < total // 2


# --- the package ----------------------------------------------------------------------------


def test_all_formats_of_the_same_weights_give_the_same_bytes(
    folders: dict[int, Path], package: Path, tmp_path: Path
) -> None:
    tokens = spm_metadata(model_named("plain"))
    others = {
        "one": folders[1],
        "eight": folders[8],
        "hf": tiny.write_huggingface(tmp_path / "source", CONFIG),
        "gguf": gguf_files.write(tmp_path / "m.gguf", CONFIG, keys=tokens),
    }
    for label, source in others.items():
        out = export(source, tmp_path / label)
        for name in ("model.onnx", "model.onnx.data", "config.json", "genai_config.json"):
            assert (out / name).read_bytes() == (package / name).read_bytes(), (label, name)


def test_logits_are_those_of_metas_own_equations(package: Path) -> None:
    ids = np.random.default_rng(0).integers(3, CONFIG.vocab_size, 40)
    session = ort.InferenceSession(package / "model.onnx", providers=["CPUExecutionProvider"])
    empty = np.zeros((1, CONFIG.num_key_value_heads, 0, CONFIG.head_dim), np.float32)
    past = {i.name: empty for i in session.get_inputs() if i.name.startswith("past_key_values")}
    feed = {"input_ids": ids[None], "attention_mask": np.ones((1, 40), np.int64), **past}
    found = session.run(["logits"], feed)[0][0]
    expected = metas_forward(whole(), torch.from_numpy(ids)).numpy()
    assert expected.std() > 0.1
    assert np.abs(found - expected).max() <= 1e-3


def metas_forward(weights: Tensors, tokens: torch.Tensor) -> torch.Tensor:
    """Llama as Meta's model.py computes it: neighbours of a head are one complex number."""
    heads, kv_heads, size = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim
    count = len(tokens)
    frequencies = 1.0 / CONFIG.rope_theta ** (torch.arange(0, size, 2).float() / size)
    angles = torch.outer(torch.arange(count).float(), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # [S, 1, D/2]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + CONFIG.rms_norm_eps)
        return x * scale * weights[f"{name}.weight"]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2)

    mask = torch.full((count, count), -torch.inf).triu(1)
    h = weights["tok_embeddings.weight"][tokens]
    for layer in range(CONFIG.num_hidden_layers):
        own = f"layers.{layer}."
        x = norm(h, f"{own}attention_norm")
        q, k, v = (x @ weights[f"{own}attention.{n}.weight"].T for n in ("wq", "wk", "wv"))
        q = rotated(q.view(count, heads, size)).transpose(0, 1)
        k = rotated(k.view(count, kv_heads, size)).repeat_interleave(heads // kv_heads, 1)
        v = v.view(count, kv_heads, size).repeat_interleave(heads // kv_heads, 1)
        scores = q @ k.transpose(0, 1).transpose(1, 2) / size**0.5 + mask
        context = (scores.softmax(-1) @ v.transpose(0, 1)).transpose(0, 1).flatten(1)
        h = h + context @ weights[f"{own}attention.wo.weight"].T
        x = norm(h, f"{own}ffn_norm")
        gate, up = (x @ weights[f"{own}feed_forward.{n}.weight"].T for n in ("w1", "w3"))
        h = h + (torch.nn.functional.silu(gate) * up) @ weights[f"{own}feed_forward.w2.weight"].T
    return norm(h, "norm") @ weights["output.weight"].T


# --- params.json ----------------------------------------------------------------------------


GROUPED = {"n_kv_heads": 8, "ffn_dim_multiplier": 1.3, "multiple_of": 4096}
CODE = {"rope_theta": 1000000, "ffn_dim_multiplier": 1.0}


@pytest.mark.parametrize(
    ("folder", "numbers", "more", "feed_forward", "context"),
    [
        ("7B", (4096, 32, 32, 1e-6), {}, 11008, 2048),
        ("13B", (5120, 40, 40, 1e-6), {}, 13824, 2048),
        ("30B", (6656, 60, 52, 1e-6), {}, 17920, 2048),
        ("65B", (8192, 80, 64, 1e-5), {}, 22016, 2048),
        ("llama-2-7b-chat", (4096, 32, 32, 1e-6), {}, 11008, 4096),  # Llama 1's norm_eps indeed
        ("llama-2-13b", (5120, 40, 40, 1e-5), {}, 13824, 4096),
        ("llama-2-70b", (8192, 80, 64, 1e-5), GROUPED, 28672, 4096),
        ("renamed", (8192, 80, 64, 1e-5), GROUPED, 28672, 4096),
        ("CodeLlama-7b", (4096, 32, 32, 1e-5), CODE, 11008, 16384),
        ("CodeLlama-34b", (8192, 48, 64, 1e-5), CODE | {"n_kv_heads": 8}, 22016, 16384),
    ],
)
def test_the_models_that_meta_published(
    folder: str, numbers: tuple[Any, ...], more: dict[str, Any], feed_forward: int, context: int
) -> None:
    dim, layers, heads, eps = numbers
    raw = {"dim": dim, "n_layers": layers, "n_heads": heads, "norm_eps": eps, "multiple_of": 256}
    vocabulary = 32016 if folder == "CodeLlama-7b" else 32000
    shapes = {
        "model.embed_tokens.weight": (vocabulary, dim),
        "model.layers.0.mlp.gate_proj.weight": (feed_forward, dim),
        f"model.layers.{layers - 1}.mlp.gate_proj.weight": (feed_forward, dim),
    }
    facts = ModelFileFacts(vocabulary, 1, 2)
    config = config_from_params({**raw, "vocab_size": -1, **more}, "p", folder, shapes, facts)
    assert (config.intermediate_size, config.max_position_embeddings) == (feed_forward, context)
    assert (config.vocab_size, config.head_dim) == (vocabulary, 128)
    assert config.num_key_value_heads == more.get("n_kv_heads", heads)


@pytest.mark.parametrize(
    ("folder", "params", "expected"),
    [
        ("7B", {"norm_eps": 1e-6}, 2048),
        ("llama-2-7b", {}, 4096),
        ("Meta Llama 2", {}, 4096),
        ("CodeLlama-7b", {"rope_theta": 1000000}, 16384),
    ],
)
def test_the_context_length(
    tmp_path: Path, write: Any, folder: str, params: dict[str, Any], expected: int
) -> None:
    config = open_checkpoint(write(tmp_path / folder, params=params)).config
    assert config.max_position_embeddings == expected
    assert config.rope_theta == params.get("rope_theta", 10000.0)
    assert config.rms_norm_eps == params.get("norm_eps", 1e-5)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"dim": 512}, "dim gives 512, but the tensors have 256"),
        ({"n_layers": 1}, "n_layers gives 1, but the tensors have 2"),
        ({"n_layers": 3}, "n_layers gives 3, but the tensors have 2"),
        ({"n_heads": 8}, "dim / n_heads gives 32, but the tensors have 16"),
        ({"n_heads": 12}, "dim 256 is not a multiple of n_heads 12"),
        ({"vocab_size": 32000}, "vocab_size gives 32000, but the tensors have 520"),
        ({"multiple_of": 512}, "multiple_of gives 1024, but the tensors have 768"),
        ({"ffn_dim_multiplier": 1.3}, "multiple_of gives 896, but the tensors have 768"),
        ({"n_kv_heads": 16}, r"k_proj.weight has shape \[128, 256\], but the config requires"),
        ({"n_kv_heads": None}, r"k_proj.weight has shape \[128, 256\], but the config requires"),
        ({"norm_eps": None}, "lacks the key 'norm_eps'"),
        ({"n_heads": "many"}, "n_heads must be a positive integer, not 'many'"),
        ({"use_scaled_rope": True}, "use_scaled_rope is set, which is not supported"),
    ],
)
def test_params_that_contradict_the_tensors(
    tmp_path: Path, write: Any, params: dict[str, Any], message: str
) -> None:
    refuse(write(tmp_path / "m", shards=2, params=params), tmp_path, message)


def test_what_params_may_leave_out_or_spell_out(tmp_path: Path, write: Any) -> None:
    params = {"vocab_size": 520, "multiple_of": None}
    assert open_checkpoint(write(tmp_path / "m", params=params)).config == CONFIG


def test_a_hidden_layer_with_a_multiplier(tmp_path: Path, write: Any) -> None:
    config = replace(CONFIG, intermediate_size=896)  # 1.3 * 682 = 886, up to a multiple of 64
    params = {"multiple_of": 64, "ffn_dim_multiplier": 1.3}
    assert open_checkpoint(write(tmp_path / "m", config=config, params=params)).config == config


# --- bad input ------------------------------------------------------------------------------


def refuse(source: Path, folder: Path, message: str, error: type = CheckpointError) -> None:
    """The export ends in one sentence that matches `message`, and leaves nothing."""
    with pytest.raises(error, match=message) as caught:
        export(source, folder / "out")
    assert str(source.parent) in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert not list(folder.glob("out*"))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([1], r"lacks consolidated\.01\.pth \(1 of 8 shards\)"),
        ([7], r"lacks consolidated\.07\.pth \(1 of 8 shards\)"),
        ([0, 5], r"lacks consolidated\.00\.pth, consolidated\.05\.pth \(2 of 8 shards\)"),
        (range(8), r"has a params\.json but no consolidated\.00\.pth"),
    ],
)
def test_a_missing_shard(
    tmp_path: Path, folders: dict[int, Path], removed: Any, message: str
) -> None:
    source = shutil.copytree(folders[8], tmp_path / "m")
    for number in removed:
        (source / f"consolidated.{number:02}.pth").unlink()
    refuse(source, tmp_path, message)


def test_a_shard_too_many(tmp_path: Path, folders: dict[int, Path]) -> None:
    source = shutil.copytree(folders[2], tmp_path / "m")
    shutil.copyfile(source / "consolidated.01.pth", source / "consolidated.02.pth")
    refuse(source, tmp_path, "has 3 shards, but shard 0 is one of 2")


def reshape(tensors: Tensors) -> None:
    tensors["layers.1.attention.wo.weight"] = torch.zeros(256, 48)


def retype(tensors: Tensors) -> None:
    tensors["output.weight"] = tensors["output.weight"].half()


def drop(tensors: Tensors) -> None:
    del tensors["layers.1.feed_forward.w2.weight"]


def nudge(tensors: Tensors) -> None:
    tensors["layers.1.ffn_norm.weight"][5] += 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            reshape,
            r"layers\.1\.attention\.wo\.weight is F32 \[256, 128\] in shard 0, but F32 \[256, 48\]",
        ),
        (retype, r"output\.weight is F32 \[260, 256\] in shard 0, but F16"),
        (drop, r"layers\.1\.feed_forward\.w2\.weight is not in both shard 0 and shard 1"),
        (nudge, r"layers\.1\.ffn_norm\.weight differs between shard 0 and shard 1"),
    ],
)
def test_shards_of_different_models(tmp_path: Path, write: Any, change: Any, message: str) -> None:
    source = write(tmp_path / "m", shards=2, alter=lambda i, t: change(t) if i == 1 else None)
    refuse(source, tmp_path, message)


def test_a_tensor_nobody_knows_is_not_dropped(tmp_path: Path, write: Any) -> None:
    source = write(tmp_path / "m", alter=lambda _, t: t.update({"layers.0.wq.bias": torch.ones(8)}))
    refuse(source, tmp_path, r"has the tensor layers\.0\.wq\.bias", UnsupportedError)


class RunsCode:
    """Leaves a folder behind when it is unpickled without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.trace),))


def test_code_in_a_shard_does_not_run(tmp_path: Path, write: Any) -> None:
    source, trace = write(tmp_path / "m", shards=2), tmp_path / "trace"
    pickle.loads(pickle.dumps(RunsCode(trace)))
    assert trace.exists(), "the trap itself does not work"
    trace.rmdir()
    torch.save({"norm.weight": RunsCode(trace)}, source / "consolidated.01.pth")
    refuse(source, tmp_path, r"consolidated\.01\.pth asks for .*mkdir .*none was run")
    assert not trace.exists()


def test_an_old_pickle_is_refused_with_the_reason(tmp_path: Path, write: Any) -> None:
    source = write(tmp_path / "m")
    torch.save(whole(), source / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    refuse(source, tmp_path, r"the format before PyTorch 1\.6", UnsupportedError)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_shard(tmp_path: Path, write: Any, share: float) -> None:
    source = write(tmp_path / "m", shards=2)
    shard = source / "consolidated.01.pth"
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * share)])
    refuse(source, tmp_path, r"consolidated\.01\.pth is truncated or damaged: download it again")


def test_a_zip_of_something_else(tmp_path: Path, write: Any) -> None:
    source = write(tmp_path / "m")
    with zipfile.ZipFile(source / "consolidated.00.pth", "w") as archive:
        archive.writestr("readme", "hello")
    refuse(source, tmp_path, r"consolidated\.00\.pth")
    torch.save([1, 2], source / "consolidated.00.pth")
    refuse(source, tmp_path, "holds list instead of a dict of tensors")
    torch.save({"x": torch.ones(1)}, source / "consolidated.00.pth")
    refuse(source, tmp_path, "shard 0 has no embedding or no norm")


def test_a_tokenizer_of_another_size(tmp_path: Path, write: Any) -> None:
    config = replace(CONFIG, vocab_size=512)
    source = write(tmp_path / "m", config=config)
    refuse(source, tmp_path, "the tokenizer has 520 tokens, but the embedding 512 rows")
    (source / "tokenizer.model").write_bytes(b"\xff no protobuf")
    refuse(source, tmp_path, r"tokenizer\.model is not a SentencePiece model")
    (source / "tokenizer.model").unlink()
    refuse(source, tmp_path, r"has a tokenizer\.model: copy it next to params\.json")


# --- checklist.chk --------------------------------------------------------------------------


class Steps(Silent):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def step(self, text: str) -> None:
        self.seen.append(text)


def test_checksums_are_verified_and_shown(tmp_path: Path, write: Any) -> None:
    source, steps = write(tmp_path / "m", shards=2), Steps()
    write_checklist(source)
    export(source, tmp_path / "out", progress=steps)
    expected = [f"checking {n}" for n in ("consolidated.00.pth", "consolidated.01.pth")]
    assert steps.seen[:3] == [*expected, "checking params.json"]


def test_a_checksum_that_fails(tmp_path: Path, write: Any) -> None:
    source = write(tmp_path / "m", shards=2)
    checklist = write_checklist(source)
    tensors = torch.load(source / "consolidated.01.pth", weights_only=True)
    tensors["output.weight"][0, 0] += 1
    torch.save(tensors, source / "consolidated.01.pth")
    refuse(source, tmp_path, r"consolidated\.01\.pth does not have the checksum in checklist\.chk")
    assert run("inspect", source).exit_code == run("plan", source).exit_code == 0
    checklist.write_text(f"{'0' * 32}  consolidated.09.pth\n")
    refuse(source, tmp_path, r"lacks consolidated\.09\.pth, which its checklist names")
    checklist.write_text("<html>\n")
    refuse(source, tmp_path, r"checklist\.chk has a line that is not a checksum")
    result = run("export", source, tmp_path / "out", "--quantizer", "rtn", "--no-checksum")
    assert result.exit_code == 0, result.output


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# --- what lies beside the weights -----------------------------------------------------------


def test_tokenizer_and_licences_a_folder_above(tmp_path: Path, write: Any) -> None:
    source = write(tmp_path / "llama-2-7b")
    for name in ("tokenizer.model", "LICENSE.txt"):
        (source / name).rename(tmp_path / name)
    (tmp_path / "USE_POLICY.md").write_text("a policy", encoding="utf-8")
    (tmp_path / "README.md").write_text("about all my models", encoding="utf-8")
    result = export_package(source, tmp_path / "out", TARGET, FP32)
    assert result.warnings == ()
    assert {"LICENSE.txt", "USE_POLICY.md"} <= {file.name for file in result.package.iterdir()}
    assert not (result.package / "MODEL_CARD.md").exists()
    (tmp_path / "tokenizer_checklist.chk").write_text(f"{'0' * 32}  tokenizer.model\n")
    shutil.rmtree(tmp_path / "out")
    refuse(source, tmp_path, r"tokenizer\.model does not have the checksum")


@pytest.mark.parametrize("above", [False, True])
def test_validate_from_end_to_end(tmp_path: Path, write: Any, above: bool) -> None:
    source = write(tmp_path / "llama-2-7b", shards=2)
    if above:
        (source / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    assert json.loads(run("inspect", source, "--json").stdout)["missing"] == []
    out = tmp_path / "out"
    rtn = ("--precision", "int4", "--quantizer", "rtn")
    assert run("export", source, out, *rtn).exit_code == 0
    flags = ("--reference", source, "--tokens", "4", "--prompt-tokens", "8", "--json")
    result = run("validate", out, *flags)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"]
    assert (report["tokenizer"]["source"], report["tokenizer"]["passed"]) == (
        "tokenizer.model",
        True,
    )
    # Another vocabulary of the same size beside the weights: the check does look there.
    file = (tmp_path if above else source) / "tokenizer.model"
    model = proto.ModelProto.FromString(file.read_bytes())
    one, two = (next(p for p in model.pieces if p.piece == letter) for letter in "te")
    one.piece, two.piece = "e", "t"
    file.write_bytes(model.SerializeToString())
    result = run("validate", out, *flags)
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["tokenizer"]["passed"]


def test_inspect_says_what_it_is(folders: dict[int, Path]) -> None:
    facts = json.loads(run("inspect", folders[8], "--json").stdout)
    assert (facts["format"], facts["problem"]) == ("meta", "none")
    assert facts["dtypes"] == {"F32": 2 * 9 + 3}
    assert facts["bytes"] == 4 * facts["parameters"] == 4 * CONFIG.num_parameters()
    assert len(facts["files"]) == 8 + 2
    assert facts["licence_files"] == ["LICENSE.txt"]


# --- the chat format ------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": " You are\nhelpful. "}
TURNS = [
    {"role": "user", "content": "  Who wrote 日本 🎉?\n\nTell me. "},
    {"role": "assistant", "content": " I do   not know.\n"},
    {"role": "user", "content": "Then guess, [INST] or not."},
    {"role": "assistant", "content": "def f(x):\n    return x"},
    {"role": "user", "content": "banana"},
]


@pytest.fixture(scope="module")
def chat(tokenizer: bytes, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("chat")
    source = write_meta(folder / "llama-2-7b-chat", tokenizer)
    MetaCheckpoint.open(source).write_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def metas_dialog(model: bytes, messages: list[dict[str, str]]) -> list[int]:
    """The ids that Meta's generation.py makes of a conversation that ends with the user."""
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        texts = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}", *texts[2:]]
    ids: list[int] = []
    for prompt, answer in zip(texts[:-1:2], texts[1::2], strict=True):
        turn = f"[INST] {prompt.strip()} [/INST] {answer.strip()} "
        ids += [1, *reference.encode(turn), 2]
    return [*ids, 1, *reference.encode(f"[INST] {texts[-1].strip()} [/INST]")]


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("head", [[], [SYSTEM]], ids=["plain", "system"])
def test_a_chat_is_token_for_token_metas_and_transformers(
    chat: Any, tokenizer: bytes, head: list[Any], count: int
) -> None:
    messages = [*head, *TURNS[:count]]
    found = chat.apply_chat_template(messages, return_dict=False)
    assert found == metas_dialog(tokenizer, messages)
    assert found == chat.apply_chat_template(
        messages, chat_template=PUBLISHED_TEMPLATE, return_dict=False
    )
    text = chat.apply_chat_template([*messages, TURNS[1]], tokenize=False)
    assert text == chat.apply_chat_template(
        [*messages, TURNS[1]], chat_template=PUBLISHED_TEMPLATE, tokenize=False
    )


@pytest.mark.parametrize("head", [[], [SYSTEM]], ids=["plain", "system"])
def test_onnxruntime_genai_makes_the_same_of_a_chat(
    tokenizer: bytes, head: list[Any], tmp_path: Path
) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="runs where the runtime is installed")
    package = export(write_meta(tmp_path / "llama-2-7b-chat", tokenizer), tmp_path / "out")
    reader = genai.Tokenizer(genai.Model(str(package)))
    messages = [*head, *TURNS]
    text = reader.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    assert reader.encode(text).tolist() == metas_dialog(tokenizer, messages)


def test_roles_that_do_not_alternate_are_refused(chat: Any) -> None:
    with pytest.raises(Exception, match="must alternate"):
        chat.apply_chat_template(TURNS[1:], tokenize=False)


def test_a_base_model_has_no_chat_format(folders: dict[int, Path], tmp_path: Path) -> None:
    written = open_checkpoint(folders[1]).write_tokenizer(tmp_path)
    assert written == ["tokenizer.json", "tokenizer_config.json"]
