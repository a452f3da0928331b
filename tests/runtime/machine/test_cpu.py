"""A processor's instructions, from the lists that Linux has of them."""

from __future__ import annotations

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
