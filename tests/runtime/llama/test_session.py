"""A conversation in a file: what another process makes of it, and of a file that is not sound."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.engine.engine import Limits
from llama_onnx.runtime.engine.sampling.guidance import Guide
from llama_onnx.runtime.engine.sampling.parameters import Sampling
from llama_onnx.runtime.llama.dialogue import Conversation
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.targets.errors import PackageError, ResourceError, SessionError, UsageError
from llama_onnx.targets.package import MANIFEST
from llama_onnx.targets.registry import get_target
from tests.support import adapters, tiny
from tests.support.packages import make_package, renew_hashes

SAID = ("the quick brown fox", "Paris 日本 😀 and the lazy dog")
NEXT = "and the end?"


def open_model(package: Path, **options: Any) -> Llama:
    return Llama.load(package, engine="onnxruntime", threads=1, **options)


def talk(model: Llama, **options: Any) -> Conversation:
    chat = model.conversation(system="a dog", max_new_tokens=12, **options)
    for said in SAID:
        "".join(chat.say(said))
    return chat


@pytest.fixture(scope="module")
def package_int8_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8-cache")
    source = tiny.write_huggingface(folder / "checkpoint")
    options = Options("fp32", kv_cache="int8", calibration_tokens=512)
    return export_package(source, folder / "p", get_target("cpu"), options).package


@pytest.fixture(scope="module")
def saved(package_fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a conversation with the fp32 package. Read only."""
    file = tmp_path_factory.mktemp("saved") / "chat.session"
    with open_model(package_fp32) as model:
        talk(model).save(file)
    return file


@pytest.fixture(scope="module")
def model(package_fp32: Path) -> Iterator[Llama]:
    with open_model(package_fp32) as opened:
        yield opened


# Saved and restored

ANOTHER_PROCESS = """
import json, sys
from llama_onnx.runtime.llama.model import Llama
model = Llama.load(sys.argv[1], engine="onnxruntime", threads=1)
chat = model.restore(sys.argv[2])
known = chat.messages
answer = chat.say(sys.argv[3])
tokens = [getattr(event, "token", None) for event in answer.events()]
print(json.dumps([known, tokens, answer.stats.prompt_tokens, answer.stats.reused_tokens]))
"""


@pytest.mark.parametrize("kind", ["package_fp32", "package", "package_int8_cache"])
def test_another_process_goes_on_as_if_nothing_had_happened(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    package, file = request.getfixturevalue(kind), tmp_path / "Gespräch 日本 1.session"
    with open_model(package) as model:
        chat = talk(model)
        report = chat.save(file)
        assert (report.messages, report.left_out) == (5, None)
        known = chat.messages
        answer = chat.say(NEXT)
        tokens = [getattr(event, "token", None) for event in answer.events()]
        plain = open_model(package)
        with plain:  # which has read nothing before
            alone = plain.chat(chat.messages[:-1], max_new_tokens=12)
            assert [getattr(event, "token", None) for event in alone.events()] == tokens
            assert alone.stats.reused_tokens == 0
    command = [sys.executable, "-c", ANOTHER_PROCESS, str(package), str(file), NEXT]
    found = json.loads(subprocess.check_output(command))
    stats = answer.stats
    assert found == [known, tokens, stats.prompt_tokens, stats.reused_tokens]
    # All but what is new: the model's own last answer may be cut into other tokens than it chose.
    assert stats.reused_tokens >= len(model.encode_chat(known[:-1]))


def test_the_file_is_safetensors(saved: Path, package_fp32: Path) -> None:
    tensors = load_file(saved)
    with safe_open(saved, "numpy") as file:
        metadata = file.metadata()
    session = json.loads(metadata["session"])
    manifest = (package_fp32 / MANIFEST).read_bytes()
    assert session["package"]["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert [m["content"] for m in session["messages"] if m["role"] == "user"] == list(SAID)
    tokens = tensors.pop("tokens")
    parts = [f"past_key_values.{i}.{part}" for i in range(3) for part in ("key", "value")]
    assert sorted(tensors) == parts
    assert {part.shape for part in tensors.values()} == {(2, len(tokens) - 1, 16)}
    if sys.platform != "win32":
        assert stat.S_IMODE(saved.stat().st_mode) == 0o600


def test_the_cache_is_the_one_of_the_tokens(saved: Path, package_fp32: Path) -> None:
    """A plain session of ONNX Runtime computes the same keys and values of the tokens."""
    import onnxruntime

    tensors = load_file(saved)
    ids = tensors.pop("tokens")[None, :-1].astype(np.int64)
    session = onnxruntime.InferenceSession(package_fp32 / "model.onnx")
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds |= {name: part[None, :, :0] for name, part in tensors.items()}
    names = [name.replace("past_key_values", "present") for name in tensors]
    for part, expected in zip(tensors.values(), session.run(names, feeds), strict=True):
        np.testing.assert_allclose(part, expected[0], rtol=1e-4, atol=1e-4)


def test_options_come_back(model: Llama, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "now", "description": "日"}}
    options: dict[str, Any] = {
        "max_new_tokens": 7,
        "sampling": Sampling(temperature=0.7, logit_bias={7: -3}),
        "seed": 2**64 - 1,
        "stop": ("x", "y"),
        "guide": Guide("regex", "[a-z ]*"),
    }
    chat = model.conversation(tools=[tool], overflow="drop_oldest", **options)
    "".join(chat.say("the fox"))
    chat.save(tmp_path / "a")
    back = model.restore(tmp_path / "a")
    assert back.overflow == "drop_oldest"
    assert "".join(back.say("the dog")) == "".join(chat.say("the dog"))
    assert back._setup == chat._setup
    changed = model.restore(tmp_path / "a", overflow="error", max_new_tokens=3)
    assert changed._setup.options == {**chat._setup.options, "max_new_tokens": 3}
    assert changed.overflow == "error"


def test_a_conversation_without_an_answer(model: Llama, tmp_path: Path) -> None:
    for chat in (model.conversation(), model.conversation(system="a")):
        assert chat.save(tmp_path / "a").positions == 0
        back = model.restore(tmp_path / "a")
        assert back.messages == chat.messages
        assert back.restored is not None and back.restored.left_out is None
        "".join(back.say("the fox", max_new_tokens=4))


def test_what_was_undone_is_not_saved(model: Llama, tmp_path: Path) -> None:
    chat = talk(model)
    chat.undo()
    chat.save(tmp_path / "a")
    text = model.decode(load_file(tmp_path / "a")["tokens"])
    assert SAID[0] in text and "Paris" not in text
    answer = model.restore(tmp_path / "a").say(SAID[1])
    "".join(answer)
    assert answer.stats.reused_tokens > 30


def test_an_answer_that_was_stopped_is_saved_with_what_was_shown(
    package_fp32: Path, tmp_path: Path
) -> None:
    """The engine has not come to its end when the file is asked for."""
    with open_model(package_fp32) as first:
        chat = first.conversation(max_new_tokens=200)
        answer = chat.say("the fox")
        *_, shown = [next(answer) for _ in range(3)]
        answer.close()
        report = chat.save(tmp_path / "a")
        assert report.positions >= answer.stats.prompt_tokens + 2
    assert shown in load_messages(tmp_path / "a")[-1]["content"]


def load_messages(file: Path) -> list[dict[str, Any]]:
    with safe_open(file, "numpy") as opened:
        found: list[dict[str, Any]] = json.loads(opened.metadata()["session"])["messages"]
    return found


def test_a_restored_conversation_can_be_saved_again(
    package_fp32: Path, saved: Path, tmp_path: Path
) -> None:
    with open_model(package_fp32) as first:
        first.restore(saved).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """The warnings about sessions."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("llama_onnx.session")
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


def test_genai_saves_and_restores_messages(
    package: Path, tmp_path: Path, warned: list[str]
) -> None:
    llama = Llama.load(package, engine="genai")
    file = tmp_path / "a"
    chat = llama.conversation(max_new_tokens=4)
    "".join(chat.say("the fox"))
    report = chat.save(file)
    assert report.positions == 0 and "onnxruntime-genai keeps none" in str(report.left_out)
    assert len(warned) == 1 and "onnxruntime-genai keeps none" in warned[0]
    back = llama.restore(file)
    assert back.messages == chat.messages
    with open_model(package) as ours:
        other = ours.restore(file)
        assert other.restored is not None and other.restored.left_out == "it was saved without one"
        "".join(other.say("the dog"))
        other.save(file)
    theirs = llama.restore(file)  # which has a cache now
    assert theirs.messages == other.messages
    assert theirs.restored is not None and theirs.restored.positions == 0
    assert len(warned) == 4


def test_where_there_is_no_room_the_text_is_read_again(package_fp32: Path, saved: Path) -> None:
    """2 x 3 parts of 2 heads with 16 floats of 4 bytes: 768 bytes a token."""
    positions = len(load_file(saved)["tokens"]) - 1
    with open_model(package_fp32, limits=Limits(cache_bytes=768 * (positions - 1))) as small:
        back = small.restore(saved)
        assert back.restored is not None and "no room" in str(back.restored.left_out)
        assert len(back.messages) == 5
    with open_model(package_fp32, max_length=positions) as short:
        back = short.restore(saved, overflow="drop_oldest")
        assert back.restored is not None and "more than the context" in str(back.restored.left_out)
        "".join(back.say("the fox", max_new_tokens=3))


def test_what_others_pushed_out_is_said(package_fp32: Path, tmp_path: Path) -> None:
    with open_model(package_fp32, limits=Limits(cache_bytes=768 * 160)) as small:
        chat = small.conversation(max_new_tokens=12)
        "".join(chat.say("the quick brown fox"))
        list(small.generate(range(3, 140), max_new_tokens=16))
        report = chat.save(tmp_path / "a")
    assert report.positions == 0 and "0 of" in str(report.left_out)


# Bound to the package and the adapter


def test_another_package_is_refused_but_its_messages_can_be_had(
    package: Path, package_fp32: Path, saved: Path, tmp_path: Path
) -> None:
    with open_model(package) as other:
        with pytest.raises(SessionError, match=r"another package or another version.*'tiny-fp32'"):
            other.restore(saved)
        chat = other.restore(saved, messages_only=True, max_new_tokens=4)
        assert chat.messages == load_messages(saved)
        answer = chat.say("the fox")
        "".join(answer)
        assert (answer.stats.reused_tokens, answer.stats.new_tokens) == (0, 4)
    version = shutil.copytree(package_fp32, tmp_path / package_fp32.name)
    settings = version / "genai_config.json"
    settings.write_bytes(settings.read_bytes() + b"\n")
    renew_hashes(version)
    with open_model(version) as other, pytest.raises(SessionError, match="another version"):
        other.restore(saved)


def test_a_package_that_changes_while_it_is_open(package_fp32: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(package_fp32, tmp_path / "copied")
    with open_model(copied) as changing:
        chat = talk(changing)
        manifest = copied / MANIFEST
        content = json.loads(manifest.read_text(encoding="utf-8"))
        manifest.write_text(json.dumps({**content, "new": 1}), encoding="utf-8")
        with pytest.raises(PackageError, match="has changed since it was opened"):
            chat.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_session_keeps_its_adapter(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    modules = {name: 4 for layer in range(3) for name in adapters.attention(layer, "q", "v")}
    factors = adapters.factors(modules)
    kept = {name: adapters.write_adapter(tmp_path / name, factors) for name in ("qv", "other")}
    cpu = get_target("cpu")
    package = export_package(source, tmp_path / "p", cpu, Options("fp32"), kept=kept).package
    file = tmp_path / "a"
    with open_model(package) as first:
        chat = talk(first, adapter="qv")
        chat.save(file)
        texts = ["".join(chat.say(NEXT))]
    with open_model(package) as second:
        back = second.restore(file)
        answer = back.say(NEXT)
        texts.append("".join(answer))
        assert back.adapter == "qv" and answer.stats.reused_tokens > 60
        assert texts[0] == texts[1]
        with pytest.raises(SessionError, match="saved with the adapter qv, not with other"):
            second.restore(file, adapter="other")
        with pytest.raises(UsageError, match="no adapter 'third'"):
            second.restore(file, adapter="third")
        assert second.restore(file, adapter="other", messages_only=True).adapter == "other"
        second.conversation().save(file)
        with pytest.raises(SessionError, match="saved with no adapter, not with qv"):
            second.restore(file, adapter="qv")


# Files that are not sound


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def altered(
    content: bytes, change: Callable[[dict[str, Any]], None], *, data: bytes | None = None
) -> bytes:
    """The file with another session, whose hashes fit again."""
    header, old = header_of(content)
    session = json.loads(header["__metadata__"]["session"])
    change(session)
    if data is not None:
        session["data_sha256"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(session)
    header["__metadata__"]["session"] = text
    header["__metadata__"]["session_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return with_header(header, old if data is None else data)


def changed_entries(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    header, data = header_of(content)
    change(header)
    return with_header(header, data)


def with_value(content: bytes, value: float) -> bytes:
    """The last number of the cache is `value`, and the hashes fit."""
    _, data = header_of(content)
    return altered(content, lambda _: None, data=data[:-4] + np.float32(value).tobytes())


def claim(header: dict[str, Any]) -> None:
    """100 GB in one tensor."""
    header["past_key_values.0.key"]["shape"][1] = 10**9
    header["past_key_values.0.key"]["data_offsets"][1] = 10**11


def set_entry(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].__setitem__(key, value)


def rename(header: dict[str, Any]) -> None:
    header["past_key_values.7.key"] = header.pop("past_key_values.0.key")


def put(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda session: session.update(values)


KEY = "past_key_values.0.key"
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "is not a session"),
    "a text": (lambda _: b"hello, this is a text and no session", "is not a session"),
    "only a length": (lambda c: c[:8], "is not a session"),
    "half a header": (lambda c: c[:300], "is not a session"),
    "a huge header": (lambda c: struct.pack("<Q", 1 << 60) + c[8:], "is not a session"),
    "a negative header": (lambda c: b"\xff" * 8 + c[8:], "is not a session"),
    "no JSON": (lambda c: c[:8] + b"[" + c[9:], "is not a session"),
    "a list": (lambda c: with_header([], b""), "is not a session"),
    "other safetensors": (lambda c: with_header({"__metadata__": {"format": "pt"}}, b""), "is not"),
    "a later version": (
        lambda c: c.replace(b"llama-onnx session 1", b"llama-onnx session 2"),
        "another version of llama-onnx",
    ),
    "a changed text": (lambda c: c.replace(b"brown", b"green"), "its text was changed"),
    "deep JSON": (
        lambda c: altered(c, put(messages=json.loads("[" * 200 + "]" * 200))),
        "nested too deeply",
    ),
    "no messages": (lambda c: altered(c, lambda s: s.pop("messages")), "'messages' is missing"),
    "wrong messages": (lambda c: altered(c, put(messages=[{"role": 5}])), "has no 'content'"),
    "messages of a wrong type": (lambda c: altered(c, put(messages=5)), "must be a list"),
    "wrong package": (lambda c: altered(c, put(package=[])), "wrong type"),
    "wrong options": (lambda c: altered(c, put(options={"top": 1})), "wrong type"),
    "a wrong option": (lambda c: altered(c, put(options={"top_k": "x"})), "top_k must be"),
    "a wrong guide": (lambda c: altered(c, put(options={"guide": {"a": 1}})), "wrong type"),
    "a wrong sampling": (lambda c: altered(c, put(options={"sampling": [1]})), "wrong type"),
    "a wrong policy": (lambda c: altered(c, put(overflow=[])), "overflow must be"),
    "a wrong adapter": (lambda c: altered(c, put(adapter={})), "wrong type"),
    "an unknown adapter": (lambda c: altered(c, put(adapter="../x")), "no adapter"),
    "truncated": (lambda c: c[:-1], "header says"),
    "without data": (lambda c: with_header(header_of(c)[0], b""), "header says"),
    "longer": (lambda c: c + b"\0", "header says"),
    "a changed byte": (lambda c: c[:-1] + bytes([c[-1] ^ 1]), "its tensors were changed"),
    "a changed token": (
        lambda c: with_header(header_of(c)[0], b"\x05" + header_of(c)[1][1:]),
        "its tensors were changed",
    ),
    "not a token": (
        lambda c: altered(c, lambda _: None, data=b"\xff\xff\xff\x7f" + header_of(c)[1][4:]),
        "not a token",
    ),
    "NaN": (lambda c: with_value(c, np.nan), "value has what is not a number"),
    "infinity": (lambda c: with_value(c, -np.inf), "value has what is not a number"),
    "100 GB": (lambda c: changed_entries(c, claim), "not those of this package"),
    "another shape": (
        lambda c: changed_entries(c, set_entry(KEY, "shape", [16, 2, 2])), "not those of"
    ),
    "no shape": (lambda c: changed_entries(c, set_entry(KEY, "shape", None)), "no shape"),
    "a text for a shape": (lambda c: changed_entries(c, set_entry("tokens", "shape", "12")), "no"),
    "a negative shape": (lambda c: changed_entries(c, set_entry("tokens", "shape", [-1])), "no"),
    "true": (lambda c: changed_entries(c, set_entry("tokens", "shape", [True])), "no shape"),
    "another type": (lambda c: changed_entries(c, set_entry(KEY, "dtype", "F16")), "not those of"),
    "other offsets": (
        lambda c: changed_entries(c, set_entry(KEY, "data_offsets", [0, 4])), "not those of"
    ),
    "another name": (lambda c: changed_entries(c, rename), "not those of"),
    "another tensor": (
        lambda c: changed_entries(c, lambda h: h.__setitem__("x", dict(h[KEY]))), "not those of"
    ),
    "a tensor less": (lambda c: changed_entries(c, lambda h: h.pop(KEY) and None), "not those of"),
    "no tokens": (lambda c: changed_entries(c, lambda h: h.pop("tokens") and None), "no shape"),
    "a tensor that is none": (
        lambda c: changed_entries(c, lambda h: h.__setitem__(KEY, 5)), "no shape"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_a_sentence(
    model: Llama, saved: Path, tmp_path: Path, damage: str
) -> None:
    change, said = DAMAGES[damage]
    file = tmp_path / "a b.session"
    file.write_bytes(change(saved.read_bytes()))
    with pytest.raises(SessionError, match=said) as refused:
        model.restore(file)
    sentence = str(refused.value)
    assert str(file) in sentence and sentence.endswith(".") and "\n" not in sentence
    assert len(sentence) < 500


@settings(max_examples=150)
@given(data=st.data())
def test_a_changed_byte_is_refused_or_changes_nothing(
    model: Llama, saved: Path, data: st.DataObject
) -> None:
    content = bytearray(saved.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        # Half of the places in the header, which is much shorter than the rest.
        last = data.draw(st.sampled_from([3000, len(content) - 1]))
        content[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    file = saved.with_name("changed")
    file.write_bytes(content)
    try:
        found = model.restore(file)
    except SessionError:
        return
    assert found.messages == load_messages(saved)
    assert found._state.tokens.tolist() == load_file(saved)["tokens"].tolist()


def test_a_file_of_100_gb_is_refused_without_reading_it(
    model: Llama, saved: Path, tmp_path: Path
) -> None:
    """A sparse file that is as long as its header claims."""
    file, content = tmp_path / "a", saved.read_bytes()
    file.write_bytes(changed_entries(content, claim))
    os.truncate(file, 10**11)
    started = time.monotonic()
    with pytest.raises(SessionError, match="not those of this package"):
        model.restore(file)
    assert time.monotonic() - started < 5


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no FIFOs in folders")
def test_what_is_not_a_file_is_refused(model: Llama, saved: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    chat = model.conversation()
    for place in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(SessionError, match="not a regular file"):
            model.restore(place)
        with pytest.raises(SessionError, match="not a regular file"):
            chat.save(place)
    with pytest.raises(SessionError, match="cannot be read: No such file"):
        model.restore(tmp_path / "none")
    for place in (tmp_path / "none" / "a", saved / "a"):
        with pytest.raises(SessionError, match="cannot be written"):
            chat.save(place)
    for ask in (chat.save, model.restore):
        with pytest.raises(SessionError, match="null"):
            ask("a\0b")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    chat.save(link)
    assert link.is_symlink() and (tmp_path / "real").is_file()


# Killed, or out of room


def test_a_full_disk_leaves_the_old_file(
    model: Llama, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(shutil.copy(saved, tmp_path / "a"))

    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    chat = talk(model)
    monkeypatch.setattr(np, "ascontiguousarray", fail)
    with pytest.raises(ResourceError, match="disk is full"):
        chat.save(file)
    assert file.read_bytes() == saved.read_bytes()
    assert list(tmp_path.iterdir()) == [file]


KILLED = """
import os, sys, time
import numpy as np
from llama_onnx.runtime.llama.model import Llama
model = Llama.load(sys.argv[1], engine="onnxruntime", threads=1)
chat = model.conversation(max_new_tokens=4)
"".join(chat.say("the fox"))
write, count = np.ascontiguousarray, 0
def slow(part):
    global count
    count += 1
    if count == 4:
        print("half", flush=True)
        time.sleep(60)
    return write(part)
np.ascontiguousarray = slow
chat.save(sys.argv[2])
"""


def test_a_process_that_is_killed_while_it_saves_leaves_the_old_file(
    package_fp32: Path, model: Llama, saved: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(saved, tmp_path / "a"))
    command = [sys.executable, "-c", KILLED, str(package_fp32), str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    assert file.read_bytes() == saved.read_bytes()
    assert len(model.restore(file).messages) == 5


def test_saving_needs_no_copy_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package_fp32: Path
) -> None:
    """What is written is what the engine holds, a part at a time."""
    with open_model(package_fp32) as opened:
        chat = talk(opened)
        held = opened.backend.require_engine().export_prefix(chat._state.tokens)
        assert held is not None
        written: list[Any] = []
        plain = np.ascontiguousarray

        def watch(part: Any) -> Any:
            written.append(part)
            return plain(part)

        monkeypatch.setattr(np, "ascontiguousarray", watch)
        chat.save(tmp_path / "a")
    for part, source in zip(written[1:], held.block.values(), strict=True):
        assert np.shares_memory(part, source)


@pytest.mark.parametrize("precision", ["fp16"])
def test_a_fresh_package_of_the_same_checkpoint_is_the_same_version(
    precision: str, tmp_path: Path
) -> None:
    """What counts are the bytes of the manifest, not where the package is."""
    package = make_package(tmp_path / "first", precision)
    with open_model(package) as model:
        talk(model).save(tmp_path / "a")
    moved = package.rename(tmp_path / "verschoben 日本")
    with open_model(moved) as model:
        back = model.restore(tmp_path / "a")
        assert back.restored is not None and back.restored.positions > 60
