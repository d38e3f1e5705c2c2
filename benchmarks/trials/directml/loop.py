"""onnxruntime-genai's own loop, run by the Windows Python: `loop.py JOB.json OUT.npz`.

A job has `package`, `provider` ("dml", "cpu", or null for what the package says), `capture` ("0" or
"1"), `turns` (lists of token ids), `count` (tokens to generate after each), perhaps `chunk` (tokens
that a prompt is read in at once), and `how` to continue: "new" starts with each turn alone, "whole"
reads all turns and answers again into an empty cache, "append" adds a turn to the cache, "rewind"
goes back to the end of the first turn for the second, and to an empty cache for the third.
Prints one JSON line: the device, the ids of each answer. OUT gets the logits before each token.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og


def main() -> None:
    """Run the job named on the command line."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    model = open_model(job)
    history: list[int] = []
    generator, answers, logits = None, [], []
    room = sum(map(len, job["turns"])) + job["count"] * len(job["turns"])
    for turn in job["turns"]:
        if job["how"] in ("new", "rewind"):
            history = []
        history += turn
        if generator is None or job["how"] in ("new", "whole"):
            generator = start(model, room, job.get("chunk"))
            generator.append_tokens(history)
        elif job["how"] == "rewind" and len(answers) == 1:
            generator.rewind_to(len(turn))
        else:
            if job["how"] == "rewind":
                generator.rewind_to(0)
            generator.append_tokens(turn)
        answer = []
        for _ in range(job["count"]):
            logits.append(np.asarray(generator.get_logits(), np.float32).ravel())
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
        history += answer
        answers.append(answer)
    np.savez(sys.argv[2], logits=np.stack(logits))
    print(json.dumps({"device": str(model.device_type), "answers": answers}), flush=True)


def open_model(job: dict[str, Any]) -> og.Model:
    """Open the package on the job's provider, or on those of its own list if the job has none."""
    config = og.Config(job["package"])
    if job["provider"] is not None:
        config.clear_providers()
    if job["provider"] == "dml":
        config.append_provider("dml")
        config.set_provider_option("dml", "enable_graph_capture", job["capture"])
    return og.Model(config)


def start(model: og.Model, room: int, chunk: int | None) -> og.Generator:
    """Return a greedy generator that does not stop at an end token."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=room, min_length=room, do_sample=False)
    if chunk:
        params.set_search_options(chunk_size=chunk)
    return og.Generator(model, params)


if __name__ == "__main__":
    main()
