"""OpenVINO with caches in 8 bits: codes in place beside their scales, in turns, in batches, and within their limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("openvino", reason="it is not installed: what this file tests")
pytest.importorskip("torch")  # what draws the clip imports it

from framefusion.errors import BackendError
from framefusion.runtime.backends.choice import choose
from framefusion.runtime.backends.host import host_array
from framefusion.runtime.backends.openvino import backend as module
from framefusion.runtime.backends.openvino.backend import PARAMETERS, WITH_CODES, OpenVinoBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.generation.batching.decode_batch import DecodeBatch
from framefusion.runtime.machine.machine import Machine
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.proof.opening import check_backend
from framefusion.runtime.request import Request, Step, Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual
from tests.families.case import clip
from tests.runtime.backends.openvino.test_openvino import TURNS, endless, reference

pytestmark = pytest.mark.slow
STEPS = 6


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return Bundle(bundle, verify=False)


@pytest.fixture(scope="module")
def ours(opened: Bundle) -> Pipeline:
    return Pipeline(opened, OpenVinoBackend(opened.folder, threads=1, coded_caches=True, manifest=opened.manifest))


def numbers_of(slots: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What codes stand for: (code - zero point) * scale.  [..., 8 + hd] -> [..., hd]"""
    beside = np.ascontiguousarray(slots[..., :PARAMETERS]).view(np.float32)
    numbers: NDArray[np.float32] = (slots[..., PARAMETERS:].astype(np.float32) - beside[..., 1:]) * beside[..., :1]
    return numbers


def test_codes_lie_where_they_are_read_and_stand_for_the_numbers(opened: Bundle, ours: Pipeline) -> None:
    caches = []
    for subject in (ours, reference(opened)):
        prompt, rows = subject.read(TURNS, [clip()])
        caches.append(subject.prefill(prompt, rows, endless(opened, 1.0), Stopwatch()).caches)
    for codes, floats in zip(*caches, strict=True):
        length = int(codes.lengths[0])
        for mine, theirs in zip(codes.keys + codes.values, floats.keys + floats.values, strict=True):
            assert mine.dtype == np.uint8
            found = numbers_of(host_array(mine)[:, :, :length])
            wanted = host_array(theirs)[:, :, :length]
            # a step is a 255th of the range of a token's numbers; what came before is off as well
            assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
            assert np.abs(found - wanted).max() > 1e-5 * np.abs(wanted).max()  # they are codes


def test_it_passes_the_golden_and_is_never_taken_by_itself(bundle: Path) -> None:
    opened = Bundle(bundle)
    option, proof = check_backend(opened, WITH_CODES)
    assert (option.backend, proof.right) == (WITH_CODES, True)
    assert proof.worst.error > 1e-4  # floats differ by less
    without = Machine(None, (), None, bindings=False, openvino="2026.4.1")
    assert choose(opened, machine=without).option.backend == "openvino"


def test_turns_go_on_and_requests_are_decoded_together(opened: Bundle, ours: Pipeline) -> None:
    # 1. what is alone is what is together: rows leave and move as codes
    prompt, rows = ours.read(TURNS, [clip()])

    def answer(cost: float, tokens: int, batch: DecodeBatch | None) -> Iterator[Step]:
        request = replace(endless(opened, cost), max_new_tokens=tokens)
        prefilled = ours.prefill(prompt, rows, request, Stopwatch())
        return ours.decode(prompt, prefilled, request, Stopwatch(), logits=True, batch=batch)

    plans = ((1.0, 3), (0.5, STEPS), (0.3, STEPS))
    alone = [[step.token_id for step in answer(*plan, None) if step.kind == "token"] for plan in plans]
    batch = DecodeBatch(ours.segments)
    running = [answer(*plan, batch) for plan in plans]
    together: list[list[int | None]] = [[] for _ in plans]
    for _ in range(STEPS + 2):
        for steps, found in zip(running, together, strict=True):
            found += [step.token_id for step in (next(steps, None),) if step is not None and step.kind == "token"]
    assert together == alone
    # 2. a second turn, behind caches that have grown, restarts nothing
    session = ours.session()
    request = Request(STEPS, cost=0.5, generation=replace(opened.manifest.generation, eos_token_ids=()))
    for parts, files in (((Visual.VIDEO, "What happens?"), [clip()]), (("And then?",), [])):
        assert [*session.stream([Turn("user", parts)], files, request)]
    assert [record.restart for record in session.records] == [None, None]
    assert session.records[-1].reused_tokens > 0


def test_where_caches_are_copied_there_are_no_codes(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_release(*_: object, in_place: bool, **__: object) -> object:
        raise RuntimeError(f"in place: {in_place}")

    monkeypatch.setattr(module, "read_model", other_release)
    backend = OpenVinoBackend(opened.folder, threads=1, coded_caches=True, manifest=opened.manifest)
    with pytest.raises(BackendError, match="openvino copies caches here, and openvino-int8-kv writes into them"):
        backend.open([opened.manifest.segments[0].prefill])
