"""What a choice of backend depends on in a machine: its GPU, and which of a few libraries are installed.

As far as it can be known without loading anything but ONNX Runtime, which is installed with this package.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

from framefusion.runtime.machine.gpu import GPU, find_gpu


@dataclass(frozen=True)
class Machine:
    """A machine, this one or one that a test describes.

    Attributes:
        gpu: the first NVIDIA GPU; None where there is none, or no driver.
        providers: of the installed ONNX Runtime.
        onnxruntime: its version; None where it is not installed.
        bindings: cuda-bindings is installed, which buffers on a GPU need.
        openvino: its version; None where it is not installed.
    """

    gpu: GPU | None
    providers: tuple[str, ...]
    onnxruntime: str | None
    bindings: bool
    openvino: str | None = None

    @classmethod
    def here(cls) -> Machine:
        """This machine.

        Raises:
            KeyboardInterrupt: Ctrl-C, also where it came while a library was loaded.
        """
        try:
            import onnxruntime

            providers = tuple(onnxruntime.get_available_providers())
            version = onnxruntime.__version__
        except ImportError as error:
            if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None  # Ctrl-C while it was loaded: nothing is missing
            providers = ()
            version = None
        return cls(find_gpu(), providers, version, _has_bindings(), _version("openvino"))


def _version(distribution: str) -> str | None:
    try:
        return version_of(distribution)
    except PackageNotFoundError:
        return None


def _has_bindings() -> bool:
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:  # nothing of CUDA's packages is there
        return False
