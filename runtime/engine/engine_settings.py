"""What an engine may choose on a machine; most of it does not change a bit of what it computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_onnx.runtime.engine.schedule import CHUNK


@dataclass(frozen=True)
class EngineSettings:
    """How an engine runs a graph on the CPU; the defaults suit most machines.

    Attributes:
        threads: Threads to compute with; None: the physical cores.
        spin: Whether threads spin between two steps, ready for the next, or sleep.
        arena: Whether memory of a step is kept for the next.
        chunk: Most tokens of a prompt to read at once.
        drafts: Whether tokens are drafted, where the caller leaves that open.
        packed: A folder with the same graph and its weights as packed for this processor; they are
            mapped, not copied.
        prompts: A folder with a graph that reads prompts, whose products are in int8: faster, and
            not quite the same.
        tiled_attention: Whether the attention of a prompt is computed in tiles, or all scores at
            once, which takes more memory, and rounds differently.
    """

    threads: int | None = None
    spin: bool = True
    arena: bool = True
    chunk: int = CHUNK
    drafts: bool = True
    packed: Path | None = None
    prompts: Path | None = None
    tiled_attention: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return the settings; `packed` and `prompts` are whether there are such folders."""
        folders = {"packed": self.packed is not None, "prompts": self.prompts is not None}
        return {**asdict(self), **folders}

    def differences(self) -> tuple[str, ...]:
        """Return in words what is not the default.

        >>> EngineSettings(threads=2, chunk=128).differences()
        ('2 threads', 'prompts read in parts of 128 tokens')
        """
        default = EngineSettings()
        found = (
            (self.threads, default.threads, f"{self.threads} thread{'s' * (self.threads != 1)}"),
            (self.spin, default.spin, "threads that sleep between steps"),
            (self.arena, default.arena, "memory given back after each step"),
            (self.chunk, default.chunk, f"prompts read in parts of {self.chunk} tokens"),
            (self.drafts, default.drafts, "no drafts"),
            (self.packed, default.packed, "weights mapped as packed"),
            (self.tiled_attention, True, "attention without tiles"),
            (self.prompts, default.prompts, "prompts read in int8"),
        )
        return tuple(words for value, usual, words in found if value != usual)


DEFAULT = EngineSettings()
