"""Who signed a bundle: ed25519 signatures of the manifest's digest, in signatures.json, and keys that are trusted.

The digest holds the hash of every file, so a signature speaks for the whole bundle. Keys are as ssh-keygen and openssl
write them: lines of `ssh-ed25519 AAAA... comment`, as in authorized_keys, or PEM blocks of a public key. Only a
comparison of a signature needs the cryptography package; making one is in export/writing/signing.py.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framefusion.errors import BackendError, BundleError, TrustError
from framefusion.installation import install_command
from framefusion.runtime.format.bundle_files import place, read_small
from framefusion.storage.bounded_json import JsonError, parse_json

SIGNATURES = "signatures.json"
SIGNING = "signing"  # the extra of this package
MOST_SIGNATURES = 64
_MOST_BYTES = 1 << 16
_KEY_BYTES = 32
_SIGNATURE_BYTES = 64
_SSH = b"\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x20"  # what precedes the key in OpenSSH's form
_DER = bytes.fromhex("302a300506032b6570032100")  # the same in RFC 8410's
_PEM = re.compile(r"-----BEGIN ([A-Z ]+)-----(.*?)-----END \1-----", re.DOTALL)


@dataclass(frozen=True)
class Signature:
    """One signature as it stands in the file."""

    key: bytes  # ed25519, 32 bytes
    digest: str  # of the manifest that was signed
    value: bytes  # 64 bytes


def message(digest: str) -> bytes:
    """What is signed: no signature of anything else is one of a bundle."""
    return b"framefusion-aot bundle, SHA-256 of its manifest: " + digest.encode("ascii") + b"\n"


def fingerprint(key: bytes) -> str:
    """A key as `ssh-keygen -l` names it."""
    digest = hashlib.sha256(_SSH + key).digest()
    return "SHA256:" + base64.b64encode(digest).decode("ascii").rstrip("=")


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The public keys of a file.

    Raises:
        TrustError: the file cannot be read, or holds no key, or something else.
    """
    try:
        text = read_small(path, _MOST_BYTES).decode("utf-8-sig")  # Windows writes a mark before it
    except (OSError, UnicodeDecodeError, BundleError) as error:
        reason = str((error.strerror if isinstance(error, OSError) else None) or error)
        if isinstance(error, BundleError):
            reason = f"no regular file of at most {_MOST_BYTES} bytes"
        raise TrustError(f"{path} is no file of public keys ({reason}): give one, as ssh-keygen writes it") from None
    keys = [_pem_key(path, kind, body) for kind, body in _PEM.findall(text)]
    lines = [line.strip() for line in _PEM.sub("", text).splitlines()]
    keys += [_ssh_key(path, line) for line in lines if line and not line.startswith("#")]
    if not keys:
        raise TrustError(f"{path} holds no key: add lines of ssh-ed25519, as ssh-keygen -t ed25519 writes them")
    return tuple(dict.fromkeys(keys))


def _ssh_key(path: Path, line: str) -> bytes:
    fields = line.split()  # kind, key, comment
    blob = _decoded(fields[1]) if len(fields) > 1 and fields[0] == "ssh-ed25519" else None
    if blob is None or len(blob) != len(_SSH) + _KEY_BYTES or not blob.startswith(_SSH):
        raise TrustError(
            f"{path} holds the line {ascii(' '.join(fields))[:60]}, which is no ed25519 key: write ssh-ed25519, the "
            "key and a comment"
        )
    return blob[len(_SSH) :]


def _pem_key(path: Path, kind: str, body: str) -> bytes:
    blob = _decoded("".join(body.split())) if kind == "PUBLIC KEY" else None
    if blob is None or len(blob) != len(_DER) + _KEY_BYTES or not blob.startswith(_DER):
        raise TrustError(
            f"{path} holds a PEM block of {kind!r:.40} that is no public ed25519 key: write it by openssl pkey -in "
            "KEY -pubout; never give a private key away"
        )
    return blob[len(_DER) :]


def _decoded(text: Any) -> bytes | None:
    """The bytes of a text in base64, None where it is none or not the one way to write them."""
    try:
        blob = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except (binascii.Error, ValueError):
        return None
    return blob if blob is None or base64.b64encode(blob).decode("ascii") == text else None


def read_signatures(folder: Path) -> tuple[Signature, ...]:
    """The signatures of a bundle, whatever they sign; none where there is no file.

    Raises:
        BundleError: the file is not of this package.
    """
    if not os.path.lexists(folder / SIGNATURES):
        return ()
    path = place(folder, SIGNATURES)
    try:
        content = parse_json(read_small(path, _MOST_BYTES))
        rows = content["signatures"]
        if content.keys() != {"signatures"} or not isinstance(rows, list) or len(rows) > MOST_SIGNATURES:
            raise ValueError("it is no list of signatures")
        return tuple(map(_signature, rows))
    except (OSError, JsonError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is not readable ({error}): copy the bundle again, or sign it again") from None


def _signature(row: Mapping[str, Any]) -> Signature:
    key = _decoded(row["key"])
    value = _decoded(row["signature"])
    digest = row["digest"]
    is_digest = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
    if key is None or len(key) != _KEY_BYTES or value is None or len(value) != _SIGNATURE_BYTES or not is_digest:
        raise ValueError("a signature has no key, digest and signature of ed25519")
    return Signature(key, digest, value)


def write_signatures(folder: Path, signatures: Sequence[Signature]) -> None:
    """Write signatures.json anew, in one step.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    rows = [
        {
            "key": base64.b64encode(signature.key).decode("ascii"),
            "digest": signature.digest,
            "signature": base64.b64encode(signature.value).decode("ascii"),
        }
        for signature in signatures
    ]
    fresh = folder / f".{SIGNATURES}.{secrets.token_hex(8)}"
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w", encoding="utf-8") as file:
            json.dump({"signatures": rows}, file, indent=2)
            file.write("\n")
        os.replace(fresh, folder / SIGNATURES)
    except BaseException:
        with suppress(OSError):
            fresh.unlink()
        raise


def is_valid(signature: Signature) -> bool:
    """Whether the key made the signature of the digest that it names.

    Raises:
        BackendError: the cryptography package is not installed.
    """
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        raise BackendError(
            f"signatures are compared by cryptography, which is not installed: {install_command(SIGNING)}"
        ) from None
    try:
        Ed25519PublicKey.from_public_bytes(signature.key).verify(signature.value, message(signature.digest))
    except (InvalidSignature, ValueError):
        return False
    return True


def signer(folder: Path, digest: str, keys: Sequence[bytes]) -> bytes | None:
    """The first of some keys that signed a manifest of this digest; None where none did.

    Raises:
        BundleError: signatures.json is not readable.
        BackendError: the cryptography package is not installed.
    """
    for signature in read_signatures(folder):
        if signature.key in keys and signature.digest == digest and is_valid(signature):
            return signature.key
    return None
