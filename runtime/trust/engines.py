"""Whether the engines of a bundle may be loaded: what a user says, a signature says, or this user compiled here.

The reason why engines need more than a hash is in origin.py. Loads none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from framefusion.errors import TrustError
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.bundle_files import verify_files
from framefusion.runtime.format.engine_record import EngineKind
from framefusion.runtime.machine.user_cache import read_private, user_cache, write_private

COMPILED = "compiled"  # folder of the user's cache: a file for each engine that was compiled here, named by its hash
MOST_COMPILED = 1 << 14
TRUST_ENGINES = "--trust-engines"
NOT_VOUCHED = f"its engines are code that nobody vouches for ({TRUST_ENGINES})"


def distrust(bundle: Bundle, kind: EngineKind) -> str | None:
    """Why the engines of a kind may not be loaded; None where somebody vouches for them, or there are none."""
    engines = [engine for engine in bundle.manifest.engines if engine.kind == kind]
    if not engines or bundle.trust.engines or bundle.signed_by is not None:
        return None
    records = [bundle.manifest.files.get(engine.file) for engine in engines]
    if all(record is not None and is_compiled_here(record.sha256) for record in records):
        return None
    return NOT_VOUCHED


def require_vouched(bundle: Bundle, kind: EngineKind) -> None:
    """Refuse to load engines that nobody vouches for, and compare them with their hashes, of which the voucher speaks.

    Raises:
        TrustError: nobody does.
        BundleError: a file is not the one that somebody vouched for.
    """
    reason = distrust(bundle, kind)
    if reason is not None:
        raise TrustError(
            f"{bundle.folder} holds {kind} engines: {reason}. Where you trust its source, say so with that flag, or "
            "name its key with --trusted-keys; else run it with --backend onnxruntime, or compile it here"
        )
    if not bundle.trust.engines and not bundle.verified:
        used = {engine.file for engine in bundle.manifest.engines if engine.kind == kind}
        verify_files(bundle.folder, {name: bundle.manifest.files[name] for name in used})


def remember_compiled(hashes: Iterable[str]) -> None:
    """Note that this user compiled engines of these hashes on this machine; where that cannot be kept, nothing is."""
    for sha256 in hashes:
        path = user_cache(COMPILED) / sha256
        if not path.exists():
            write_private(path, sha256.encode("ascii"), MOST_COMPILED)


def is_compiled_here(sha256: str) -> bool:
    """Whether this user compiled an engine of this hash on this machine."""
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        return False
    return read_private(user_cache(COMPILED) / sha256, 64) == sha256.encode("ascii")
