"""Change what the C library reads at random, under AddressSanitizer and UBSan.

python -m tests.support.fuzz.native [--minutes 10] [--seed 0]

Needs gcc; exits with status 1 at the first fault.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support import tiny
from tests.support.native import FLAGS, NATIVE

SOURCE = Path(__file__).parents[1] / "native_fuzz.c"
PACKAGE = Path(__file__).parents[1] / "earlier_packages" / "0.1.0-int4"
SESSION = (
    '{"llama_onnx_session": 1, "package": "", "adapter": null, "tokens": [1, 2, 3, 40], "parts": '
    '[{"tokens": 2, "answer": false, "messages": [{"role": "user", "content": "a"}]}, '
    '{"tokens": 4, "answer": true, "messages": [{"role": "assistant", "content": "b"}]}]}'
)
MESSAGES = (
    '[{"role": "system", "content": [{"type": "text", "text": "a"}]}, '
    '{"role": "user", "content": "\\u00e4", "more": [1, {"a": null}]}]'
)
PIECES = (
    '{"added_tokens": [{"id": 300, "content": "<x>", "special": true, "lstrip": true}], '
    '"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, '
    '{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}, "pre_tokenizer": null, '
    '"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>"}}, '
    '{"Sequence": {"id": "A"}}], "special_tokens": {"<x>": {"ids": [300]}}}, "decoder": {"type": '
    '"Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, '
    '{"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, '
    '"stop": 0}]}, "model": {"type": "BPE", "byte_fallback": true, "fuse_unk": true, "unk_token": '
    '"a", "vocab": {%s}, "merges": ["▁ a", ["a", "b"], "▁a b"]}}'
)


def build_fuzzer(folder: Path) -> Path:
    """Build the program of native_fuzz.c with sanitizers."""
    out = folder / "fuzz"
    sanitizers = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    command = ["gcc", *FLAGS[:5], "-Wno-unused-function", *sanitizers, f"-I{NATIVE}", str(SOURCE)]
    subprocess.run([*command, "-o", str(out), "-ldl", "-lpthread", "-lm"], check=True)
    return out


def seeds(folder: Path) -> Iterator[tuple[str, Path]]:
    """Write inputs of each kind; yield who reads them."""
    tiny.write_tokenizer(folder, 288)
    yield "tokenizer", folder / "tokenizer.json"
    tokens = ["▁", "a", "b", "▁a", "ab", "▁ab", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = ", ".join(f'"{token}": {index}' for index, token in enumerate(tokens))
    texts = {
        "tokenizer": PIECES.replace("%s", vocab).replace("300", str(len(tokens))),
        "template": tiny.CHAT_TEMPLATE,
        "messages": MESSAGES,
        "session": SESSION,
    }
    for kind, text in texts.items():
        (folder / kind).write_text(text, "utf-8")
        yield kind, folder / kind
    yield "config", PACKAGE / "genai_config.json"
    yield "graph", PACKAGE / "model.onnx"
    yield "certificate", PACKAGE / "parity" / "reference.safetensors"


def fuzz(folder: Path, seconds: float, seed: int) -> str:
    """Run for `seconds`; return how many inputs were tried. Raises `CalledProcessError`."""
    program = build_fuzzer(folder)
    given = [str(part) for pair in seeds(folder) for part in pair]
    limits = "max_allocation_size_mb=2048:allocator_may_return_null=1:detect_leaks=1"
    done = subprocess.run(
        [program, str(seconds), str(seed), *given],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "ASAN_OPTIONS": limits},
    )
    return done.stdout.strip()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(fuzz(Path(folder), arguments.minutes * 60, arguments.seed))


if __name__ == "__main__":
    main()
