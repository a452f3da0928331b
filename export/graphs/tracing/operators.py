"""Operators as the exporter's translations call them, with schemas of ours. Knows no dialect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnxscript.values import Op, Opset

_Schema = onnx.defs.OpSchema


def declare_op(
    opset: Opset, name: str, inputs: Mapping[str, str], outputs: tuple[str, ...], attributes: Mapping[str, Any]
) -> Op:
    """An operator with a schema of ours: contrib operators have none, and optional outputs must not be emitted."""
    types = {
        "T": ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"],
        "M": ["tensor(int32)"],
        "N": ["tensor(int64)"],
        "Q": ["tensor(uint8)"],
        "B": ["tensor(bool)"],
    }
    used = {"T", *inputs.values()}
    schema = _Schema(
        name,
        opset.domain,
        opset.version,
        inputs=[_Schema.FormalParameter(parameter, kind) for parameter, kind in inputs.items()],
        outputs=[_Schema.FormalParameter(output, "T") for output in outputs],
        type_constraints=[(kind, types[kind], "") for kind in sorted(used)],
        attributes=[_Schema.Attribute(attribute, kind, "") for attribute, kind in attributes.items()],
    )
    return Op(opset, name, schema)
