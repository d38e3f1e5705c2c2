"""Signatures of ONNX operators, read once: onnxscript reads one for every node that it writes."""

from __future__ import annotations

import onnx
import pytest
from onnx_ir.schemas import OpSignature


def remember_signatures(patch: pytest.MonkeyPatch) -> None:
    """Keep what `OpSignature.from_op_schema` makes, by domain, name and version."""
    make, made = OpSignature.from_op_schema, dict[tuple[str, str, int], OpSignature]()

    def from_op_schema(schema: onnx.defs.OpSchema) -> OpSignature:
        key = (schema.domain, schema.name, schema.since_version)
        if key not in made:
            made[key] = make(schema)
        return made[key]

    patch.setattr(OpSignature, "from_op_schema", from_op_schema)
