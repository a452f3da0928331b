"""A processor's instructions, from the lists that Linux has of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from framefusion.runtime.machine import cpu


@pytest.mark.parametrize(
    ("line", "products", "has_dot_products"),
    [
        ("flags\t\t: fpu sse2 avx avx2 fma", ("avx2",), False),
        ("flags\t\t: avx2 avx_vnni", ("avx2", "avx_vnni"), True),
        ("flags\t\t: avx2 avx512f avx512_bf16 avx512_vnni", ("avx2", "avx512_bf16", "avx512_vnni", "avx512f"), True),
        ("Features\t: fp asimd asimdhp asimddp", ("asimddp",), True),
        ("Features\t: fp asimd crc32", (), False),
        ("power management:", (), False),
    ],
)
def test_products(
    line: str, products: tuple[str, ...], has_dot_products: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\n{line}\n", encoding="utf-8")
    found = cpu.features(path)
    monkeypatch.setattr(cpu, "features", lambda: found)
    assert (cpu.products(), cpu.has_dot_products()) == (products, has_dot_products)


@pytest.mark.parametrize(
    ("blocks", "cores"),
    [
        (["physical id\t: 0\ncore id\t\t: 0", "physical id\t: 0\ncore id\t\t: 0"], 1),  # two threads of one core
        (["physical id\t: 0\ncore id\t\t: 0", "physical id\t: 1\ncore id\t\t: 0"], 2),  # two sockets
        (["CPU part\t: 0xd0c", "CPU part\t: 0xd0c"], 2),  # ARM tells of none
    ],
)
def test_physical_cores(blocks: list[str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("".join(f"processor\t: {number}\n{block}\n\n" for number, block in enumerate(blocks)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert cpu.physical_cores(path) == cores
    assert cpu.physical_cores(tmp_path / "none") == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1}, raising=False)
    assert cpu.physical_cores(path) == 1
