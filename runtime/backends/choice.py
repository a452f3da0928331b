"""Which backend runs a bundle here: the best of what the bundle holds and this machine can run, or what a user names.

The candidates and their order are the table's. Each says by a function of its own what keeps it from a bundle: engines
that do not fit, a library that is missing, graphs in a type that has no kernels. No library of engines is loaded to
decide, but for the header that TensorRT-RTX reads. Knows no segment and no backend by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from framefusion.errors import BackendError
from framefusion.runtime.backends import table
from framefusion.runtime.backends.base import Backend
from framefusion.runtime.backends.fit import NO_ENGINE, NO_GPU, Problem, is_cpu
from framefusion.runtime.backends.table import BackendKind, Device
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.engine_record import EngineKind
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.machine.machine import Machine
from framefusion.runtime.trust.engines import NOT_VOUCHED, TRUST_ENGINES, distrust, require_vouched

Objection = Callable[["Option"], Problem | None]
"""What speaks against a candidate that could run, and what mends it."""
UNVOUCHED = (NOT_VOUCHED, f"say {TRUST_ENGINES} where you trust the bundle's source, or compile it here")


@dataclass(frozen=True)
class Option:
    """A backend on a kind of device, and what keeps it from running a bundle."""

    backend: str  # name of a row of the table
    device: Device
    problem: str | None = None
    remedy: str | None = None

    @property
    def text(self) -> str:
        """Its name, and the device where the name alone leaves that open."""
        rows = [row for row in table.BACKENDS if row.name == self.backend]
        return self.backend if len(rows) == 1 else f"{self.backend} on {self.device}"


@dataclass(frozen=True)
class Choice:
    """What runs a bundle, and why nothing better does."""

    option: Option
    passed_over: tuple[Option, ...] = ()  # better ones, with their problems
    right_here: bool = False  # the bundle's golden was reproduced on this very device: framefusion.runtime.proof

    @property
    def experimental(self) -> bool:
        """Whether no committed result shows it on a device of its kind."""
        return self.option.device not in table.backend(self.option.backend, self.option.device).results

    @property
    def proven(self) -> bool:
        """Whether a committed result shows it on a device of its kind, and this device has shown it as well."""
        return self.right_here and not self.experimental

    @property
    def ordinary(self) -> bool:
        """Whether nobody needs to hear of it: it is not experimental, and what is better wants a GPU or engines."""
        absent = (NO_ENGINE, NO_GPU[0])
        return not self.experimental and all(option.problem in absent for option in self.passed_over)

    @property
    def text(self) -> str:
        """One line."""
        reasons: dict[str, list[str]] = {}
        for option in self.passed_over:
            reasons.setdefault(option.problem or "", []).append(option.text)
        known = ["experimental"] * self.experimental + ["right on this device"] * self.right_here
        line = f"backend: {self.option.text}" + (f" ({', '.join(known)})" if known else "")
        return "; ".join([line, *(f"not {' or '.join(names)}: {problem}" for problem, names in reasons.items())])

    @property
    def facts(self) -> dict[str, Any]:
        """The same as plain values."""
        passed = [{"backend": o.backend, "device": o.device, "because": o.problem} for o in self.passed_over]
        chosen = {"name": self.option.backend, "device": self.option.device, "experimental": self.experimental}
        chosen |= {"right_here": self.right_here, "proven": self.proven}
        return chosen | {"passed_over": passed}

    def open(self, bundle: Bundle, threads: int = 0) -> Backend:
        """The backend.

        Args:
            bundle: what was chosen for.
            threads: of one operator on the CPU; 0 takes the physical cores it has.

        Raises:
            BackendError: it cannot run after all: too little free memory, say.
        """
        row = table.backend(self.option.backend, self.option.device)
        backend: Backend = table.load(row.open)(bundle, row.name, self.option.device, threads)
        return backend


def choose(
    bundle: Bundle,
    backend: str | None = None,
    device: str | None = None,
    machine: Machine | None = None,
    objection: Objection | None = None,
) -> Choice:
    """The best backend for a bundle.

    Args:
        bundle: read and verified.
        backend: the one to take; None takes the best.
        device: where it is to run; None takes the best.
        machine: None takes this one.
        objection: asked of each candidate that could run, the best first, until it has none.

    Raises:
        BackendError: what a user named, or everything, is impossible; with the reason and what mends it.
        TrustError: engines were named that nobody vouches for.
    """
    # 1. Whoever asks for engines by name hears that nobody vouches for them, and not that something else runs.
    kinds = table.engine_kinds()
    if backend in kinds:
        require_vouched(bundle, backend)
    # 2. Engines that nobody vouches for stay in the list, with that as their problem: nothing of them is read.
    unvouched = [kind for kind in kinds if distrust(bundle, kind) is not None]
    candidates = list(options(bundle, machine or Machine.here(), unvouched))
    # 3. Flags leave candidates out, which are not among those passed over; so are those that would compute in another
    #    type than the bundle's, unless they are named.
    considered = [o for o in candidates if _is_meant(o, backend) and device in (None, o.device)]
    # 4. The table's order is the order of preference: the first that nothing speaks against.
    for index, option in enumerate(considered):
        if option.problem is None and objection is not None:
            problem, remedy = objection(option) or (None, None)
            considered[index] = replace(option, problem=problem, remedy=remedy)
        if considered[index].problem is None:
            return Choice(option, tuple(considered[:index]))
    # 5. Nothing runs: every reason and remedy is said at once, so that one attempt tells what to mend.
    flags = " ".join(f"--{flag} {value}" for flag, value in (("backend", backend), ("device", device)) if value)
    if not considered:
        raise BackendError(f"{flags}: there is no such backend; leave out one of the two")
    reasons = "; ".join(f"{option.text}: {option.problem} ({option.remedy})" for option in considered)
    raise BackendError(f"{flags + ': ' if flags else ''}nothing can run this bundle here. {reasons}")


def options(bundle: Bundle, machine: Machine, unvouched: Collection[EngineKind] = ()) -> Iterator[Option]:
    """All backends, the best first, each with the first thing that speaks against it.

    Args:
        bundle: what is to run; of its files only headers of engines are read.
        machine: where it is to run.
        unvouched: kinds of engines that may not be loaded; not even their headers are read.
    """
    for row in table.BACKENDS:
        problem = UNVOUCHED if row.name in unvouched else table.load(row.problem)(row, bundle, machine)
        yield Option(row.name, _device(row, bundle.manifest, machine), *(problem or ()))


def _is_meant(option: Option, backend: str | None) -> bool:
    """Whether a backend is the one that was named; where none was, whether it may be taken by itself."""
    if backend is None:
        row = table.backend(option.backend, option.device)
        return not (row.computes or row.caches)
    return option.backend == backend


def _device(row: BackendKind, manifest: Manifest, machine: Machine) -> Device:
    """Where a backend would run: its engines where they were compiled for, without any the best device here."""
    if len(row.devices) == 1:
        return row.devices[0]
    engines = [engine for engine in manifest.engines if engine.kind == row.name]
    on_cpu = all(map(is_cpu, engines)) if engines else machine.gpu is None
    return "cpu" if on_cpu else "cuda"
