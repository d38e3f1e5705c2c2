"""What a stranger's package, or a wrong call, makes of the C library: a sentence."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_onnx.runtime.chat_template.genai_bounds import exceeded_bound
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.targets import contents
from llama_onnx.targets.listing import BESIDE
from llama_onnx.targets.package import _BUNDLE_FILES, MANIFEST
from tests.support.native_templates import HARMFUL, KILLING_WHEN_OPENED
from tests.support.packages import alter_package

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="built with gcc for Linux's libraries"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
]

LINE = "0" * 64


def refusal(sample: Any, built: Path, package: Path, **options: Any) -> str:
    with pytest.raises(RuntimeError) as caught:
        sample.Model(package, library=built / "libllama_onnx.so", **options)
    text = str(caught.value)
    assert text.endswith(".") and text.isprintable()
    return text


def opens(sample: Any, built: Path, package: Path) -> bool:
    with sample.Model(package, library=built / "libllama_onnx.so", check_hashes=True) as model:
        return len(model.generate_ids([1, 40], 2)) == 2


# ---- SHA256SUMS ----------------------------------------------------------------------------------


def sums(copy: Path) -> list[str]:
    return (copy / "SHA256SUMS").read_text("utf-8").splitlines()


SOUND: dict[str, Callable[[list[str]], str]] = {
    "as written": lambda lines: "\n".join(lines) + "\n",
    "no end of the last line": "\n".join,
    "lines that end with CRLF": lambda lines: "\r\n".join(lines) + "\r\n",
    "empty lines": lambda lines: "\n\n".join(lines) + "\n\n",
    "marks of binary files": lambda lines: "\n".join(line.replace("  ", " *", 1) for line in lines),
    "digits in capitals": lambda lines: "\n".join(line[:64].upper() + line[64:] for line in lines),
    "another order": lambda lines: "\n".join(reversed(lines)),
}


@pytest.mark.parametrize("how", SOUND)
def test_sums_as_tools_write_them(sample: Any, built: Path, copy: Path, how: str) -> None:
    (copy / "SHA256SUMS").write_bytes(SOUND[how](sums(copy)).encode())
    assert opens(sample, built, copy)


DAMAGED: dict[str, tuple[Callable[[list[str]], str], str]] = {
    "only one file": (lambda lines: lines[0], "SHA256SUMS does not name"),
    "one file less": (lambda lines: "\n".join(lines[1:]), "does not name"),
    "the end is cut off": (lambda lines: "\n".join(lines)[:-3], "does not name"),
    "a NUL": (lambda lines: lines[0] + "\n\0\n" + "\n".join(lines[1:]), "has a NUL"),
    "a file twice": (lambda lines: "\n".join([*lines, lines[-1]]), "twice"),
    "a file that is not there": (lambda lines: "\n".join([*lines, f"{LINE}  x"]), "is missing"),
    "the folder above": (lambda lines: "\n".join([*lines, f"{LINE}  ../x"]), "invalid line"),
    "a folder inside": (lambda lines: "\n".join([*lines, f"{LINE}  parity"]), "is missing"),
    "an absolute name": (lambda lines: "\n".join([*lines, f"{LINE}  /etc/passwd"]), "invalid line"),
    "a name for Windows": (lambda lines: "\n".join([*lines, f"{LINE}  C:x"]), "invalid line"),
    "a device": (lambda lines: "\n".join([*lines, f"{LINE}  NUL"]), "invalid line"),
    "a bare CR": (lambda lines: "\r".join(lines), "invalid line"),
    "a comment": (lambda lines: "# sums\n" + "\n".join(lines), "invalid line"),
    "one space": (lambda lines: lines[0].replace("  ", " "), "invalid line"),
    "63 digits": (lambda lines: lines[0][1:], "invalid line"),
    "other digits": (lambda lines: "g" + lines[0][1:], "invalid line"),
    "an escape": (lambda lines: f"{LINE}  a\x1b[2Jb", "invalid line"),
    "an escaped name": (lambda lines: f"\\{LINE}  a\\nb", "invalid line"),
    "nothing": (lambda lines: "", "is empty"),
    "empty lines only": (lambda lines: "\n\n\n", "is empty"),
    "far too many lines": (lambda lines: "\n" * 20_000, "too many lines"),
    "a long line": (lambda lines: "x" * 100_000, "invalid line"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_sums(sample: Any, built: Path, copy: Path, how: str) -> None:
    change, message = DAMAGED[how]
    (copy / "SHA256SUMS").write_bytes(change(sums(copy)).encode())
    assert message in refusal(sample, built, copy, check_hashes=True)


@pytest.mark.parametrize("name", ["added.txt", ".hidden", "chat_template.json", "sub/model.onnx"])
def test_a_file_that_the_sums_do_not_name(sample: Any, built: Path, copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"x")
    text = refusal(sample, built, copy, check_hashes=True)
    assert f"does not name {name}." in text


def test_files_that_may_be_beside_a_package(sample: Any, built: Path, copy: Path) -> None:
    for name in ("manifest.json.sig", "model.sig", ".cache/huggingface/download/x.lock"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"x")
    assert opens(sample, built, copy)


# ---- links, pipes, devices -----------------------------------------------------------------------


def test_a_link_out_of_the_package(sample: Any, built: Path, copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "tokenizer.json", tmp_path / "elsewhere.json")
    (copy / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    assert "is a link that leads out of the package" in refusal(sample, built, copy)


@pytest.mark.parametrize("target", ["nowhere", "tokenizer.json", "/etc", "parity"])
def test_a_link_to_nothing_to_itself_and_to_folders(
    sample: Any, built: Path, copy: Path, target: str
) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").symlink_to(target)
    assert "is a link" in refusal(sample, built, copy)


def test_links_inside_and_to_the_blobs_of_the_hubs_cache(
    sample: Any, built: Path, copy: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in (file for file in copy.rglob("*") if file.is_file()):
        name = file.relative_to(copy)
        blob = cache / "blobs" / hashlib.sha256(str(name).encode()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(blob)
    assert opens(sample, built, snapshot)
    (cache / "secret").write_bytes(b"{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(cache / "secret")
    assert "is a link that leads out" in refusal(sample, built, snapshot)


@pytest.mark.parametrize("name", ["chat_template.jinja", "extra", "parity/extra"])
def test_a_pipe_does_not_stop_the_program(sample: Any, built: Path, copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    assert f"{name} is not" in refusal(sample, built, copy)


def test_folders_in_folders(sample: Any, built: Path, copy: Path) -> None:
    (copy / Path(*["d"] * 30)).mkdir(parents=True)
    assert "cannot be read" in refusal(sample, built, copy)


def test_a_setting_that_loads_a_library(sample: Any, built: Path, copy: Path) -> None:
    file = copy / "genai_config.json"
    settings = json.loads(file.read_text("utf-8"))
    settings["model"]["decoder"]["session_options"]["custom_ops_library"] = "/tmp/x.so"
    file.write_text(json.dumps(settings), "utf-8")
    text = refusal(sample, built, copy)
    assert "sets model.decoder.session_options.custom_ops_library, which a package may not" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"tiktoken_file": "../../outside"}', "names a file, tiktoken_file"),
        ('{"\\u0074iktoken_file": "pipe"}', "names a file, tiktoken_file"),
        ('["tiktoken_file"]', "is not a JSON object"),
        ('{/**/"tiktoken_file": "x"}', "is not a JSON object"),
        (" " * (5 << 20), "is too large"),
    ],
)
def test_settings_that_lead_the_tokenizer_out_of_the_package(
    sample: Any, built: Path, copy: Path, content: str, words: str
) -> None:
    (copy / "tokenizer_config.json").write_text(content, "utf-8")
    assert words in refusal(sample, built, copy)


@pytest.mark.parametrize("name", ["tokenizer_module.json", "EVIL.DLL", "x.Py", "model.ort"])
def test_a_file_that_a_library_opens_by_name(
    sample: Any, built: Path, copy: Path, name: str
) -> None:
    (copy / name).write_text("{}")
    assert f"holds {name}, which no export writes" in refusal(sample, built, copy)


def test_the_names_that_exports_write_are_pythons() -> None:
    source = (Path(__file__).parents[3] / "runtime/native/files.h").read_text("utf-8")
    suffixes, files = (
        set(re.findall(r'"([^"]+)"', source.partition(f"{name}[] = {{")[2].partition("}")[0]))
        for name in ("opened_suffixes", "opened_files")
    )
    assert suffixes == set(contents._OPENED)
    beside = {*BESIDE, *_BUNDLE_FILES, MANIFEST}
    known = {name for name in beside if Path(name).suffix in contents._OPENED}
    assert files == known | {name for name in contents._NAMES if "/" not in name}


def test_an_escape_in_a_key_is_not_printed(sample: Any, built: Path, copy: Path) -> None:
    (copy / "genai_config.json").write_text('{"a\x1b[2J\x7f\u202e": 1}', "utf-8")
    assert "genai_config.json" in refusal(sample, built, copy)


# ---- calls ---------------------------------------------------------------------------------------


def test_null_ends_no_process(sample: Any, model: Any) -> None:
    api, ids = model._api, (ctypes.c_int32 * 4)()
    count = ctypes.c_size_t(4)
    one = ctypes.c_size_t(1)
    assert api.llama_onnx_generate(None, b"a", 5, None, None) == sample.FAILED
    assert api.llama_onnx_chat(None, b"[]", 5, None, None) == sample.FAILED
    assert api.llama_onnx_generate_ids(None, ids, one, ids, ctypes.byref(count)) == sample.FAILED
    assert api.llama_onnx_open(b"x", None, None) == sample.FAILED
    assert api.llama_onnx_provider(None) == api.llama_onnx_provider_reason(None) == b""
    assert api.llama_onnx_error(None)
    api.llama_onnx_cancel(None)
    api.llama_onnx_close(None)
    handle, count = model._handle, ctypes.c_size_t(4)
    for call in (
        (handle, ids, one, ids, None),
        (handle, ids, one, None, ctypes.byref(count)),
        (handle, None, one, ids, ctypes.byref(count)),
    ):
        count.value = 4
        assert api.llama_onnx_generate_ids(*call) == sample.FAILED
        assert "is NULL." in model.error
    for function in (api.llama_onnx_generate, api.llama_onnx_chat):
        assert function(handle, None, 5, None, None) == sample.FAILED
        assert model.error == "the prompt is NULL."


BROKEN = [b"\xff\xfe", b"caf\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"a\x80b"]


@pytest.mark.parametrize("prompt", BROKEN)
def test_text_that_is_not_utf8(sample: Any, model: Any, prompt: bytes) -> None:
    api, handle = model._api, model._handle
    assert api.llama_onnx_generate(handle, prompt, 5, None, None) == sample.FAILED
    assert model.error == "the prompt is not UTF-8 text."
    chat = b'[{"role": "user", "content": "' + prompt + b'"}]'
    assert api.llama_onnx_chat(handle, chat, 5, None, None) == sample.FAILED
    assert "is not UTF-8 text" in model.error


@pytest.mark.parametrize("token", [-1, 288, 2**31 - 1, -(2**31)])
def test_tokens_outside_the_vocabulary(model: Any, token: int) -> None:
    with pytest.raises(RuntimeError, match=f"the token {token}, but the model has tokens 0 to 287"):
        model.generate_ids([1, token], 5)
    assert len(model.generate_ids([0, 287], 5)) == 5


def test_no_error_is_left_after_an_answer_was_stopped(sample: Any, model: Any) -> None:
    def receive(piece: bytes, user: object) -> int:
        model.cancel()
        return 0

    callback = sample._Callback(receive)
    status = model._api.llama_onnx_generate(model._handle, b"the", 50, callback, None)
    assert (status, model.error) == (sample.CANCELLED, "")


@pytest.mark.parametrize(
    "messages", ["null", '"hi"', "{}", "[1]", "[]", '[{"role": "user", "content": null}]']
)
def test_senseless_messages(sample: Any, model: Any, messages: str) -> None:
    status = model._api.llama_onnx_chat(model._handle, messages.encode(), 5, None, None)
    assert status == sample.FAILED
    assert model.error.startswith("messages")


def test_a_content_of_parts_is_one_text(model: Any, llama: Llama) -> None:
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "quick"}]
    one = model.chat([{"role": "user", "content": "the\nquick"}], 20)
    assert "".join(model.chat([{"role": "user", "content": parts}], 20)) == "".join(one)


# ---- chat templates ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a macro that calls itself", "doubling by ~", "loops in loops"])
def test_a_harmful_template_is_refused_and_the_model_usable(
    sample: Any, built: Path, package: Path, tmp_path: Path, name: str
) -> None:
    template, message = HARMFUL[name]
    altered = alter_package(package, tmp_path / "harmful", chat_template=template)
    (altered / "chat_template.jinja").write_text(template, "utf-8")
    if exceeded_bound(template):  # not even to be opened
        assert "may not survive that" in refusal(sample, built, altered)
        return
    with sample.Model(altered, library=built / "libllama_onnx.so") as model:
        with pytest.raises(RuntimeError, match="the model's chat template") as caught:
            list(model.chat([{"role": "user", "content": "hi"}], 5))
        assert message in str(caught.value)
        assert "".join(model.generate("the", 5))


@pytest.mark.parametrize("name", KILLING_WHEN_OPENED)
@pytest.mark.parametrize("named", [False, True])
def test_a_template_that_ends_the_engine_when_it_is_opened(
    sample: Any, built: Path, package: Path, tmp_path: Path, name: str, named: bool
) -> None:
    template = KILLING_WHEN_OPENED[name]
    altered = alter_package(package, tmp_path / "harmful", chat_template=template)
    if named:
        config = {"chat_template": [{"name": "tool_use", "template": template}]}
        altered = alter_package(package, tmp_path / "named", tokenizer_config=config)
    assert "may not survive that" in refusal(sample, built, altered)


@pytest.mark.parametrize("named", [[{"name": "default", "template": "x"}], 5])
def test_a_template_that_the_engine_cannot_read(
    sample: Any, built: Path, package: Path, tmp_path: Path, named: Any
) -> None:
    altered = alter_package(package, tmp_path / "named", tokenizer_config={"chat_template": named})
    assert "type must be string" in refusal(sample, built, altered)


def test_no_template(sample: Any, built: Path, package: Path, tmp_path: Path) -> None:
    altered = alter_package(package, tmp_path / "none", chat_template="")
    with sample.Model(altered, library=built / "libllama_onnx.so") as model:
        with pytest.raises(RuntimeError, match="the model has no chat template"):
            list(model.chat([{"role": "user", "content": "hi"}], 5))
        assert "".join(model.generate("the", 5))
