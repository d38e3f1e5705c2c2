"""The location of every initializer in the external data file, before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from llama_onnx.exporter.graph.model import BuiltModel
from llama_onnx.exporter.graph.slots import Initializer, Slot
from llama_onnx.targets.package import DATA_FILE
from llama_onnx.targets.sizes import next_offset


@dataclass(frozen=True)
class Place:
    """The bytes `[offset, offset + initializer.nbytes)` of the data file."""

    initializer: Initializer
    offset: int

    @property
    def end(self) -> int:
        """First byte after the initializer."""
        return self.offset + self.initializer.nbytes


@dataclass(frozen=True)
class PlacedSlot:
    """A slot with the places of its initializers, in order."""

    slot: Slot
    places: tuple[Place, ...]

    @property
    def end(self) -> int:
        """First byte after the slot."""
        return self.places[-1].end


def lay_out(slots: Sequence[Slot]) -> tuple[PlacedSlot, ...]:
    """Return the slots with their places, in order, each initializer aligned."""
    placed, offset = [], 0
    for slot in slots:
        places = []
        for initializer in slot.initializers():
            place = Place(initializer, next_offset(offset, initializer.nbytes))
            places.append(place)
            offset = place.end
        placed.append(PlacedSlot(slot, tuple(places)))
    return tuple(placed)


def attach(built: BuiltModel, placed: Sequence[PlacedSlot]) -> None:
    """Point the graph's initializers at their places in `DATA_FILE`."""
    places = {place.initializer.name: place for slot in placed for place in slot.places}
    for name, value in built.ir.graph.initializers.items():
        if value.const_value is not None:  # a small constant inside model.onnx
            continue
        place = places[built.aliases.get(name, name)]
        assert value.dtype is not None and value.shape is not None
        value.const_value = ir.ExternalTensor(
            DATA_FILE,
            place.offset,
            place.initializer.nbytes,
            value.dtype,
            shape=value.shape,
            name=name,
            base_dir="",
        )
