"""Open what drafts tokens for an engine, where its graph can verify them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

from llama_onnx.runtime.engine.cache_layout import CacheLayout
from llama_onnx.runtime.engine.head_rows import choose_rows
from llama_onnx.runtime.engine.schedule import CHUNK
from llama_onnx.runtime.engine.shared_rows import SharedRows
from llama_onnx.runtime.engine.speculation.draft_model import DraftModel
from llama_onnx.runtime.engine.speculation.speculator import Speculator
from llama_onnx.runtime.memory import forgetting_pages
from llama_onnx.runtime.placement.session import open_session
from llama_onnx.runtime.tokenizer.encoder import open_tokenizer
from llama_onnx.targets.engines import SpeculationName
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import DATA_FILE, MODEL_FILE, ModelPackage
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU

log = logging.getLogger("llama_onnx.engine")


@dataclass(frozen=True)
class Speculation:
    """What drafts tokens: "ngram" is the text itself, "auto" as well where the graph can verify
    drafts, and `draft` a package with the same tokens and its own context."""

    name: SpeculationName = "off"
    draft: ModelPackage | None = None
    draft_context: int = 0


@dataclass(frozen=True)
class Verifier:
    """The open graph that is to verify drafts."""

    package: ModelPackage
    layout: CacheLayout
    shares_buffer: bool
    provider: Provider

    def obstacle(self) -> str | None:
        """Return why it cannot verify drafts, None if it can."""
        if self.provider != CPU:
            return (
                f"on {self.provider.name} a step gives one token: only the CPU's can verify several"
            )
        if not self.shares_buffer:
            return (
                f"a cache of the target {self.package.target} cannot be rewound: export it for cpu"
            )
        if not self.layout.all_positions:
            return "its graph computes the last logits only: export it with --logits all"
        return None


@dataclass(frozen=True)
class OpenSpeculator:
    """What drafts, if anything does, and the bytes that each position of a text takes for it."""

    speculator: Speculator | None = None
    position_bytes: int = 0


def open_speculator(
    speculation: Speculation, verifier: Verifier, threads: int | None
) -> OpenSpeculator:
    """Open what `speculation` says.

    Raises `UsageError` where the graph cannot verify what was asked for and for a draft package
    with other tokens, and what opening a package raises.
    """
    if speculation.name == "off":
        if speculation.draft is not None:
            raise UsageError("a draft package has no effect without speculation: leave out one.")
        return OpenSpeculator()
    obstacle = verifier.obstacle()
    if obstacle and speculation.draft is None and speculation.name == "auto":
        log.info("no drafts: %s", obstacle)
        return OpenSpeculator()
    if obstacle:
        raise UsageError(f"{verifier.package.path} cannot verify drafts: {obstacle}.")
    if speculation.draft is None:
        return OpenSpeculator(Speculator(ngrams=True))
    draft, position_bytes = _open_draft(
        speculation.draft, speculation.draft_context, verifier.package, threads
    )
    return OpenSpeculator(Speculator(ngrams=True, draft=draft), position_bytes)


def _open_draft(
    draft: ModelPackage, context_length: int, package: ModelPackage, threads: int | None
) -> tuple[DraftModel, int]:
    check_same_tokens(draft, package)
    with forgetting_pages(draft.path / DATA_FILE):
        opened = open_session(
            draft.path / MODEL_FILE, CPU, threads=threads, spin=False, edit=choose_rows
        )
    if not opened.shares_buffer:
        raise UsageError(
            f"{draft.path} cannot draft: a cache of the target {draft.target} cannot be rewound; "
            "export it for cpu."
        )
    layout = CacheLayout.of(opened.session)
    rows = partial(SharedRows, opened.session, layout, {})
    return DraftModel(rows, layout.vocab_size, context_length, CHUNK), layout.position_bytes


def check_same_tokens(draft: ModelPackage, package: ModelPackage) -> None:
    """Raise `UsageError` unless the two packages have the same tokens with the same ids."""
    for each in (draft, package):
        if not each.has_tokenizer:
            raise UsageError(
                f"{each.path} has no tokenizer: whether a draft has the same tokens cannot be seen."
            )
    ours, theirs = (
        open_tokenizer(each.path).get_vocab(with_added_tokens=True) for each in (package, draft)
    )
    if ours == theirs:
        return
    differing = sum(ours.get(token) != number for token, number in theirs.items())
    raise UsageError(
        f"{draft.path} cannot draft for {package.path}: its tokenizer is another one "
        f"({len(theirs):,} tokens against {len(ours):,}, {differing:,} of them with another id or "
        "none); choose a package of the same family."
    )
