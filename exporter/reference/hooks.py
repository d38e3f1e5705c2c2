"""Hooks on PyTorch modules, attached for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def attached(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Leave the hooks of `handles` attached until the block ends."""
    known = list(handles)
    try:
        yield
    finally:
        for handle in known:
            handle.remove()
