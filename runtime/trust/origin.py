"""Whose bundles run, and whose engines: what a user says and what a signature says.

Everything in a bundle but its engines is data that is checked before it is used. An engine is code: an inductor package
is a shared library that runs with all rights of the process as soon as it is loaded; a TensorRT plan holds GPU kernels,
and NVIDIA's loader, which was not written for hostile files, reads it. So engines run only where one of three holds:
the user says so, a trusted key signed the bundle, or this user compiled these very files on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from framefusion.errors import TrustError
from framefusion.runtime.trust.signatures import fingerprint, read_keys, signer


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
