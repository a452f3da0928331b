"""A checkpoint folder, read lazily: config.json, generation and preprocessing files, safetensors in one file or many.

A tensor is read when it is asked for and by nobody else; headers are read once. Knows no family.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from framefusion.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """A folder as `save_pretrained` or a hub snapshot leaves it.

    Raises:
        CheckpointError: the folder, its config.json or its safetensors are missing or unreadable.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"no checkpoint folder at {self.folder}: give a folder with config.json")
        self.config: dict[str, Any] = self.read_json("config.json")
        self._open: dict[Path, Any] = {}

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder that must be there."""
        path = self.folder / name
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, download it again") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not readable JSON ({error}): download it again") from None
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected an object")
        return loaded

    def read_optional_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, or an empty object where there is none."""
        return self.read_json(name) if (self.folder / name).is_file() else {}

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """Tensor name -> file that holds it."""
        if (self.folder / INDEX).is_file():
            weight_map = self.read_json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{self.folder / INDEX} has no weight_map: download it again")
            return {key: self.folder / name for key, name in weight_map.items()}
        path = self.folder / SINGLE
        if not path.is_file():
            raise CheckpointError(f"{self.folder} holds neither {SINGLE} nor {INDEX}: only safetensors are read")
        return dict.fromkeys(self._file(path).keys(), path)

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def tensor(self, key: str, rows: slice | None = None) -> Tensor:
        """The tensor, or only some of its rows, read from disk now."""
        view = self._view(key)
        try:
            return view[rows] if rows is not None else view[:]  # type: ignore[no-any-return]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.files[key]}: cannot read {key} ({error}): download the file again") from None

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._view(key).get_shape())

    def dtype(self, key: str) -> str:
        """Element type as safetensors writes it: F32, F16, BF16."""
        return str(self._view(key).get_dtype())

    def _view(self, key: str) -> Any:
        path = self.files.get(key)
        if path is None:
            near = difflib.get_close_matches(key, self.files, n=3)
            hint = f"; the nearest it has: {', '.join(near)}" if near else ""
            raise CheckpointError(f"{self.folder} has no tensor {key}{hint}: the checkpoint is incomplete")
        handle = self._file(path)
        if key not in handle.keys():  # noqa: SIM118  (not a dict)
            raise CheckpointError(f"{path} has no tensor {key} though the index names it: download the file again")
        return handle.get_slice(key)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing though the index names it: download it again") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is truncated or no safetensors file ({error}): download it") from None
        return self._open[path]
