"""Bundles as a stranger could hand them in: edited manifests, damaged files, graphs and signatures of other bytes.

    python -m tools.attack.bundles --trials 2000 --seed 0

Each trial ends in an error that users get a message for, or in the answer of the bundle that was edited: never in
another answer of a bundle that looks like the one it was, in a traceback, or later than SECONDS. Whoever makes a digest
agree has made another bundle, which may answer something else; what signed the old one does not sign it.

Prints one JSON object; exit code 1 where a trial failed. A trial is known by its seed and number.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from framefusion.console.plain_text import is_harmless
from framefusion.errors import FrameFusionError
from framefusion.export.report import inspection
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest_file import DIGEST, MANIFEST, digest_of, read_manifest
from framefusion.runtime.media.frame_sampling import sample_indices
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.text.prompt import Turn, Visual
from framefusion.runtime.trust.graph_check import check_graph
from framefusion.runtime.trust.origin import Trust
from framefusion.runtime.trust.signatures import SIGNATURES, Signature, message, write_signatures
from tools.attack.alone import run_alone

SECONDS = 120
"""Of one trial; the target of the whole attack."""
MODEL = Path("tests/models/tiny_qwen2_vl")
TURNS = (Turn("user", (Visual.VIDEO, "What happens?")),)
REQUEST = Request(max_new_tokens=4)

Place = tuple[str | int, ...]
Random = np.random.Generator

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 64, 4096, 2**20, 2**24, 2**31 - 1, 2**31, 2**62, -(2**40), 0.0, -0.5, 0.3, 2.5,
    1e-300, 1e300, "", "x", "0", "1", "../x", "/etc/passwd", "a/../../b", "manifest.json", "tokenizer.json", "\x1b[2J",
    "a\u202eb", "x" * 10_000, "float16", "float64", "fixed", "none", "plain", "llava", [], [0], [1, 2], [[]], {},
    ["x"] * 3, {"a": 1},
)  # fmt: skip
TEXTS = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 400, b'"\\ud800"', b"[" * 3000, b"", b"{", b'"', b"nul")
"""What takes a value's place in the text of a manifest."""


# --- Edits of a manifest ----------------------------------------------------------------------------------------------


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Every key and item of a JSON value."""
    items: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


def edit(plain: dict[str, Any], known: list[Place], random: Random) -> dict[str, Any]:
    """One to three edits: a value of another kind, sign or size; a key less, more, or twice."""
    plain = copy.deepcopy(plain)
    for _ in range(int(random.integers(1, 4)) if random.random() < 0.3 else 1):
        at = known[int(random.integers(len(known)))]
        try:
            _edit_at(plain, at, random)
        except (KeyError, IndexError, TypeError):  # an edit before has removed it
            continue
    return plain


def _edit_at(plain: Any, at: Place, random: Random) -> None:
    holder = plain
    for key in at[:-1]:
        holder = holder[key]
    key = at[-1]
    value = holder[at[-1]]
    how = random.random()
    if how < 0.1:
        del holder[key]
    elif how < 0.15 and isinstance(holder, dict):
        holder[f"{key}x"] = value
    elif how < 0.2 and isinstance(holder, list):
        holder.append(value)
    elif how < 0.25 and isinstance(holder, dict):
        holder[str(VALUES[int(random.integers(len(VALUES)))])] = holder.pop(key)
    elif how < 0.55 and isinstance(value, (int, float)) and not isinstance(value, bool):
        holder[key] = _other_number(value, random)
    else:
        holder[key] = copy.deepcopy(VALUES[int(random.integers(len(VALUES)))])


def _other_number(value: float, random: Random) -> Any:
    near = (value + 1, value - 1, -value, value * 2, value // 2, value * 1000, value + 0.5, str(value), [value])
    return near[int(random.integers(len(near)))]


def manifest_text(plain: dict[str, Any], known: list[Place], random: Random) -> tuple[bytes, bool]:
    """An edited manifest.json, and whether its digest agrees, or it is of the layout that had none."""
    kind = random.random()
    if kind < 0.1:  # the text itself
        text = bytearray(json.dumps(plain).encode())
        start = int(random.integers(len(text)))
        text[start : start + int(random.integers(0, 12))] = TEXTS[int(random.integers(len(TEXTS)))]
        return bytes(text), False
    edited = edit({key: value for key, value in plain.items() if key != DIGEST}, known, random)
    if kind < 0.4:
        return json.dumps(edited | {DIGEST: plain[DIGEST]}).encode(), False
    if kind < 0.6 and edited.get("schema_version") == plain["schema_version"]:
        return json.dumps(edited | {"schema_version": 2}).encode(), True
    return json.dumps(edited | {DIGEST: digest_of(edited)}).encode(), True


# --- Trials -----------------------------------------------------------------------------------------------------------


class Target:
    """A sound bundle, a folder of the same files for the trials, and what the sound one answers."""

    def __init__(self, bundle: Path, scratch: Path) -> None:
        self.bundle = bundle
        self.folder = scratch / "edited"
        shutil.copytree(bundle, self.folder)
        self.plain = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
        self.places = [at for at in places(self.plain) if at != (DIGEST,)]
        self.files = sorted(self.plain["files"])
        self.graphs = [name for name in self.files if name.endswith(".onnx")]
        colours = np.random.default_rng(0).integers(0, 256, (8, 84, 112, 3), np.uint8)
        self.film = np.repeat(colours[:1], 8, axis=0)
        self.answer = self.ask(Bundle(bundle))

    def ask(self, bundle: Bundle) -> tuple[int, ...]:
        """The tokens of an answer about a film; what `ff-export inspect` shows is rendered before it."""
        shown = inspection.render(inspection.report(bundle.folder, inspection.PromptSize()))
        assert all(character == "\n" or is_harmless(character) for character in shown)
        sample_indices(75, 30.0, bundle.manifest.sampling)
        backend = OnnxRuntimeBackend(bundle.folder, 1, manifest=bundle.manifest)
        return Pipeline(bundle, backend).generate(TURNS, [self.film], REQUEST).token_ids


def attack_manifest(target: Target, random: Random) -> str:
    """Edit the manifest and ask what the sound bundle was asked."""
    text, sealed = manifest_text(target.plain, target.places, random)
    path = target.folder / MANIFEST
    path.write_bytes(text)
    try:
        answer = target.ask(Bundle(target.folder))
    finally:
        shutil.copyfile(target.bundle / MANIFEST, path)
    if answer == target.answer:
        return "same answer"
    if not sealed:
        raise AssertionError(f"another answer, {answer}, of a manifest that looks like the sound one")
    return "another bundle"


def attack_file(target: Target, random: Random) -> str:
    """Damage a file and leave its times as they were: always refused."""
    name = target.files[int(random.integers(len(target.files)))]
    path = target.folder / name
    how = int(random.integers(6))
    times = path.stat()
    content = bytearray(path.read_bytes())
    path.unlink()
    try:
        if how == 0:
            content[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
            path.write_bytes(content)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        elif how == 1:
            path.write_bytes(content[: int(random.integers(len(content)))])
        elif how == 2:
            path.write_bytes(content + b"x" * int(random.integers(1, 9)))
        elif how == 3:
            path.symlink_to(target.bundle / name)  # the right bytes, outside the folder
        elif how == 4:
            os.mkfifo(path)
        Bundle(target.folder)
    finally:
        if os.path.lexists(path):
            path.unlink()
        shutil.copy2(target.bundle / name, path)
    raise AssertionError(f"{name} was damaged (way {how}) and nothing said so")


def attack_graph(target: Target, random: Random) -> str:
    """Change bytes of a graph and read it as it is read before a runtime opens it."""
    name = target.graphs[int(random.integers(len(target.graphs)))]
    path = target.folder / name
    content = bytearray((target.bundle / name).read_bytes())
    for _ in range(int(random.integers(1, 8))):
        at = int(random.integers(len(content)))
        content[at : at + int(random.integers(0, 3))] = random.bytes(int(random.integers(0, 3)))
    path.write_bytes(content)
    try:
        check_graph(target.folder, name, read_manifest(target.bundle))
    finally:
        shutil.copyfile(target.bundle / name, path)
    return "a graph of listed operators"


def attack_signature(target: Target, random: Random) -> str:
    """Change a signature: the key that is trusted did not make it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(random.bytes(32))
    digest = target.plain[DIGEST]
    public = key.public_key().public_bytes_raw()
    path = target.folder / SIGNATURES
    write_signatures(target.folder, [Signature(public, digest, key.sign(message(digest)))])
    trust = Trust((public,))
    content = bytearray(path.read_bytes())
    try:
        Bundle(target.folder, verify=False, trust=trust)  # the sound one is taken
        at = int(random.integers(len(content)))
        content[at : at + 1] = random.bytes(int(random.integers(0, 3)))
        if json.loads(path.read_bytes()) == _as_json(content):
            return "same answer"
        path.write_bytes(content)
        Bundle(target.folder, verify=False, trust=trust)
    finally:
        path.unlink()
    raise AssertionError(f"a changed signature counts: {bytes(content)!r}")


def _as_json(content: bytearray) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


ATTACKS: dict[str, tuple[Callable[[Target, Random], str], float]] = {
    "manifest": (attack_manifest, 0.7),
    "file": (attack_file, 0.12),
    "graph": (attack_graph, 0.12),
    "signature": (attack_signature, 0.06),
}
"""What is attacked, and its share of the trials."""


# --- The attack -------------------------------------------------------------------------------------------------------


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise where the body takes longer; only the main thread can."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attack(trials: int, seed: int, bundle: Path | None = None) -> dict[str, Any]:
    """Run the trials against a bundle, None builds a small one: how each ended, and those that failed."""
    counts = Counter[str]()
    failed = list[dict[str, Any]]()
    slowest = 0.0
    kinds = {name: kind for name, kind in ATTACKS.items() if name != "signature" or _can_sign()}
    shares = np.array([share for _, share in kinds.values()])
    with tempfile.TemporaryDirectory() as scratch:
        target = Target(bundle or build_target(Path(scratch) / "bundle"), Path(scratch))
        for index in range(trials):
            random = np.random.default_rng((seed, index))
            name = list(kinds)[int(random.choice(len(kinds), p=shares / shares.sum()))]
            start = time.perf_counter()
            try:
                with within(SECONDS):
                    counts[f"{name}: {kinds[name][0](target, random)}"] += 1
            except FrameFusionError as error:
                counts[f"{name}: refused"] += 1
                if not str(error).isprintable():
                    failed.append({"trial": index, "attack": name, "error": f"not printable: {error!r}"})
            except Exception as error:  # any other is what the attack looks for
                failed.append({"trial": index, "attack": name, "error": f"{type(error).__name__}: {error}"[:500]})
            slowest = max(slowest, time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {
        "attack": "bundles", "seed": seed, "trials": trials, **dict(sorted(counts.items())), "failed": failed,
        "slowest_s": round(slowest, 2), "peak_mb": peak,
    }  # fmt: skip


def _can_sign() -> bool:
    try:
        import cryptography  # noqa: F401  is it there?
    except ImportError:
        return False
    return True


def build_target(folder: Path) -> Path:
    """A bundle of the model of this repository."""
    from framefusion.export.build import build
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.options import BuildOptions

    options = BuildOptions(cost=0.4, depth=1, max_input_len=512)
    return build(Checkpoint(MODEL), folder, options, verify=False).folder


if __name__ == "__main__":
    run_alone(__doc__, attack)
