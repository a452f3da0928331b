"""The rows that enter the LLM: text from the embedding table, visual tokens from the vision tower, rotary tables.

Everything lies on the backend's device; the tower runs some pictures at once, so that its activations are bounded.
Knows no text, no film and no reduction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError
from framefusion.runtime.backends.base import Backend, Device
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.host import HOST
from framefusion.runtime.format.bundle_files import place
from framefusion.runtime.format.manifest import EmbeddingRecord, Manifest
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.media.preprocess import normalised_levels
from framefusion.runtime.media.tower_kinds import TowerCall
from framefusion.runtime.media.visual_input import BytePatches, RowMap, Tiles, VisualInput
from framefusion.runtime.text.positions import rope_tables
from framefusion.runtime.text.prompt import FIRST_EXTRA, Prompt

PATCHES_AT_ONCE = 4096  # of the vision graph: bounds its activations, large enough to keep the processor busy


_ROWS_AT_ONCE = 4096  # of the embedding table, on their way to a device
_UPLOADED: WeakKeyDictionary[Device, dict[tuple[Path, type[np.generic]], Buffer]] = WeakKeyDictionary()
_STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}  # numpy has no bfloat16


class Embedding:
    """The embedding table of a bundle: raw rows in a mapped file, of which memory holds the pages that are read.

    Args:
        folder: the bundle.
        record: of the table.

    Raises:
        BundleError: the file is missing or has another size.
    """

    def __init__(self, folder: Path, record: EmbeddingRecord) -> None:
        self._bfloat16 = record.dtype == "bfloat16"
        self._rows = record.rows
        self._extra = len(record.extra)
        path = self._path = folder / record.file
        shape = (record.rows + self._extra, record.width)
        expected = shape[0] * shape[1] * np.dtype(_STORED[record.dtype]).itemsize
        try:
            size = place(folder, record.file).stat().st_size
            if size != expected:
                raise BundleError(f"it has {size} bytes, its rows are {expected}")
            self._table: NDArray[Any] = np.memmap(path, _STORED[record.dtype], mode="r", shape=shape)
        except (OSError, ValueError, BundleError) as error:
            raise BundleError(f"{path} is missing or truncated ({error}): copy it again or rebuild") from None

    def __call__(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[S] -> [S, D]. Ids beyond the table and rows of the tower give zeros; prompt.py says what is below 0."""
        extra = FIRST_EXTRA - token_ids
        places = np.where(token_ids < 0, self._rows + extra, token_ids)
        known = np.where(token_ids < 0, (extra >= 0) & (extra < self._extra), token_ids < self._rows)
        rows = self._table[np.where(known, places, 0)]
        # bfloat16 is the upper half of a float32
        values = (rows.astype(np.uint32) << 16).view(np.float32) if self._bfloat16 else rows.astype(np.float32)
        values[~known] = 0
        return values

    def upload(self, device: Device, float_type: type[np.generic]) -> Buffer | None:
        """All rows on a device, in the type of its rows; None where its memory is short of them, or is the host's.

        They stay as long as the device does. Extra rows are left out: no token that is generated names one.  -> [R, D]
        """
        uploaded = _UPLOADED.setdefault(device, {})
        key = self._path, float_type
        shape = (self._rows, self._table.shape[1])
        if key not in uploaded:
            if not 0 < shape[0] * shape[1] * np.dtype(float_type).itemsize <= device.spare_memory():
                return None
            there = device.empty(shape, float_type)
            for start in range(0, self._rows, _ROWS_AT_ONCE):
                rows = self(np.arange(start, min(start + _ROWS_AT_ONCE, self._rows)))
                device.copy(there[start : start + len(rows)], device.upload(HOST.typed(rows, float_type)))
            uploaded[key] = there
        return uploaded[key]


class Embedder:
    """Prompts to rows; holds no state of a request.

    Args:
        manifest: of the bundle.
        table: its embedding table.
        backend: that its vision graph is bound to.
    """

    def __init__(self, manifest: Manifest, table: Embedding, backend: Backend) -> None:
        self._manifest = manifest
        self._table = table
        self._backend = backend

    def encode_visual(self, visual: VisualInput) -> Buffer:
        """Rows [1+K, n, D] of one video or image: what the prompt shows, then what the first K layers add to it.

        Raises:
            BackendError: the backend refuses or fails.
        """
        vision = self._manifest.vision
        device = self._backend.device
        calls = [vision.settings.call(tiles, vision.head_dim) for tiles in visual.tiles]
        counts = [call.rows * tiles.shape[0] for call, tiles in zip(calls, visual.tiles, strict=True)]
        shape = (1 + vision.deepstack, sum(counts), self._manifest.model.hidden_size)
        rows = device.empty(shape, device.row_type)
        ends = np.cumsum(counts)
        for call, tiles, end, count in zip(calls, visual.tiles, ends, counts, strict=True):
            self._encode(call, tiles, rows, int(end - count))
        return rows if visual.rows is None else self._map_rows(rows, visual.rows)

    def join(self, parts: Sequence[Buffer], mapping: RowMap | None) -> Buffer:
        """Rows of a video whose pictures passed the tower in parts, as `encode_visual` of all gives them.

        Args:
            parts: [1+K, n, D] each, of pictures that are encoded at once (`pictures_at_once`), the last of fewer.
            mapping: `VisualInput.rows`.
        """
        device = self._backend.device
        first = parts[0]
        rows = device.empty((first.shape[0], sum(part.shape[1] for part in parts), first.shape[2]), device.row_type)
        start = 0
        for part in parts:
            for k in range(first.shape[0]):
                device.copy(rows[k][start : start + part.shape[1]], part[k])
            start += part.shape[1]
        return rows if mapping is None else self._map_rows(rows, mapping)

    def embed(self, prompt: Prompt, visual_rows: Sequence[Buffer]) -> TokenRows:
        """Rows of all tokens of a prompt, and their rotary tables.

        Args:
            prompt: of S tokens.
            visual_rows: of its videos and images, in order, each [1+K, n, D].

        Raises:
            BundleError: prompt and tower disagree about the number of visual rows.
        """
        device = self._backend.device
        ids = prompt.token_ids
        places = prompt.row_places
        hidden = device.zeros((ids.size, self._manifest.model.hidden_size), device.row_type)
        added = visual_rows[0].shape[0] - 1 if visual_rows else 0
        deepstack: Buffer | None = device.zeros((added, *hidden.shape), device.row_type) if added else None
        given = sum(rows.shape[1] for rows in visual_rows)
        if given != places.size:
            raise BundleError(
                f"the prompt shows {places.size} rows of the vision tower, it gives {given}: the bundle's rule "
                "for pictures and its tower do not belong together, rebuild it"
            )
        start = 0
        for rows in visual_rows:
            targets = places[start : start + rows.shape[1]]
            start += targets.size
            device.put(hidden, targets, rows[0])
            if deepstack is not None:
                for k in range(added):
                    device.put(deepstack[k], targets, rows[1 + k])
        text = np.delete(np.arange(ids.size), places)
        device.put(hidden, text, device.upload(HOST.typed(self._table(ids[text]), device.row_type)))
        cos, sin = self.rope(prompt.positions)
        cos_rows = device.upload(HOST.typed(cos, device.row_type))
        sin_rows = device.upload(HOST.typed(sin, device.row_type))
        return TokenRows(hidden, cos_rows, sin_rows, np.arange(ids.size), deepstack, device)

    def rope(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin [S, hd/2] of positions [3, S]."""
        model = self._manifest.model
        axes = positions if model.mrope_section else positions[0]
        cos, sin = rope_tables(axes, model.head_dim, model.rope_theta, model.mrope_section, model.mrope_interleaved)
        half = model.head_dim // 2
        return np.ascontiguousarray(cos[:, :half]), np.ascontiguousarray(sin[:, :half])

    def _encode(self, call: TowerCall, tiles: Tiles, rows: Buffer, start_row: int) -> None:
        """Write the rows of pictures of one size from `start_row` on, some pictures at once."""
        vision = self._manifest.vision
        model = self._manifest.model
        device = self._backend.device
        count, patches, _ = tiles.shape
        at_once = pictures_at_once(patches)
        shared = {name: device.upload(array) for name, array in _typed(call.inputs, model.float_type).items()}
        for start in range(0, count, at_once):
            given = self._patches(tiles, start, start + at_once)
            size = len(given) * call.rows
            result = device.empty((1 + vision.deepstack, size, model.hidden_size), model.float_type)
            outputs = {"tokens": result[0]} | ({"deepstack": result[1:]} if vision.deepstack else {})
            inputs = {"patches": device.upload(given), **shared}
            self._backend.bind(vision.graph, inputs, outputs, cache=None).run()
            for index in range(1 + vision.deepstack):
                device.copy(rows[index][start_row : start_row + size], result[index])
            start_row += size

    def _patches(self, tiles: Tiles, start: int, stop: int) -> NDArray[Any]:
        """Some pictures as the tower takes them, [n, P, W]: bytes as they were cut, or floats in the bundle's type.

        Raises:
            BundleError: the tower takes bytes, and the family gives floats, or means other numbers by its bytes.
        """
        patches = tiles.patches
        if self._manifest.vision.input == "uint8":
            rule = self._manifest.preprocessing.rule
            if not isinstance(patches, BytePatches):
                raise BundleError(f"the vision tower takes pictures in bytes, {rule} gives floats: rebuild the bundle")
            if not np.array_equal(patches.table, normalised_levels(self._manifest.preprocessing)):
                raise BundleError(
                    f"the vision tower normalises bytes by image_mean and image_std, {rule} has a table of its own: "
                    "rebuild the bundle with --tower-input float"
                )
            return np.ascontiguousarray(patches.levels[start:stop])
        values = patches.normalised(start, stop) if isinstance(patches, BytePatches) else patches[start:stop]
        return np.ascontiguousarray(values, self._manifest.model.float_type)

    def _map_rows(self, rows: Buffer, mapping: RowMap) -> Buffer:
        """Rows of the prompt from rows of the tower, [1+K, m, D] -> [1+K, n, D]."""
        device = self._backend.device
        index = mapping.index
        weight = mapping.weight
        mapped: Buffer = device.empty((rows.shape[0], len(index), rows.shape[2]), device.row_type)
        for k in range(rows.shape[0]):
            layer = device.take(rows[k], index[:, 0]) if weight is None else device.mix(rows[k], index, weight)
            device.copy(mapped[k], layer[: len(index)])
        return mapped


def pictures_at_once(patches: int) -> int:
    """Pictures of so many patches each that one run of the tower takes."""
    return max(1, PATCHES_AT_ONCE // patches)


def _typed(inputs: Mapping[str, NDArray[Any]], float_type: type[np.floating[Any]]) -> dict[str, NDArray[Any]]:
    """Inputs of a graph with all that is fp32 in the bundle's type."""
    return {
        name: array.astype(float_type, copy=False) if array.dtype == np.float32 else array
        for name, array in inputs.items()
    }
