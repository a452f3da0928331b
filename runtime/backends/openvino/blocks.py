"""The graphs of building blocks that OpenVINO can run here, each with a backend for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from framefusion.runtime.backends.base import BlockGraph
from framefusion.runtime.backends.openvino.backend import OpenVinoBackend
from framefusion.runtime.backends.table import Device
from framefusion.runtime.machine.machine import Machine


def block_graphs(device: Device, machine: Machine, folder: Path) -> Iterator[BlockGraph]:
    """Of `openvino`: the dialect in the types that are computed in fp32.

    Args:
        device: the CPU.
        machine: this one.
        folder: of the graphs.
    """
    for dtype in ("float32", "float16"):
        yield BlockGraph("gqa", dtype, OpenVinoBackend(folder, dtype))


def block_graphs_in_bf16(device: Device, machine: Machine, folder: Path) -> Iterator[BlockGraph]:
    """Of `openvino-bf16`: the dialect in bf16. Importance is a product, too, and so in bf16; similarity is none."""
    yield BlockGraph("gqa", "bfloat16", OpenVinoBackend(folder, "bfloat16"), importance="bfloat16")


def block_graphs_with_codes(device: Device, machine: Machine, folder: Path) -> Iterator[BlockGraph]:
    """Of `openvino-int8-kv`: as `openvino`, over caches in 8 bits."""
    for dtype in ("float32", "float16"):
        yield BlockGraph("gqa", dtype, OpenVinoBackend(folder, dtype, coded_caches=True), caches="uint8")
