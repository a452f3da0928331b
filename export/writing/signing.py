"""A signature of a bundle by an ed25519 key, so that a fleet runs only what its CI made.

Keys are those of ssh-keygen and openssl. What is signed, and how it is compared, is in runtime/trust/signatures.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from framefusion.errors import BackendError, BundleError, StorageError, TrustError
from framefusion.installation import install_command
from framefusion.runtime.format.bundle_files import read_small, verify_files
from framefusion.runtime.format.manifest_file import read_manifest_file
from framefusion.runtime.trust.signatures import (
    MOST_SIGNATURES,
    SIGNATURES,
    SIGNING,
    Signature,
    message,
    read_signatures,
    write_signatures,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_KEY_BYTES = 1 << 14


def sign_bundle(folder: Path, key: Path) -> Signature:
    """Sign a bundle; signatures of an earlier manifest, and an earlier one of the same key, go.

    Args:
        folder: the bundle.
        key: file of a private ed25519 key, in OpenSSH's form or in PKCS 8.

    Raises:
        BundleError: a file of the bundle is missing, truncated or altered.
        TrustError: the file holds no such key, or one behind a passphrase.
        BackendError: the cryptography package is not installed.
        StorageError: the signature cannot be written.
    """
    private = _private_key(key)
    manifest, digest, _ = read_manifest_file(folder)
    verify_files(folder, manifest.files, trust_stamps=False)
    public: bytes = private.public_key().public_bytes_raw()
    signature = Signature(public, digest, private.sign(message(digest)))
    earlier = [entry for entry in read_signatures(folder) if entry.digest == digest and entry.key != public]
    if len(earlier) >= MOST_SIGNATURES:
        raise BundleError(
            f"{folder} has {len(earlier)} signatures, the limit is {MOST_SIGNATURES}: remove {SIGNATURES}"
        )
    try:
        write_signatures(folder, [*earlier, signature])
    except OSError as error:
        raise StorageError(f"{folder / SIGNATURES} cannot be written ({error.strerror}): make room") from None
    return signature


def _private_key(path: Path) -> Ed25519PrivateKey:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key
    except ImportError:
        raise BackendError(
            f"bundles are signed by cryptography, which is not installed: {install_command(SIGNING)}"
        ) from None
    try:
        content = read_small(path, _KEY_BYTES)
        load = load_ssh_private_key if b"OPENSSH PRIVATE KEY" in content else load_pem_private_key
        private = load(content, password=None)
    except TypeError:
        raise TrustError(
            f"{path} is behind a passphrase: write a copy without one (ssh-keygen -p -f COPY, or openssl pkey -in "
            f"{path} -out COPY)"
        ) from None
    except (OSError, ValueError, BundleError, UnsupportedAlgorithm) as error:
        reason = str((error.strerror if isinstance(error, OSError) else None) or error)
        if isinstance(error, BundleError):
            reason = f"no regular file of at most {_KEY_BYTES} bytes"
        raise TrustError(
            f"{path} is no private key ({reason}): make one with ssh-keygen -t ed25519 -N '' -f KEY"
        ) from None
    if not isinstance(private, Ed25519PrivateKey):
        raise TrustError(f"{path} is no ed25519 key: make one with ssh-keygen -t ed25519 -N '' -f KEY")
    return private
