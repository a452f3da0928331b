"""A checkpoint folder, read lazily: config.json, generation and preprocessing files, safetensors in one file or many.

Some repositories keep each part of the model (`llm`, `vision_tower`, `mm_projector`) in a folder of its own. Such a
checkpoint reads as one: a part's tensor is `part.key`, the name it has where all parts are in one file.

A tensor is read when it is needed and nothing of it is kept; headers are read once. Knows no family.

A tensor's way, each step named in the code:

    1. config.json is read and its values are checked         so that every later step may count with them
    2. the parts with a folder are found                      their tensors get the part's name in front
    3. names -> file: one file, else the shards of the index  the order in which transformers looks
    4. a file's header is read and checked against its size   shapes and types are known without a weight
    5. quantized linear maps become matrices (quantized/)     so that everybody else reads `X.weight`
    6. the bytes of one tensor, or of some of its rows        memory holds what one step of a build needs
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.config_types import check_types
from framefusion.export.checkpoints.files import LFS, check_file, inner_name, is_pointer, present, read_json_file
from framefusion.export.checkpoints.origin.hub import Origin, origin_of, resolve
from framefusion.export.checkpoints.quantized.linear import FloatLinear, GroupedLinear, QuantizedLinear
from framefusion.export.checkpoints.quantized.quantization import Quantization, quantization_of
from framefusion.export.checkpoints.quantized.setting import KEYS
from framefusion.export.checkpoints.tensors.tensor_file import DTYPES, TensorEntry, TensorFile, TensorFileError
from framefusion.export.checkpoints.tensors.weight_formats import INDEX, SINGLE, check_no_adapter, no_weights
from framefusion.export.quantization.float8 import Quantized, WeightFormat

CONFIG = "config.json"
PART = "_cfg"
"""What ends the keys of config.json that name a part: `llm_cfg` is the part `llm`."""


class _TensorLocation(NamedTuple):
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
        if self.folder.is_file():
            raise CheckpointError(f"{self.folder} is a file: give the folder that holds it, config.json and tokenizer")
        if not self.folder.is_dir():
            raise CheckpointError(f"no checkpoint folder at {self.folder}: give a folder with config.json")
        self.origin = origin or origin_of(self.folder)
        if not present(self.folder / CONFIG):
            raise no_weights(self.folder, self.folder, CONFIG)
        # 1. Every later step counts with these values: those of another type end here, with their key.
        self.config: dict[str, Any] = self.read_config(self.folder)
        self._open: dict[Path, TensorFile] = {}

    @classmethod
    def named(cls, name: Path | str, revision: str | None = None) -> Checkpoint:
        """A checkpoint by folder or by id on the hub: see `hub.resolve`."""
        origin = resolve(name, revision)
        return cls(origin.folder, origin)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder that must be there; see `files.read_json_file` for its limits."""
        path = self.folder / name
        if not present(path):
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, download it again")
        return read_json_file(path, self.folder)

    def read_config(self, folder: Path) -> dict[str, Any]:
        """The config.json of the checkpoint or of a part, its values of the types that they must have."""
        config = self.read_json((folder / CONFIG).relative_to(self.folder).as_posix())
        check_types(config, folder / CONFIG)
        return config

    def read_optional_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint (see `find`), or an empty object where there is none."""
        path = self.find(name)
        return {} if path is None else self.read_json(path.relative_to(self.folder).as_posix())

    @cached_property
    def parts(self) -> Mapping[str, Path]:
        """Part of the model -> its folder, for parts that have one; config.json says their names."""
        # 2. A part without a folder of its own lies in the files of the whole: it is no entry here.
        folders: dict[str, Path] = {}
        for key, value in self.config.items():
            if key.endswith(PART):
                # a string is a path, perhaps one of the machine that trained it: its last name is the folder's
                name = key.removesuffix(PART)
                folder_name = Path(value).name if isinstance(value, str) else name
                if inner_name(folder_name) and present(self.folder / folder_name / CONFIG):
                    folders[name] = self.folder / folder_name
        return folders

    def check_readable(self) -> None:
        """Refuse adapters, and quantized weights that are not read or not what config.json says.

        Raises:
            CheckpointError: naming what is wrong.
        """
        check_no_adapter(self.folder, self._stored)
        self.quantization  # noqa: B018  (raises)

    @cached_property
    def quantization(self) -> Quantization | None:
        """What of the checkpoint is quantized; None where nothing is.

        Raises:
            CheckpointError: see `quantization_of`.
        """
        nested = [
            (f"{key} in {CONFIG}", value)
            for key, value in self.config.items()
            if isinstance(value, dict) and key not in KEYS
        ]
        parts = [(f"{part}'s {CONFIG}", self.part_config(part)) for part in self.parts]
        return quantization_of(self.folder, [(CONFIG, self.config), *nested, *parts], self._stored, self)

    def part_config(self, name: str) -> dict[str, Any]:
        """The configuration of a part: its folder's config.json, else the object in config.json; {} without either."""
        if name in self.parts:
            return self.read_config(self.parts[name])
        section = self.config.get(name + PART)
        return section if isinstance(section, dict) else {}

    def find(self, name: str) -> Path | None:
        """A file of the checkpoint: the folder's own, else that of the first part that has one; None without any."""
        paths = (folder / name for folder in (self.folder, *self.parts.values()))
        path = next((path for path in paths if present(path)), None)
        if path is not None:
            check_file(path, self.folder)
        return path

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """Tensor name -> file that holds it; a quantized matrix has the name that it has before it is quantized."""
        return {key: location.file for key, location in self._places.items()}

    @property
    def tensor_files(self) -> set[Path]:
        """All files of tensors."""
        return {location.file for location in self._stored.values()}

    @cached_property
    def _places(self) -> Mapping[str, _TensorLocation]:
        """Tensors as they are read: matrices in place of what stands for them."""
        if self.quantization is None:
            return self._stored
        # 5. What a quantized map is stored as is nobody else's: its matrix takes its place.
        hidden = self.quantization.hidden
        places = {key: location for key, location in self._stored.items() if key not in hidden}
        return places | {key: self._stored[linear.keys[0]] for key, linear in self.quantization.linears.items()}

    @cached_property
    def _stored(self) -> Mapping[str, _TensorLocation]:
        """Tensors as the files have them."""
        if not self.parts or any(present(self.folder / name) for name in (SINGLE, INDEX)):
            return self._places_in(self.folder)
        locations: dict[str, _TensorLocation] = {}
        for part, folder in self.parts.items():
            locations |= {f"{part}.{key}": location for key, location in self._places_in(folder).items()}
        return locations

    def _places_in(self, folder: Path) -> dict[str, _TensorLocation]:
        """Tensors of one folder, by their names in its files."""
        # 3. The single file comes before an index, as transformers has it.
        path = folder / SINGLE
        if present(path):
            return {key: _TensorLocation(path, key) for key in self._file(path).entries}
        if not present(folder / INDEX):
            raise no_weights(folder, self.folder)
        weight_map = self.read_json((folder / INDEX).relative_to(self.folder).as_posix()).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX} has no weight_map: download it again")
        for key, name in weight_map.items():
            if not inner_name(name):
                raise CheckpointError(
                    f"{folder / INDEX} says that {key} is in {name!r:.80}, which is no file of the folder: "
                    "download it again"
                )
        return self._places_of(folder, weight_map)

    def _places_of(self, folder: Path, weight_map: Mapping[str, str]) -> dict[str, _TensorLocation]:
        """Tensors of shards: all that they hold, as transformers loads them, and at least what the index names."""
        places: dict[str, _TensorLocation] = {}
        for name in sorted(set(weight_map.values())):
            for key in self._file(folder / name).entries:
                earlier = places.get(key)
                location = _TensorLocation(folder / name, key)
                if earlier is not None and not self._equal(earlier, location):
                    raise CheckpointError(
                        f"{earlier.file} and {location.file} both hold {key}, with other values: files of two models "
                        "are mixed here, download the checkpoint again"
                    )
                places[key] = location
        # what a shard lacks is missed when it is read, or as a tensor that nobody reads
        return {key: _TensorLocation(folder / name, key) for key, name in weight_map.items()} | places

    def _equal(self, first: _TensorLocation, second: _TensorLocation) -> bool:
        """Whether two tensors on disk are the same, byte by byte."""
        first_file = self._file(first.file)
        second_file = self._file(second.file)
        first_entry = first_file.entries[first.key]
        second_entry = second_file.entries[second.key]
        if (first_entry.dtype, first_entry.shape) != (second_entry.dtype, second_entry.shape):
            return False
        return torch.equal(first_file.raw(first.key), second_file.raw(second.key))

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def count_blocks(self, prefix: str) -> int:
        """How many blocks of a stack are stored: the different numbers behind a prefix such as `model.layers.`."""
        suffixes = [key.removeprefix(prefix) for key in self._places if key.startswith(prefix)]
        return len({suffix.partition(".")[0] for suffix in suffixes})

    def tensor(self, key: str, rows: slice | None = None) -> Tensor:
        """A tensor as it is stored, read from disk now; a quantized matrix in the type that its format computes in.

        Args:
            key: its name, with the part's in front where parts have folders.
            rows: which of its first axis; None takes all.

        Raises:
            CheckpointError: there is no such tensor, its file cannot be read, or its scales are no numbers.
        """
        linear = self._linear(key)
        if linear is not None:
            return linear.read(self, rows)
        self._entry(key)
        return self.read(key, rows)

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """A tensor as a file has it: see `quantized.linear.Stored`."""
        location = self._stored[key]
        try:
            # 6. Read and handed over: the caller alone keeps the tensor alive.
            return self._file(location.file).read(location.key, rows)
        except (TensorFileError, OSError) as error:
            raise CheckpointError(f"{location.file}: cannot read {key} ({error}): download the file again") from None

    def entry(self, key: str) -> TensorEntry | None:
        """Type and shape of a tensor as a file has it: see `quantized.linear.Stored`."""
        location = self._stored.get(key)
        return None if location is None else self._file(location.file).entries.get(location.key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone; CheckpointError where there is none of that name."""
        linear = self._linear(key)
        return self._entry(key).shape if linear is None else linear.shape

    def nbytes(self, key: str) -> int:
        """Bytes of a tensor as `tensor` gives it, from the header alone."""
        linear = self._linear(key)
        if linear is not None:
            return math.prod(linear.shape) * DTYPES[linear.dtype].itemsize
        entry = self._entry(key)
        return entry.end - entry.begin

    def dtype(self, key: str) -> str:
        """Element type as safetensors writes it: F32, F16, BF16."""
        linear = self._linear(key)
        return self._entry(key).dtype if linear is None else linear.dtype

    def is_quantized(self, key: str) -> bool:
        """Whether this is a matrix that other tensors stand for."""
        return self._linear(key) is not None

    def quantized_format(self, key: str) -> WeightFormat | None:
        """How a matrix that kernels can multiply by as it is is stored, from headers alone; None for any other."""
        linear = self._linear(key)
        return linear.form if isinstance(linear, GroupedLinear | FloatLinear) else None

    def quantized_keys(self, key: str) -> tuple[str, ...]:
        """Names of the tensors that are read for it: its own."""
        return (key,)

    def quantized_shape(self, key: str) -> tuple[int, int]:
        """Outputs and inputs of a quantized matrix, from headers alone."""
        outputs, inputs = self.shape(key)
        return outputs, inputs

    def quantized(self, key: str) -> Quantized | None:
        """The codes, scales and zero points of such a matrix, as they are stored; None for any other tensor.

        Raises:
            CheckpointError: they cannot be read, or are no numbers.
        """
        linear = self._linear(key)
        return linear.blocks(self) if isinstance(linear, GroupedLinear | FloatLinear) else None

    def _linear(self, key: str) -> QuantizedLinear | None:
        """The quantized linear map whose matrix has this name."""
        return None if self.quantization is None else self.quantization.linears.get(key)

    def _entry(self, key: str) -> TensorEntry:
        location = self._places.get(key)
        if location is None:
            near = difflib.get_close_matches(key, self._places, n=3)
            hint = f"; the nearest it has: {', '.join(near)}" if near else ""
            raise CheckpointError(f"{self.folder} has no tensor {key}{hint}: the checkpoint is incomplete")
        entry = self.entry(key)
        if entry is None:
            raise CheckpointError(
                f"{location.file} has no tensor {location.key} though the index names it: download the file again"
            )
        return entry

    def _file(self, path: Path) -> TensorFile:
        if path not in self._open:
            if not present(path):
                raise CheckpointError(f"{path} is missing though the index names it: download it again")
            check_file(path, self.folder)
            try:
                # 4. A truncated file is found by its size, before a byte of a tensor is read.
                self._open[path] = TensorFile(path)
            except (TensorFileError, OSError) as error:
                why = LFS if is_pointer(path) else f"is truncated or no safetensors file ({error}): download it"
                raise CheckpointError(f"{path} {why}") from None
        return self._open[path]
