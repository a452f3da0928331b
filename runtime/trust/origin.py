"""Whose bundles run, and whose engines: what a user says, what a signature says, and what this user compiled here.

Everything in a bundle but its engines is data that is checked before it is used. An engine is code: an inductor package
is a shared library that runs with all rights of the process as soon as it is loaded; a TensorRT plan holds GPU kernels,
and NVIDIA's loader, which was not written for hostile files, reads it. So engines run only where one of three holds:
the user says so, a trusted key signed the bundle, or this user compiled these very files on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from framefusion.errors import TrustError
from framefusion.runtime.format.bundle_files import verify_files
from framefusion.runtime.machine.user_cache import read_own, user_cache, write_own
from framefusion.runtime.trust.signatures import fingerprint, read_keys, signer

if TYPE_CHECKING:
    from framefusion.runtime.bundle import Bundle
    from framefusion.runtime.format.engine_record import EngineKind

COMPILED = "compiled"  # folder of the user's cache: a file for each engine that was compiled here, named by its hash
MOST_COMPILED = 1 << 14
TRUST_ENGINES = "--trust-engines"
NOT_VOUCHED = f"its engines are code that nobody vouches for ({TRUST_ENGINES})"


@dataclass(frozen=True)
class Trust:
    """What a user trusts.

    Attributes:
        keys: ed25519 public keys; where there is any, a bundle that none of them signed is refused.
        engines: run the engines of any bundle.
    """

    keys: tuple[bytes, ...] = ()
    engines: bool = False

    @classmethod
    def of(cls, keys: Path | None = None, engines: bool = False) -> Trust:
        """From a file of public keys, None for no demand.

        Raises:
            TrustError: the file holds no keys.
        """
        return cls(() if keys is None else read_keys(keys), engines)

    def require_signature(self, folder: Path, digest: str) -> bytes | None:
        """The trusted key that signed a bundle; None where no keys are named, so that nothing is demanded.

        Raises:
            TrustError: none of the keys signed this manifest.
            BackendError: the cryptography package is not installed.
        """
        if not self.keys:
            return None
        key = signer(folder, digest, self.keys)
        if key is None:
            names = ", ".join(map(fingerprint, self.keys[:4])) + (", ..." if len(self.keys) > 4 else "")
            raise TrustError(
                f"{folder} is not signed by a trusted key ({names}): take it from whoever holds one, or sign it with "
                "ff-export sign BUNDLE --key KEY"
            )
        return key


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
            write_own(path, sha256.encode("ascii"), MOST_COMPILED)


def is_compiled_here(sha256: str) -> bool:
    """Whether `remember_compiled` was told of an engine of this hash, by this user."""
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        return False
    return read_own(user_cache(COMPILED) / sha256, 64) == sha256.encode("ascii")
