"""What all rows share: the model, the tokens, the original's probabilities and answers."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.quality import offgrid
from benchmarks.quality.figures import log_softmax
from benchmarks.quality.questions import QUESTIONS
from benchmarks.quality.workspace import LENGTH, ROWS, Workspace
from llama_onnx.exporter.checkpoints.gguf import LAYER_NAMES, GGUFCheckpoint, huggingface_name

EVALUATED = slice(200_000, 260_000)
"""Characters of wiki.utf8, without its tags, whose first tokens every row is measured on."""

CALIBRATION_TEXTS = 16
"""Texts of LENGTH tokens for peers that calibrate on tokens (8,192 of them)."""


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("texts", type=Path, help="the folder with wiki.utf8 and c4.utf8")
    parser.add_argument("work", type=Path)
    parser.add_argument("--imatrix", action="store_true", help="llama.cpp's importance matrix too")
    arguments = parser.parse_args()
    work = Workspace(arguments.work)
    work.root.mkdir(parents=True, exist_ok=True)
    if not work.model_facts.exists():
        _model(arguments.gguf, arguments.texts, work)
    if not work.reference.exists():
        _reference(work)
    if not work.questions.exists():
        _questions(work)
    if arguments.imatrix and not work.imatrix.exists():
        _imatrix(work)


def strip(text: str) -> str:
    """Return `text` without the tags of its documents.

    >>> strip('<doc id="1">Text.</doc>')
    'Text.'
    """
    return re.sub(r"</?doc[^>]*>", "", text)


def _model(gguf: Path, texts: Path, work: Workspace) -> None:
    original = GGUFCheckpoint.open(gguf)
    plain = {
        name: original.tensor(name).rows(0, shape[0])
        for name, shape in original.config.tensor_shapes().items()
        if name in original.tensors
    }
    moved = offgrid.move_off_grid(plain, original.config)
    on_grid = work.root / "on-grid"
    offgrid.write_folder(plain, original, on_grid)
    offgrid.write_folder(moved, original, work.source)
    offgrid.write_gguf(moved, original, work.gguf)
    _tokens(texts, work)
    tokens = np.load(work.tokens)[:1]
    facts: dict[str, Any] = offgrid.largest_difference(on_grid, work.source, tokens)
    facts["parameters"] = sum(value.size for value in moved.values())
    shutil.rmtree(on_grid)
    work.model_facts.write_text(json.dumps(facts), encoding="utf-8")
    print(facts, flush=True)


def _tokens(texts: Path, work: Workspace) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work.source / "tokenizer.json"))
    wiki = strip((texts / "wiki.utf8").read_text("utf-8"))
    ids = tokenizer.encode(wiki[EVALUATED]).ids[: ROWS * LENGTH]
    np.save(work.tokens, np.array(ids, np.int64).reshape(ROWS, LENGTH))
    work.texts.mkdir(exist_ok=True)
    c4 = strip((texts / "c4.utf8").read_text("utf-8"))
    (work.texts / "c4.txt").write_text(c4, encoding="utf-8")
    ids = tokenizer.encode(c4).ids[: CALIBRATION_TEXTS * LENGTH]
    np.save(work.texts / "c4.npy", np.array(ids, np.int64).reshape(-1, LENGTH))


def _load(work: Workspace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(work.source, dtype=torch.float32)
    return model.eval()


def _reference(work: Workspace) -> None:
    import torch

    model, tokens = _load(work), np.load(work.tokens)
    shape = (ROWS, LENGTH, model.config.vocab_size)
    partial = work.reference.with_suffix(".partial.npy")
    stored = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
    with torch.no_grad():
        for row, ids in enumerate(tokens):
            logits = model(torch.from_numpy(ids[None])).logits[0].numpy()
            for start in range(0, LENGTH, 64):
                stored[row, start : start + 64] = log_softmax(logits[start : start + 64])
    stored.flush()
    partial.rename(work.reference)


def _questions(work: Workspace) -> None:
    """Store each question as a prompt's ids, and what the original answers."""
    import torch
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(work.source), _load(work)
    asked = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question.text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        with torch.no_grad():
            full = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False,
                max_new_tokens=question.most_tokens,
            )
        answer = str(tokenizer.decode(full[0, len(ids) :], skip_special_tokens=True))
        entry = {"question": question.text, "ids": ids, "original": answer}
        asked.append(entry | {"counts": question.holds(answer)})
        print(question.text, "->", answer, flush=True)
    end = tokenizer.eos_token_id
    content = {"end": end, "questions": asked}
    work.questions.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _imatrix(work: Workspace) -> None:
    """Store what llama.cpp calls an importance matrix: E[x^2] of each input channel.

    Its own tool adds up the squares of what goes into each matrix and divides by the tokens; so
    does this, on the texts that the other peers are calibrated on.
    """
    import torch

    model, sums = _load(work), dict[str, npt.NDArray[Any]]()
    names = {name: gguf for gguf, name in _matrices(model.config.num_hidden_layers)}

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            squares = inputs[0].double().square().sum(dim=(0, 1)).numpy()
            sums[name] = sums.get(name, 0) + squares

        return hook

    decoder = model.model  # the head needs no importance: llama.cpp's tool leaves it out too
    for name, module in model.named_modules():
        if f"{name}.weight" in names:
            module.register_forward_pre_hook(watch(names[f"{name}.weight"]))
    texts = np.load(work.texts / "c4.npy")
    with torch.no_grad():
        for ids in texts:
            decoder(torch.from_numpy(ids[None]))
    means = {name: (total / texts.size).astype(np.float32) for name, total in sums.items()}
    np.savez(work.imatrix, **means)


def _matrices(layers: int) -> Iterator[tuple[str, str]]:
    for part in LAYER_NAMES:
        if not part.endswith("norm"):
            for layer in range(layers):
                name = f"blk.{layer}.{part}.weight"
                yield name, huggingface_name(name)


if __name__ == "__main__":
    main()
