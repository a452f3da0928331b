"""Signing a bundle with an ed25519 key, so that a fleet runs only what its CI made: `ff-export sign`.

Keys are those of ssh-keygen and openssl. What is signed, and how it is compared, is in runtime/trust/signatures.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from framefusion.console import messages as console
from framefusion.errors import BackendError, BundleError, StorageError, TrustError
from framefusion.runtime.format.bundle_files import read_small, verify_files
from framefusion.runtime.format.manifest_file import read_manifest_file
from framefusion.runtime.trust.signatures import (
    MOST_SIGNATURES,
    SIGNATURES,
    SIGNING,
    Signature,
    fingerprint,
    is_valid,
    message,
    read_signatures,
    write_signatures,
)

_KEY_BYTES = 1 << 14


@click.command(name="sign")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--key", required=True, type=click.Path(path_type=Path), help="Private ed25519 key, without a passphrase."
)
@console.json_option
def sign_command(bundle: Path, key: Path) -> None:
    """Sign BUNDLE, all of its files hashed afresh.

    The key is one of ssh-keygen -t ed25519, or of openssl genpkey -algorithm ed25519. ff-run --trusted-keys runs what
    its public part signed.
    """
    signature = sign_bundle(bundle, key)
    report = {"bundle": str(bundle), "digest": signature.digest, "key": fingerprint(signature.key)}
    console.show(report, lambda told: f"{told['bundle']}: manifest {told['digest']}, signed by {told['key']}")


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
    others = [one for one in read_signatures(folder) if one.digest == digest and one.key != public]
    if len(others) >= MOST_SIGNATURES:
        raise BundleError(f"{folder} has {len(others)} signatures, the limit is {MOST_SIGNATURES}: remove {SIGNATURES}")
    try:
        write_signatures(folder, [*others, signature])
    except OSError as error:
        raise StorageError(f"{folder / SIGNATURES} cannot be written ({error.strerror}): make room") from None
    return signature


def _private_key(path: Path) -> Any:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key
    except ImportError:
        raise BackendError(f"bundles are signed by cryptography, which is not installed: {SIGNING}") from None
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


def integrity_facts(folder: Path, trusted: Sequence[bytes] = ()) -> dict[str, Any]:
    """The digest of a manifest and what is known of each signature, as plain values.

    A signature is "valid", "invalid", "of another manifest", or "not compared" where cryptography is not installed.
    """
    _, digest, sealed = read_manifest_file(folder)
    rows = [
        {"key": fingerprint(one.key), "state": _state(one, digest), "trusted": one.key in trusted}
        for one in read_signatures(folder)
    ]
    return {"digest": digest, "sealed": sealed, "signatures": rows}


def _state(signature: Signature, digest: str) -> str:
    if signature.digest != digest:
        return "of another manifest"
    try:
        return "valid" if is_valid(signature) else "invalid"
    except BackendError:
        return f"not compared: {SIGNING}"


def render_integrity(facts: Mapping[str, Any]) -> list[str]:
    """The same as lines."""
    holds = "" if facts["sealed"] else "; the manifest is of an older package and does not hold it"
    lines = [f"manifest: {facts['digest']}{holds}"]
    lines += [
        f"signature: {row['key']}, {row['state']}" + (", trusted" if row["trusted"] else "")
        for row in facts["signatures"]
    ]
    return lines if facts["signatures"] else [*lines, "signature: none"]
