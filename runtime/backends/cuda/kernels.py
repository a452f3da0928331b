"""kernels.cu: compiled for the GPU at hand, kept on disk, and launched over rows.

NVRTC needs no toolkit and no header. What it compiled is kept in the user's cache folder, by the hash of source,
options and compiler; a file that was cut off or altered is compiled anew. Knows no plan and no policy.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from framefusion.errors import BackendError
from framefusion.installation import install_command
from framefusion.runtime.backends.cuda.array import DeviceArray
from framefusion.runtime.backends.cuda.driver import EXTRA, EXTRA_CUDA_12, Cuda, Handle, cuda_module
from framefusion.runtime.machine.gpu import GPU
from framefusion.runtime.machine.user_cache import user_cache

SOURCE = Path(__file__).with_name("kernels.cu")
OPTIONS = ("--std=c++17",)
OLDEST = (7, 5)  # of the compilers of CUDA 13
WORDS = (16, 4, 2)  # bytes that take and put move at a time, where rows and addresses allow
THREADS = 256
SPAN = 8
WARP = 32  # both as in kernels.cu
READS = 8  # of a thread that copies a row: so many are under way at once
_DIGEST = hashlib.sha256().digest_size

Number = tuple[int, Any]
"""An argument of a kernel that is no array: the value and its C type."""


class Geometry(NamedTuple):
    """Blocks and threads of a launch."""

    grid: tuple[int, int]
    block: tuple[int, int]


def row_geometry(rows: int, steps: int, tables: int = 1, reads: int = 1) -> Geometry:
    """Threads along rows of `steps` reads each, of which a thread does about `reads`; several short rows a block."""
    rounds = max(reads, -(-steps // THREADS))
    along = max(1, min(steps, WARP * -(-steps // (rounds * WARP))))
    across = THREADS // along
    return Geometry((-(-rows // across), tables), (along, across))


def span_geometry(tokens: int) -> Geometry:
    """A warp for the similarity of SPAN tokens."""
    return Geometry((-(-tokens // SPAN), 1), (WARP, 1))


def reach(width: int, itemsize: int, *arrays: DeviceArray) -> int:
    """Bytes that are read at once: 16 where rows and addresses allow, else one element."""
    aligned = all(array.address % 16 == 0 for array in arrays)
    return 16 if aligned and width * itemsize % 16 == 0 else itemsize


class Kernels:
    """The kernels, loaded onto a GPU.

    Args:
        cuda: the GPU.
        stream: of all launches.
        folder: for compiled kernels; None takes the user's cache folder.

    Raises:
        BackendError: no compiler, a GPU that it does not know, or a source that it refuses.
    """

    def __init__(self, cuda: Cuda, stream: Handle, folder: Path | None = None) -> None:
        self._cuda = cuda
        self._stream = stream
        major, minor = map(int, cuda.gpu.capability.split("."))
        if (major, minor) < OLDEST:
            raise BackendError(
                f"{cuda.gpu.name} has compute capability {major}.{minor}, the kernels need {OLDEST[0]}.{OLDEST[1]} or "
                "later: take the backend onnxruntime"
            )
        _require_compiler(cuda.gpu)
        self._image = load_or_compile(major * 10 + minor, folder or cache_folder())
        self._module = cuda.call("cuModuleLoadData", self._image)
        self._functions: dict[str, Handle] = {}

    def launch(self, name: str, geometry: Geometry, *arguments: DeviceArray | Number) -> None:
        """Enqueue a kernel over arrays, which may be dropped afterwards."""
        if name not in self._functions:
            self._functions[name] = self._cuda.call("cuModuleGetFunction", self._module, name.encode())
        values = []
        types = []
        for argument in arguments:
            number = (argument.address, ctypes.c_void_p) if isinstance(argument, DeviceArray) else argument
            values.append(number[0])
            types.append(number[1])
        (grid_x, grid_y), (block_x, block_y) = geometry
        where = (grid_x, grid_y, 1, block_x, block_y, 1, 0, self._stream)
        self._cuda.call("cuLaunchKernel", self._functions[name], *where, (tuple(values), tuple(types)), 0)


def _require_compiler(gpu: GPU) -> None:
    """A driver loads nothing that a compiler of a later CUDA made."""
    major, minor = _nvrtc("nvrtcVersion")
    if major > gpu.cuda[0]:
        raise BackendError(
            f"the compiler nvidia-cuda-nvrtc {major}.{minor} is too new for the driver of {gpu.name}, which goes up to "
            f"CUDA {gpu.cuda[0]}.{gpu.cuda[1]}: update it, or in an environment of its own "
            f"{install_command(EXTRA_CUDA_12)}"
        )


def count(value: int) -> Number:
    """A number of rows or terms."""
    return value, ctypes.c_int


def width(value: int) -> Number:
    """A number of elements."""
    return value, ctypes.c_longlong


NOTHING: Number = (0, ctypes.c_void_p)
"""An array that a kernel is not given."""


def cache_folder() -> Path:
    """$XDG_CACHE_HOME or ~/.cache, and ours in it."""
    return user_cache("kernels")


def load_or_compile(capability: int, folder: Path) -> bytes:
    """The kernels for a compute capability, 87 for 8.7, from the cache or compiled into it.

    A folder that cannot be written only costs the compilation, some seconds, each time.
    """
    source = SOURCE.read_bytes()
    (target, binary) = target_for(capability)
    identity = repr((source, OPTIONS, target, _nvrtc("nvrtcVersion"))).encode()
    path = folder / f"{target}-{hashlib.sha256(identity).hexdigest()[:32]}.bin"
    image = _kept(path)
    if image is None:
        image = compiled(source, target, binary=binary)
        with contextlib.suppress(OSError):
            _keep(path, image)
    return image


def target_for(capability: int) -> tuple[str, bool]:
    """The compiler's --gpu-architecture, and whether it gives machine code.

    A GPU newer than the compiler gets PTX for the newest one below it, which its driver compiles.
    """
    known = [int(number) for number in _nvrtc("nvrtcGetSupportedArchs")]
    if capability in known:
        return f"sm_{capability}", True
    older = [number for number in known if number < capability]
    if not older:
        raise BackendError(
            f"the compiler knows compute capabilities {known}, not {capability}: {install_command(EXTRA, upgrade=True)}"
        )
    return f"compute_{max(older)}", False


def compiled(source: bytes, target: str, *, binary: bool) -> bytes:
    """Compile for "sm_87" (machine code where `binary`) or "compute_87" (PTX).

    Raises:
        BackendError: with the compiler's message.
    """
    program = _nvrtc("nvrtcCreateProgram", source, SOURCE.name.encode(), 0, [], [])
    options = [option.encode() for option in (*OPTIONS, f"--gpu-architecture={target}")]
    nvrtc = cuda_module("nvrtc")
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _nvrtc("nvrtcGetProgramLogSize", program)
        _nvrtc("nvrtcGetProgramLog", program, log)
        message = log.decode(errors="replace").strip("\0 \n")
        raise BackendError(
            f"{SOURCE.name} does not compile for {target}: {install_command(EXTRA, upgrade=True)}\n{message}"
        )
    form = "CUBIN" if binary else "PTX"
    image: bytes = b" " * _nvrtc(f"nvrtcGet{form}Size", program)
    _nvrtc(f"nvrtcGet{form}", program, image)
    _nvrtc("nvrtcDestroyProgram", program)
    return image


def _nvrtc(name: str, *arguments: object) -> Any:
    """Call the compiler."""
    nvrtc = cuda_module("nvrtc")
    try:
        status, *values = getattr(nvrtc, name)(*arguments)
    except RuntimeError as error:  # its library is not there
        reason = " ".join(str(error).split())
        raise BackendError(
            f"the compiler nvidia-cuda-nvrtc cannot be loaded ({reason}): {install_command(EXTRA)}"
        ) from None
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(
            f"{name} failed with {nvrtc.nvrtcResult(status).name}: {install_command(EXTRA, upgrade=True)}"
        )
    return values[0] if len(values) == 1 else tuple(values)


def _kept(path: Path) -> bytes | None:
    """What was kept, None where it is not there or not whole."""
    try:
        digest = (content := path.read_bytes())[:_DIGEST]
        image = content[_DIGEST:]
    except OSError:
        return None
    return image if image and hashlib.sha256(image).digest() == digest else None


def _keep(path: Path, image: bytes) -> None:
    """Write whole or not at all, also where two processes do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(image).digest() + image)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def dimensions(rows: DeviceArray) -> tuple[int, int]:
    """Rows and elements of each, of a contiguous [S, D]."""
    if rows.ndim != 2 or not rows.contiguous:
        raise ValueError(f"{rows!r} is no contiguous array of rows [S, D]")
    return rows.shape[0], rows.shape[1]
