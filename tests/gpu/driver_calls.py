"""How often a device calls each function of the driver: what a step costs beside its own work."""

from __future__ import annotations

from collections import Counter
from typing import Any

from framefusion.runtime.backends.cuda.device import CudaDevice


class Calls(Counter[str]):
    """How often a device calls each function of the driver while this is entered."""

    def __init__(self, device: CudaDevice) -> None:
        super().__init__()
        self._cuda = device.cuda

    def __enter__(self) -> Calls:
        plain = self._cuda.call

        def call(name: str, *arguments: object) -> Any:
            self[name] += 1
            return plain(name, *arguments)

        self._cuda.call = call  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        del self._cuda.call

    @property
    def waits(self) -> int:
        """How often the host waited for the GPU; a GPU without memory pools waits where a buffer is freed, too."""
        return self["cuEventSynchronize"] + self["cuStreamSynchronize"] - self["cuMemFree"]

    @property
    def journeys(self) -> tuple[int, int, int]:
        """Launches, copies to the GPU, copies to the host."""
        return self["cuLaunchKernel"], self["cuMemcpyHtoDAsync"], self["cuMemcpyDtoHAsync"]
