"""A graph with its cache bound to it: past and present are one buffer, written in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime import ort
from llama_onnx.runtime.engine.cache_memory import DeviceView
from llama_onnx.runtime.engine.head_rows import LOGITS_FROM, chooses_rows
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.graph_names import ATTENTION_MASK, INPUT_IDS, LOGITS, present_of

Ids = npt.NDArray[np.int64]
Parameters = Mapping[str, npt.NDArray[Any]]
"""Values of a LoRA adapter by graph input; inputs without an entry get rank 0."""

RUNNING = "while running the graph"

_FEW = 32
"""Positions whose logits are written to an array of our own."""


class BoundGraph:
    """Runs an open graph on buffers that are bound to it, on the provider's `device`."""

    def __init__(self, session: ort.Session, adapter: Parameters, device: str = "cpu") -> None:
        self._session, self._device, self._adapter = session, device, adapter
        self._chooses_rows = chooses_rows(session)
        self._first = np.zeros(1, np.int64)
        self._binding: Any = None
        self._values: dict[str, Any] = {}
        self._ids: Ids | None = None  # that are bound
        (entry,) = (o for o in session.get_outputs() if o.name == LOGITS)
        self._logits_type = ort.numpy_dtype(entry.type)
        self._length, self._width = entry.shape[1:]
        self._memory = np.empty(0, self._logits_type)
        self._logits: npt.NDArray[Any] | None = None
        if not isinstance(self._width, int):
            raise PackageError(
                "the graph does not say how wide its logits are: export the package again."
            )

    def bind(self, buffers: Mapping[str, npt.NDArray[Any] | DeviceView]) -> None:
        """Use `buffers` as past and present: in place, but of an array a copy on a device.

        Each is [rows, kv_heads, positions, head_size], contiguous: a view of some rows will do.
        """
        if self._binding is None:
            self._binding = self._session.io_binding()
            # onnxruntime ignores an adapter in the run options of a bound run: it is bound as well.
            for name, array in self._adapter.items():
                self._binding.bind_ortvalue_input(name, self._keep(name, array))
            if self._chooses_rows:
                # On the CPU on every provider, where the graph's Slice reads it.
                first = ort.to_device(self._first, "cpu")
                self._binding.bind_ortvalue_input(LOGITS_FROM, first)
                self._values[LOGITS_FROM] = self._first, first
        for name, buffer in buffers.items():
            if isinstance(buffer, DeviceView):
                self._values[name] = buffer, buffer.owner
                buffer.bind(self._binding.bind_input, name)
                buffer.bind(self._binding.bind_output, present_of(name))
            else:
                value = self._keep(name, buffer)
                self._binding.bind_ortvalue_input(name, value)
                self._binding.bind_ortvalue_output(present_of(name), value)

    def _keep(self, name: str, array: npt.NDArray[Any]) -> Any:
        """Return `array` on the device; a binding does not keep the memory of its values alive."""
        value = ort.to_device(array, self._device)
        self._values[name] = array, value
        return value

    def release(self) -> None:
        """Let go of all buffers: bind others before the next run."""
        self._binding = self._logits = self._ids = None
        self._values.clear()

    def run(
        self, ids: Ids, mask: Ids, options: Any = None, last: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Return logits [B, S, V], or [B, 1, V] of a pruned head, for `ids` [B, S].

        `mask` [B, T] has a one for each position of a row, the new ones included, at its end.
        `last`: how many of the last positions need logits; of the others, there may be none. The
        next run may overwrite the logits. On the CPU, an array that was passed before is not bound
        again: the graph reads what it holds now.
        """
        ids, mask = np.ascontiguousarray(ids), np.ascontiguousarray(mask)  # the same if they are
        positions = ids.shape[1]
        if self._chooses_rows and last is not None:
            positions = min(positions, last)
        self._first[0] = ids.shape[1] - positions  # bound already
        if ids is not self._ids or self._device != "cpu":  # where binding copies
            self._binding.bind_cpu_input(INPUT_IDS, ids)
            self._ids = ids
        self._binding.bind_cpu_input(ATTENTION_MASK, mask)
        if positions <= _FEW:
            self._bind_logits(len(ids), 1 if self._length == 1 else positions)
        else:  # up to 100 MB, which onnxruntime keeps for the next prompt
            self._logits = None
            self._binding.bind_output(LOGITS)
        with ort.running(RUNNING):
            self._session.run_with_iobinding(self._binding, options)
        logits = self._logits
        if logits is None:
            logits = self._binding.get_outputs()[-1].numpy()  # bound after all others
        return logits.astype(np.float32, copy=False)

    def _bind_logits(self, rows: int, positions: int) -> None:
        """Have a step write its logits to an array of our own: to ask the binding for one output
        is to get them all, which takes as long as some operators do."""
        shape = rows, positions, self._width
        if self._logits is None or self._logits.shape != shape:
            size = rows * positions * self._width
            if self._memory.size < size:
                self._memory = np.empty(size, self._logits_type)
            self._logits = self._memory[:size].reshape(shape)
            pointer, kind = self._logits.ctypes.data, self._logits_type
            self._binding.bind_output(LOGITS, "cpu", 0, kind, shape, pointer)
