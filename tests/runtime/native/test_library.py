"""The C library, built for this machine and used through its Python sample.

`nox -s windows` tests it with the DLLs for Windows.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from tokenizers import Tokenizer

from llama_onnx.runtime.llama.model import Llama
from llama_onnx.targets.bundle import write_sums
from tests.support.native import (
    NATIVE,
    SAMPLE,
    compile_library,
    link_libraries,
)
from tests.support.packages import alter_package, greedy

ROOT = Path(__file__).parents[3]
PROMPT = [1, 40, 41, 42]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="built with gcc for Linux's libraries"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
]


@pytest.fixture(scope="module")
def with_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a set for `directml`, and a device for it that is really the CPU."""
    folder = tmp_path_factory.mktemp("device")
    link_libraries(folder / "cpu")
    directml = link_libraries(folder / "directml")
    (directml / "DirectML.dll").symlink_to(directml / "libonnxruntime.so.1")
    flags = ('-DTEST_DEVICE="a test device"', "-DACCELERATOR=NULL", "-DLLAMA_ONNX_BUILD")
    compile_library(NATIVE / "llama_onnx.c", folder / "libllama_onnx.so", *flags)
    return folder


def test_tokens_are_those_of_genai_in_python(model: Any, package: Path) -> None:
    assert model.generate_ids(PROMPT, 40) == greedy(package, PROMPT, 40)


def test_all_libraries_may_be_in_one_folder(
    sample: Any, built: Path, package: Path, tmp_path: Path
) -> None:
    """As in a NuGet package."""
    flat = link_libraries(tmp_path / "native")
    library = Path(shutil.copy(built / "libllama_onnx.so", flat))
    with sample.Model(package, library=library) as opened:
        assert opened.generate_ids(PROMPT, 8) == greedy(package, PROMPT, 8)
    (flat / "libonnxruntime-genai.so").unlink()
    with pytest.raises(RuntimeError, match=r"native/libonnxruntime-genai\.so is missing"):
        sample.Model(package, library=library)


def text_after(package: Path, prompt: Iterable[int], count: int) -> str:
    """Return the greedy continuation of `prompt` as the library `tokenizers` decodes it.

    Half a character at its end, which the C library keeps to itself, and NULs are left out.
    """
    ids = greedy(package, list(prompt), count)
    return (
        Tokenizer.from_file(str(package / "tokenizer.json"))
        .decode(ids)
        .replace("\0", "")
        .rstrip("\ufffd")
    )


def test_a_text_is_continued_with_the_runtimes_tokens(
    model: Any, package: Path, llama: Llama
) -> None:
    prompt = "the quick brown fox 日本"
    expected = text_after(package, llama.encode(prompt), 60)
    assert "".join(model.generate(prompt, 60)).rstrip("\ufffd") == expected


def test_a_chat_has_the_runtimes_tokens(model: Any, package: Path, llama: Llama) -> None:
    messages = [{"role": "user", "content": 'jumps "over"\nthe ä'}]
    expected = text_after(package, llama.encode_chat(messages), 60)
    assert "".join(model.chat(messages, 60)).rstrip("\ufffd") == expected


def test_a_start_token_is_written_where_the_tokenizer_wants_one(
    sample: Any, built: Path, package: Path, tmp_path: Path
) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    altered = alter_package(
        package,
        tmp_path / "bos",
        tokenizer={"post_processor": template},
        tokenizer_config={"add_bos_token": True},
    )
    prompt = Llama.load(altered).encode("the")
    assert prompt[0] == 1
    with sample.Model(altered, library=built / "libllama_onnx.so") as opened:
        answer = "".join(opened.generate("the", 30))
        assert answer.rstrip("\ufffd") == text_after(altered, prompt, 30)
        assert "".join(opened.generate("<s>the", 30)) == answer


def test_the_app_learns_what_runs_and_why(model: Any) -> None:
    assert model.provider == "CPU"
    assert "its libraries are not in" in model.provider_reason


def test_usage_reports_are_off(sample: Any, built: Path, package: Path) -> None:
    code = (
        f"import ctypes, sys; sys.path.insert(0, {str(SAMPLE.parent)!r}); import llama_onnx\n"
        f"llama_onnx.Model({str(package)!r}, library={str(built / 'libllama_onnx.so')!r})\n"
        "getenv = ctypes.CDLL(None).getenv; getenv.restype = ctypes.c_char_p\n"
        "print(getenv(b'ORT_DISABLE_TELEMETRY'))"
    )
    clean = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    for given, expected in (({}, "b'1'"), ({"ORT_DISABLE_TELEMETRY": "0"}, "b'0'")):
        out = subprocess.check_output([sys.executable, "-c", code], text=True, env=clean | given)
        assert out.strip() == expected


def test_cancel_ends_an_answer_and_leaves_the_model_usable(model: Any, package: Path) -> None:
    answer = model.generate("the", 200)
    next(answer)
    threading.Thread(target=model.cancel).start()
    pieces = list(answer)
    assert len(pieces) < 199
    assert model.generate_ids(PROMPT, 40) == greedy(package, PROMPT, 40)


def test_a_callback_can_stop_and_a_second_answer_at_once_is_refused(
    sample: Any, model: Any
) -> None:
    api, seen = model._api, []

    def receive(piece: bytes, user: object) -> int:
        seen.append(api.llama_onnx_generate(model._handle, b"the", 5, None, None))
        return 1

    status = api.llama_onnx_generate(model._handle, b"the", 50, sample._Callback(receive), None)
    assert (status, seen) == (sample.CANCELLED, [sample.BUSY])


def test_cancel_without_an_answer_does_nothing(model: Any) -> None:
    model.cancel()
    assert len(model.generate_ids(PROMPT, 5)) == 5


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 5, "the prompt is empty"),
        ([1] * 256, 5, "the prompt has 256 tokens, but prompt and answer together may have 256"),
        ([1], 0, "must be at least 1"),
    ],
)
def test_an_invalid_call(model: Any, prompt: list[int], count: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        model.generate_ids(prompt, count)
    assert len(model.generate_ids(PROMPT, 5)) == 5


def test_an_answer_ends_with_the_context(model: Any) -> None:
    assert len(model.generate_ids([1] * 250, 100)) == 6


def test_invalid_messages(model: Any) -> None:
    with pytest.raises(RuntimeError, match="the text of the messages is not valid JSON"):
        list(model._stream(model._api.llama_onnx_chat, "not JSON", 5))


def fails(sample: Any, library: Path, package: Path, message: str, **options: Any) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        sample.Model(package, library=library / "libllama_onnx.so", **options)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_a_missing_package(sample: Any, built: Path, tmp_path: Path) -> None:
    fails(sample, built, tmp_path / "日本", "日本 is not a package: it does not exist")


def test_an_unknown_provider(sample: Any, built: Path, package: Path) -> None:
    fails(sample, built, package, "no provider 'cuda': choose auto, cpu or", provider="cuda")


def test_libraries_that_are_missing(
    sample: Any, built: Path, package: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "bin", symlinks=True))
    fails(
        sample, built, package, r"nowhere/cpu/libonnxruntime\.so\.1 is missing", libraries="nowhere"
    )
    (folder / "cpu" / "libonnxruntime-genai.so").unlink()
    fails(sample, folder, package, r"libonnxruntime-genai\.so is missing: restore it")
    (folder / "cpu" / "libonnxruntime-genai.so").write_bytes(b"no library")
    fails(sample, folder, package, r"libonnxruntime-genai\.so cannot be loaded: ")
    (folder / "cpu" / "onnxruntime.version").unlink()
    fails(sample, folder, package, r"onnxruntime\.version is missing")


def test_a_library_of_the_wrong_version(
    sample: Any, built: Path, package: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "bin", symlinks=True))
    (folder / "cpu" / "onnxruntime.version").write_text("1.2.3\n")
    message = rf"is ONNX Runtime {onnxruntime.__version__} instead of 1\.2\.3"
    fails(sample, folder, package, message)


def test_an_onnx_runtime_that_another_part_of_the_program_has_loaded(
    built: Path, package: Path, tmp_path: Path
) -> None:
    flags = ("-Wl,-soname,libonnxruntime.so.1",)
    other = compile_library(
        ROOT / "tests" / "support" / "other_ort.c", tmp_path / "libonnxruntime.so.1", *flags
    )
    code = (
        f"import ctypes, sys; sys.path.insert(0, {str(SAMPLE.parent)!r}); import llama_onnx\n"
        f"ctypes.CDLL({str(other)!r})\n"
        f"llama_onnx.Model({str(package)!r}, library={str(built / 'libllama_onnx.so')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"already loaded another ONNX Runtime, {other}" in done.stderr
    # On the search path only, it does no harm.
    code = code.replace(f"ctypes.CDLL({str(other)!r})", "")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_package_that_is_intact(sample: Any, built: Path, copy: Path) -> None:
    for size in (0, 1, 55, 56, 57, 63, 64, 65, 119, 120, (1 << 20) + 3):
        (copy / f"{size} ä.bin").write_bytes(bytes(i % 251 for i in range(size)))
    write_sums(copy)
    with sample.Model(copy, library=built / "libllama_onnx.so", check_hashes=True) as opened:
        assert len(opened.generate_ids(PROMPT, 3)) == 3


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit(sample: Any, built: Path, copy: Path) -> None:
    flip_a_bit(copy / "model.onnx.data")
    message = r"is damaged: the hash of model\.onnx\.data differs"
    fails(sample, built, copy, message, check_hashes=True)


def test_a_file_that_is_missing(sample: Any, built: Path, copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    fails(sample, built, copy, r"tokenizer\.json is missing", check_hashes=True)


@pytest.mark.parametrize(
    "line", ["", "no hash  model.onnx", "0" * 64 + "  ../x", "0" * 64 + "  /x", "0" * 64 + "  "]
)
def test_invalid_sums(sample: Any, built: Path, copy: Path, line: str) -> None:
    (copy / "SHA256SUMS").write_text(line + "\n")
    message = "has the invalid line" if line else r"SHA256SUMS is empty"
    with pytest.raises(RuntimeError, match=message):
        sample.Model(copy, library=built / "libllama_onnx.so", check_hashes=True)


def test_missing_sums(sample: Any, built: Path, package: Path) -> None:
    fails(sample, built, package, "has no SHA256SUMS", check_hashes=True)


def test_a_damaged_configuration(sample: Any, built: Path, copy: Path) -> None:
    (copy / "genai_config.json").write_text("{")
    fails(sample, built, copy, r"genai_config\.json is not valid JSON")


def test_a_damaged_graph(sample: Any, built: Path, copy: Path) -> None:
    (copy / "model.onnx").write_bytes(b"\0" * 100)
    with pytest.raises(RuntimeError, match=r"model\.onnx is not an ONNX model"):
        sample.Model(copy, library=built / "libllama_onnx.so")


def write_self_test(package: Path, expected: list[int]) -> None:
    lines = (
        f"{name} {' '.join(map(str, ids))}\n"
        for name, ids in (("prompt", PROMPT), ("expected", expected))
    )
    (package / "selftest.txt").write_text("".join(lines))


def test_a_device_is_used_when_it_gives_the_expected_tokens(
    sample: Any, with_device: Path, copy: Path
) -> None:
    write_self_test(copy, greedy(copy, PROMPT, 20))
    with sample.Model(copy, library=with_device / "libllama_onnx.so") as opened:
        assert opened.provider == "DirectML"
        assert opened.provider_reason == (
            "a test device reproduced the tokens of the package's self-test."
        )
        assert opened.generate_ids(PROMPT, 20) == greedy(copy, PROMPT, 20)


def test_a_device_that_gives_other_tokens_is_not_used(
    sample: Any, with_device: Path, copy: Path
) -> None:
    expected = greedy(copy, PROMPT, 20)
    write_self_test(copy, [*expected[:19], expected[19] + 1])
    with sample.Model(copy, library=with_device / "libllama_onnx.so") as opened:
        assert opened.provider == "CPU"
        assert opened.provider_reason == (
            "DirectML is not used: the self-test failed: token 20 of 20 is not the expected one."
        )
        assert opened.generate_ids(PROMPT, 20) == expected
    fails(sample, with_device, copy, "the self-test failed", provider="directml")


def test_a_device_without_a_self_test_is_used_only_on_request(
    sample: Any, with_device: Path, package: Path
) -> None:
    library = with_device / "libllama_onnx.so"
    with sample.Model(package, library=library) as opened:
        assert opened.provider == "CPU"
        assert "has no selftest.txt to test the device with" in opened.provider_reason
    with sample.Model(package, library=library, provider="directml") as opened:
        assert opened.provider == "DirectML"
        assert "no self-test for a test device" in opened.provider_reason


def test_a_machine_without_a_device(sample: Any, built: Path, copy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "bin", symlinks=True))
    shutil.copytree(folder / "cpu", folder / "directml", symlinks=True)
    write_self_test(copy, [1])
    with sample.Model(copy, library=folder / "libllama_onnx.so") as opened:
        assert opened.provider == "CPU"
        assert "no graphics device with Direct3D 12" in opened.provider_reason


def test_the_c_sample_answers(built: Path, copy: Path, tmp_path: Path, llama: Llama) -> None:
    program = tmp_path / "chat"
    source = NATIVE / "samples" / "c" / "main.c"
    flags = ("-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}")
    where = (f"-L{built}", "-lllama_onnx", f"-Wl,-rpath,{built}")
    subprocess.run(["gcc", *flags, str(source), "-o", str(program), *where], check=True)
    one = subprocess.run([program, copy, "the quick"], check=True, capture_output=True)
    answer = text_after(copy, llama.encode("the quick"), 256 - len(llama.encode("the quick")))
    assert one.stdout.decode().removesuffix("\n").rstrip("\ufffd") == answer
    assert one.stderr.startswith(b"Runs on CPU. ")
    talk = subprocess.run(
        [program, copy], check=True, capture_output=True, input='say "ä"\n\n'.encode()
    )
    prompt = llama.encode_chat([{"role": "user", "content": 'say "ä"'}])
    answer = text_after(copy, prompt, 256 - len(prompt))
    said = talk.stdout.decode().removeprefix("> ").removesuffix("\n> ")
    assert said.rstrip("\ufffd") == answer
    flip_a_bit(copy / "model.onnx.data")
    refused = subprocess.run([program, copy, "the quick"], capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (1, "\n")
    assert "is damaged: the hash of model.onnx.data differs from SHA256SUMS" in refused.stderr


def test_the_header_is_c_plus_plus_too(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    source = tmp_path / "main.cpp"
    source.write_text('#include "llama_onnx.h"\nint main() { return LLAMA_ONNX_OK; }\n')
    subprocess.run(
        ["g++", "-Wall", "-Werror", f"-I{NATIVE}", "-c", source, "-o", tmp_path / "o"], check=True
    )


def test_only_the_interface_is_exported(built: Path) -> None:
    library = ctypes.CDLL(str(built / "libllama_onnx.so"))
    assert library.llama_onnx_open
    with pytest.raises(AttributeError):
        _ = library.sha256_block
