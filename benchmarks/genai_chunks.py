"""What `chunk_size` does to onnxruntime-genai: time and memory for a long prompt, and its Engine.

    python benchmarks/genai_chunks.py PACKAGE [--prompt-tokens 4000] [--chunk 512]

Each way runs in a process of its own, whose peak memory is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def run(package: str, prompt_tokens: int, chunk: int) -> None:
    """Read a prompt of random tokens and continue it; print what that took."""
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(package)
    if chunk:
        config.overlay(json.dumps({"search": {"chunk_size": chunk}}))
    model = og.Model(config)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=prompt_tokens + 8)
    generator = og.Generator(model, params)
    prompt = np.random.default_rng(0).integers(1000, 30000, prompt_tokens, dtype=np.int32)
    started = time.perf_counter()
    generator.append_tokens(prompt)
    seconds, tokens = time.perf_counter() - started, []
    for _ in range(6):
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    try:
        og.Engine(model)
        engine = "its Engine opens"
    except Exception as error:
        engine = f"its Engine: {str(error).splitlines()[0]}"
    print(f"chunk_size {chunk or '-'}: {seconds:.1f} s, {peak / 1e9:.2f} GB, {tokens}; {engine}")


def main() -> None:
    """Run both ways, or the one that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("package")
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only is not None:
        run(arguments.package, arguments.prompt_tokens, arguments.only)
        return
    for chunk in (0, arguments.chunk):
        command = [sys.executable, __file__, arguments.package, "--only", str(chunk)]
        subprocess.run([*command, "--prompt-tokens", str(arguments.prompt_tokens)], check=True)


if __name__ == "__main__":
    main()
