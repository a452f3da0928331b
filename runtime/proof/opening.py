"""The best backend that is right here: chosen, opened, proven once on this device, and remembered.

    for each backend that could run the bundle, the best first:
        remembered as right  -> open it
        remembered as wrong  -> refuse it by name, look at the next
        new                  -> open it, prove it, remember that; where it is wrong, look at the next

A bundle without a golden is opened as before there were any, but a backend that was wrong somewhere once
(`BackendKind.wrong_once`) is then never taken by itself. What a user names is proven, too, and refused as an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from framefusion.errors import BackendError, CheckFailedError
from framefusion.runtime.backends import table
from framefusion.runtime.backends.base import Backend
from framefusion.runtime.backends.choice import Choice, Option, choose
from framefusion.runtime.backends.fit import Problem
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.machine.machine import Machine
from framefusion.runtime.proof.golden import NO_GOLDEN, Golden, golden_in, read_golden, require_golden
from framefusion.runtime.proof.prove import Proof, facts_of, prove
from framefusion.runtime.proof.remembered import (
    Combination,
    Verdict,
    combination_of,
    combination_of_blocks,
    recall,
    remember,
)

Say = Callable[[str], object]
_OTHER_LIBRARY = "take another version of its library, or another --backend"


class Opened(NamedTuple):
    """A backend that is ready, and why it was taken."""

    choice: Choice
    backend: Backend


def open_proven(
    bundle: Bundle,
    name: str | None = None,
    device: str | None = None,
    *,
    threads: int = 0,
    check: bool = True,
    say: Say = lambda _: None,
    machine: Machine | None = None,
) -> Opened:
    """Choose, open and prove.

    Args:
        bundle: read and verified.
        name: the backend to take; None takes the best that is right.
        device: where it is to run; None takes the best.
        threads: of one operator on the CPU; 0 takes the physical cores it has.
        check: prove what was not proven here yet. Without, only what is remembered counts.
        say: gets a line where something was proven now.
        machine: None takes this one.

    Raises:
        BackendError: nothing can run the bundle here, or what is named fails; see `choose`.
        CheckFailedError: what can run here, or what is named, answers wrongly.
        BundleError: its golden is damaged.
    """
    judge = _Judge(bundle, machine or Machine.here(), threads, check=check, named=name is not None, say=say)
    try:
        choice = choose(bundle, name, device, judge.machine, judge.objection)
    except BackendError as error:
        if judge.wrong:
            raise CheckFailedError(f"{'; '.join(judge.wrong)}: {_OTHER_LIBRARY}") from error
        raise
    return judge.opened(choice)


def check_backend(
    bundle: Bundle, name: str | None = None, device: str | None = None, *, threads: int = 0, say: Say = lambda _: None
) -> tuple[Option, Proof]:
    """Prove the backend that would be chosen, or the one named, whatever is remembered of it; and remember that.

    Raises:
        BackendError: nothing can run the bundle here, or it fails.
        BundleError: the bundle has no golden, or a damaged one.
    """
    golden = require_golden(bundle)
    machine = Machine.here()
    option = choose(bundle, name, device, machine).option
    combination = combination_of(bundle, option, machine)  # as `open_proven` looks it up, with no library loaded yet
    say(f"{option.text}: running the golden's request")
    proof = prove(bundle, Choice(option).open(bundle, threads), _golden_for(option, golden, bundle))
    _keep(bundle, combination, proof)
    return option, proof


OF_8_BITS = "bfloat16"
"""What has the precision of codes in 8 bits: half a step is 2^-8 of the largest."""


def _golden_for(option: Option, golden: Golden, bundle: Bundle) -> Golden:
    """The golden with the limits of what a backend computes in."""
    row = table.backend(option.backend, option.device)
    computes = row.computes or (OF_8_BITS if row.caches else "")
    return golden_in(golden, computes, bundle.manifest.model.num_layers) if computes else golden


def _keep(bundle: Bundle, combination: Combination, proof: Proof) -> Verdict:
    """Remember a proof; not of files that were not compared with the digest that it would be remembered by."""
    verdict = Verdict(proof.right, proof.text)
    if bundle.verified:
        remember(combination, verdict, facts_of(proof))
    return verdict


class _Judge:
    """Looks at options as they come, and keeps the backend of the one that passed."""

    def __init__(self, bundle: Bundle, machine: Machine, threads: int, *, check: bool, named: bool, say: Say) -> None:
        self.machine = machine
        self.wrong: list[str] = []
        self._bundle = bundle
        self._threads = threads
        self._check = check
        self._named = named
        self._say = say
        self._golden: Golden | None = None
        self._backend: Backend | None = None
        self._verdict: Verdict | None = None

    def objection(self, option: Option) -> Problem | None:
        """What speaks against an option that could run: it is wrong here, or has to be proven and was not."""
        # 1. What is remembered costs a few small files. Blocks are proven with numbers that no golden has, so one that
        #    is wrong counts for more than a golden that passed.
        combination = combination_of(self._bundle, option, self.machine)
        verdict = self._blocks(option) or recall(combination)
        # 2. What is new is proven once, with the backend that will answer if it is right.
        if verdict is None and self._check:
            golden = read_golden(self._bundle)
            if golden is not None and golden.runs:
                backend = Choice(option).open(self._bundle, self._threads)
                try:
                    proof = prove(self._bundle, backend, _golden_for(option, golden, self._bundle))
                except BackendError as error:
                    if self._named:
                        raise
                    return f"it fails on the golden's request ({error})", _OTHER_LIBRARY
                verdict = _keep(self._bundle, combination, proof)
                self._say(f"{option.text} proven on this device, once: {proof.text}, {proof.seconds:.1f} s")
                self._backend = backend if verdict.right else None
        # 3. Judge.
        self._verdict = verdict
        if verdict is None:
            return self._unproven(option)
        if verdict.right:
            return None
        self.wrong.append(f"{option.text} answers wrongly on this device ({verdict.text})")
        return f"it answers wrongly on this device ({verdict.text})", _OTHER_LIBRARY

    def opened(self, choice: Choice) -> Opened:
        """The chosen option, opened, with what is known of it."""
        proven = self._verdict is not None and self._verdict.right
        backend = self._backend or choice.open(self._bundle, self._threads)
        return Opened(replace(choice, right_here=proven), backend)

    def _blocks(self, option: Option) -> Verdict | None:
        """What `ff-run doctor` found wrong in the blocks that the bundle's graphs are made of; None where it did not.

        Blocks that are right say nothing of a bundle: it is proven all the same.
        """
        row = table.backend(option.backend, option.device)
        manifest = self._bundle.manifest
        if not row.blocks:
            return None
        subject = (manifest.dialect, row.computes or manifest.model.dtype, option, self.machine)
        formats = () if manifest.quantization is None else manifest.quantization.formats
        for weights in ("", *dict.fromkeys(f"int{form.bits}" for form in formats if form.kind == "int")):
            verdict = recall(combination_of_blocks(*subject, weights=weights))
            if verdict is not None and not verdict.right:
                return verdict
        return None

    def _unproven(self, option: Option) -> Problem | None:
        known = table.backend(option.backend, option.device).wrong_once
        if self._named or not known:
            return None
        why = NO_GOLDEN if self._check else "--no-check"
        problem = f"it was not proven on this device ({why}) and answered wrongly without an error on {known}"
        return problem, f"name it, at your own risk: --backend {option.backend}"
