"""A checkpoint folder, read lazily: config.json, generation and preprocessing files, safetensors in one file or many.

Some repositories keep each part of the model (`llm`, `vision_tower`, `mm_projector`) in a folder of its own. Such a
checkpoint reads as one: a part's tensor is `part.key`, the name it has where all parts are in one file.

A tensor is read when it is asked for and nothing of it is kept; headers are read once. Knows no family.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.export.hub import Origin, origin_of, resolve
from framefusion.export.tensor_file import Entry, TensorFile, TensorFileError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PART = "_cfg"
"""What ends the keys of config.json that name a part: `llm_cfg` is the part `llm`."""


class _Place(NamedTuple):
    """A tensor on disk: its file, and its name in there."""

    file: Path
    key: str


class Checkpoint:
    """A folder as `save_pretrained` or a hub snapshot leaves it; `origin` says what it is called elsewhere.

    Raises:
        CheckpointError: the folder, its config.json or its safetensors are missing or unreadable.
    """

    def __init__(self, folder: Path | str, origin: Origin | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"no checkpoint folder at {self.folder}: give a folder with config.json")
        self.origin = origin or origin_of(self.folder)
        self.config: dict[str, Any] = self.read_json(CONFIG)
        self._open: dict[Path, TensorFile] = {}

    @classmethod
    def named(cls, name: Path | str, revision: str | None = None) -> Checkpoint:
        """A checkpoint by folder or by id on the hub: see `hub.resolve`."""
        origin = resolve(name, revision)
        return cls(origin.folder, origin)

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
        """A JSON file of the checkpoint (see `find`), or an empty object where there is none."""
        path = self.find(name)
        return {} if path is None else self.read_json(path.relative_to(self.folder).as_posix())

    @cached_property
    def parts(self) -> Mapping[str, Path]:
        """Part of the model -> its folder, for parts that have one; config.json says their names."""
        found: dict[str, Path] = {}
        for key, value in self.config.items():
            if key.endswith(PART):
                # a string is a path, perhaps one of the machine that trained it: its last name is the folder's
                name = key.removesuffix(PART)
                folder = self.folder / (Path(value).name if isinstance(value, str) else name)
                if (folder / CONFIG).is_file():
                    found[name] = folder
        return found

    def part_config(self, name: str) -> dict[str, Any]:
        """The configuration of a part: its folder's config.json, else the object in config.json; {} without either."""
        if name in self.parts:
            return self.read_json(f"{self.parts[name].name}/{CONFIG}")
        told = self.config.get(name + PART)
        return told if isinstance(told, dict) else {}

    def find(self, name: str) -> Path | None:
        """A file of the checkpoint: the folder's own, else that of the first part that has one; None without any."""
        paths = (folder / name for folder in (self.folder, *self.parts.values()))
        return next((path for path in paths if path.is_file()), None)

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """Tensor name -> file that holds it."""
        return {key: place.file for key, place in self._places.items()}

    @cached_property
    def _places(self) -> Mapping[str, _Place]:
        if not self.parts or any((self.folder / name).is_file() for name in (INDEX, SINGLE)):
            return self._places_in(self.folder)
        parts = ((part, self._places_in(folder)) for part, folder in self.parts.items())
        return {f"{part}.{key}": place for part, places in parts for key, place in places.items()}

    def _places_in(self, folder: Path) -> dict[str, _Place]:
        """Tensors of one folder, by their names in its files."""
        if (folder / INDEX).is_file():
            weight_map = self.read_json((folder / INDEX).relative_to(self.folder).as_posix()).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{folder / INDEX} has no weight_map: download it again")
            return {key: _Place(folder / name, key) for key, name in weight_map.items()}
        path = folder / SINGLE
        if not path.is_file():
            raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}: only safetensors are read")
        return {key: _Place(path, key) for key in self._file(path).entries}

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def count_blocks(self, prefix: str) -> int:
        """Numbers that follow a prefix in the names of tensors: how many blocks of a stack are stored."""
        rests = (key.removeprefix(prefix) for key in self._places if key.startswith(prefix))
        return len({rest.partition(".")[0] for rest in rests})

    def tensor(self, key: str, rows: slice | None = None) -> Tensor:
        """The tensor, or only some of its rows, read from disk now."""
        self._entry(key)
        place = self._places[key]
        try:
            return self._file(place.file).read(place.key, rows)
        except (TensorFileError, OSError) as error:
            raise CheckpointError(f"{place.file}: cannot read {key} ({error}): download the file again") from None

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self._entry(key).shape

    def nbytes(self, key: str) -> int:
        """Bytes of a tensor as it is stored."""
        entry = self._entry(key)
        return entry.end - entry.begin

    def dtype(self, key: str) -> str:
        """Element type as safetensors writes it: F32, F16, BF16."""
        return self._entry(key).dtype

    def _entry(self, key: str) -> Entry:
        place = self._places.get(key)
        if place is None:
            near = difflib.get_close_matches(key, self._places, n=3)
            hint = f"; the nearest it has: {', '.join(near)}" if near else ""
            raise CheckpointError(f"{self.folder} has no tensor {key}{hint}: the checkpoint is incomplete")
        entry = self._file(place.file).entries.get(place.key)
        if entry is None:
            raise CheckpointError(
                f"{place.file} has no tensor {place.key} though the index names it: download the file again"
            )
        return entry

    def _file(self, path: Path) -> TensorFile:
        if path not in self._open:
            try:
                self._open[path] = TensorFile(path)
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing though the index names it: download it again") from None
            except (TensorFileError, OSError) as error:
                raise CheckpointError(f"{path} is truncated or no safetensors file ({error}): download it") from None
        return self._open[path]
