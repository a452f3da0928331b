"""Plain reads of safetensors: what the package itself reads, and files that are not what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from framefusion.export.checkpoints.tensors.tensor_file import TensorFile, TensorFileError

TENSORS = {
    "matrix": torch.arange(35, dtype=torch.float32).reshape(5, 7),
    "half": torch.linspace(-3, 3, 24).reshape(2, 3, 4).to(torch.float16),
    "brain": torch.linspace(-3, 3, 10).to(torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "flags": torch.tensor([True, False]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "tensors.safetensors", {"format": "pt"})
    return tmp_path / "tensors.safetensors"


@pytest.mark.parametrize("name", TENSORS)
def test_reads_what_was_saved(path: Path, name: str) -> None:
    read = TensorFile(path).read(name)
    assert read.dtype == TENSORS[name].dtype
    assert torch.equal(read, TENSORS[name])


@pytest.mark.parametrize("rows", [slice(1, 3), slice(0, 0), slice(4, 99)])
def test_reads_some_rows(path: Path, rows: slice) -> None:
    assert torch.equal(TensorFile(path).read("matrix", rows), TENSORS["matrix"][rows])


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return damage


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda content: content[:-5], "lies at bytes|end at byte"),
        (lambda content: content + b"more", "end at byte"),
        (lambda content: content[:4], "a header of"),
        (lambda content: (1 << 40).to_bytes(8, "little") + content[8:], "a header of 1099511627776 bytes"),
        (lambda content: content[:8] + b"x" * 20 + content[28:], "not readable"),
        (header(lambda entries: entries["matrix"].update(shape=[5, 8])), r"\(5, 8\) takes 140 bytes"),
        (header(lambda entries: entries["matrix"].pop("dtype")), "not readable"),
        (header(lambda entries: entries["matrix"].update(data_offsets=[0, 1 << 30])), "lies at bytes"),
    ],
)
def test_files_that_are_not_what_they_say(path: Path, damage: Callable[[bytes], bytes], word: str) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TensorFileError, match=word):
        TensorFile(path)


def test_a_file_that_became_shorter(path: Path) -> None:
    opened = TensorFile(path)
    path.write_bytes(path.read_bytes()[: opened.entries["matrix"].begin + 8])
    with pytest.raises(TensorFileError, match="ends after 8 of 140 bytes"):
        opened.read("matrix")
