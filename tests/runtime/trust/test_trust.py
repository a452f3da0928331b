"""Whose bundles and engines run: signatures by keys of ssh-keygen and openssl, the user's word, his own compiler."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framefusion import errors
from framefusion.errors import BundleError, FrameFusionError, TrustError
from framefusion.runtime.backends.choice import choose
from framefusion.runtime.backends.inductor.backend import InductorBackend
from framefusion.runtime.backends.tensorrt.backend import TensorRTBackend
from framefusion.runtime.bundle import Bundle, file_record
from framefusion.runtime.format.bundle_files import sha256_of
from framefusion.runtime.format.engine_record import EngineRecord
from framefusion.runtime.format.manifest_file import read_manifest, write_manifest
from framefusion.runtime.machine.user_cache import user_cache
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.text.prompt import Turn, Visual
from framefusion.runtime.trust.engines import COMPILED, distrust, is_compiled_here, remember_compiled
from framefusion.runtime.trust.origin import Trust
from framefusion.runtime.trust.signatures import SIGNATURES, fingerprint, read_keys
from tests.commands import assert_refused, export, run
from tests.runtime.backends.test_choice import CPU_ONLY
from tests.runtime.bundle_edits import copied, edited

signing = pytest.mark.skipif(importlib.util.find_spec("cryptography") is None, reason="needs the extra signing")
keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")
ENGINE = "engines/inductor/rest.pt2"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- Signatures -------------------------------------------------------------------------------------------------------


def by_ssh_keygen(folder: Path) -> tuple[Path, Path]:
    """A private and a public key."""
    key = folder / "ssh"
    subprocess.run(("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "ci", "-f", str(key)), check=True)
    return key, key.with_suffix(".pub")


def in_pem(folder: Path) -> tuple[Path, Path]:
    """The same as openssl writes them."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, private, public = Ed25519PrivateKey.generate(), folder / "key.pem", folder / "key.pub.pem"
    plain = form.NoEncryption()
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@signing
@pytest.mark.parametrize("make", [in_pem, pytest.param(by_ssh_keygen, marks=keygen)])
def test_a_fleet_runs_what_its_key_signed_and_nothing_else(
    bundle: Path, tmp_path: Path, make: Callable[[Path], tuple[Path, Path]]
) -> None:
    private, public = make(tmp_path)
    signed = copied(bundle, tmp_path / "signed")
    arguments = ("--prompt", "What?", "--max-new-tokens", 2, "--trusted-keys", public)
    assert_refused(run("generate", signed, *arguments), TrustError, "is not signed by a trusted key", "ff-export sign")
    report = json.loads(export("sign", signed, "--key", private, "--json").stdout)
    assert report["digest"] == Bundle(signed).digest
    assert report["key"] == fingerprint(*read_keys(public))
    answer = run("generate", signed, *arguments)
    assert answer.exit_code == 0, answer.output
    assert answer.stdout == run("generate", bundle, *arguments[:4]).stdout
    (row,) = json.loads(export("check", signed, "--trusted-keys", public, "--json").stdout)["integrity"]["signatures"]
    assert row == {"key": report["key"], "state": "valid", "trusted": True}
    assert f"signature: {report['key']}, valid" in export("inspect", signed).stdout

    edited(signed, lambda plain: plain["model"].update(rope_theta=9.0))  # and the digest with it
    assert_refused(run("generate", signed, *arguments), TrustError, "is not signed")
    assert "of another manifest" in export("inspect", signed).stdout


@signing
def test_a_signature_speaks_of_every_byte(bundle: Path, tmp_path: Path) -> None:
    private, public = in_pem(tmp_path)
    signed = copied(bundle, tmp_path / "signed")
    assert export("sign", signed, "--key", private).exit_code == 0
    weights = signed / "segments/rest/weights.bin"
    content = bytearray(weights.read_bytes())
    content[7] ^= 1
    weights.write_bytes(content)
    for flags in ((), ("--no-verify",)):
        result = run("generate", signed, "--prompt", "What?", "--trusted-keys", public, *flags)
        assert_refused(result, BundleError, "weights.bin is altered")
    assert_refused(export("sign", signed, "--key", private), BundleError, "weights.bin is altered")


@signing
def test_signatures_that_are_none(bundle: Path, tmp_path: Path) -> None:
    """Of another key, of other bytes, and files that are no signatures."""
    ours, theirs = in_pem(tmp_path), in_pem(copied(tmp_path, tmp_path.with_name(tmp_path.name + "-other")))
    signed = copied(bundle, tmp_path / "signed")
    assert export("sign", signed, "--key", theirs[0]).exit_code == 0
    trust = Trust.of(ours[1])
    with pytest.raises(TrustError, match="not signed"):
        Bundle(signed, trust=trust)
    stored: dict[str, Any] = json.loads((signed / SIGNATURES).read_text())
    key = json.loads(export("sign", copied(bundle, tmp_path / "second"), "--key", ours[0], "--json").stdout)
    second: dict[str, Any] = json.loads((tmp_path / "second" / SIGNATURES).read_text())
    forged = stored["signatures"][0] | {"key": second["signatures"][0]["key"]}  # our key over their signature
    (signed / SIGNATURES).write_text(json.dumps({"signatures": [forged]}))
    with pytest.raises(TrustError, match="not signed"):
        Bundle(signed, trust=trust)
    assert f"{key['key']}, invalid" in export("inspect", signed).stdout
    for content in ("", "[]", "{}", '{"signatures": 5}', '{"signatures": [5]}', '{"signatures": [{"key": "AA"}]}'):
        (signed / SIGNATURES).write_text(content)
        with pytest.raises(BundleError, match=r"signatures\.json is not readable"):
            Bundle(signed, trust=trust)


def test_files_that_are_no_keys(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    rsa = "-----BEGIN RSA PRIVATE KEY-----\nAAAA\n-----END RSA PRIVATE KEY-----\n"
    for content, phrase in (
        (None, "no file of public keys"),
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("ssh-rsa AAAA me\n", "no ed25519 key"),
        ("ssh-ed25519 AAAA me\n", "no ed25519 key"),
        (rsa, "no public ed25519 key"),
        ("x" * 100_000, "no regular file of at most 65536 bytes"),
    ):
        if content is not None:
            path.write_text(content)
        assert_refused(run("generate", bundle, "--prompt", "?", "--trusted-keys", path), TrustError, phrase)


def test_a_folder_of_keys_and_a_file_that_windows_wrote(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="no regular file") as refused:
        Trust.of(tmp_path)
    assert "bundle" not in str(refused.value)
    _, public = in_pem(tmp_path)
    keys = Trust.of(public).keys
    public.write_bytes(b"\xef\xbb\xbf" + public.read_bytes().replace(b"\n", b"\r\n"))
    assert Trust.of(public).keys == keys


def test_the_environment_may_name_the_keys(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMEFUSION_TRUSTED_KEYS", str(tmp_path / "none"))
    assert_refused(run("generate", bundle, "--prompt", "?"), TrustError, "no file of public keys")


# --- Engines ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(bundle: Path, tmp_path: Path) -> Path:
    """A bundle as it comes from elsewhere, with engines that must not be touched: loading one would be found out."""
    folder = copied(bundle, tmp_path / "foreign")
    (folder / ENGINE).parent.mkdir(parents=True)
    (folder / ENGINE).write_bytes(b"a shared library")
    manifest = read_manifest(folder)
    engines = tuple(
        EngineRecord("inductor", graph, ENGINE, "torch", "2.13.0", ("cpu",), "float32", "k", (), (), (), 0)
        for graph in Bundle(folder, verify=False).graphs
    )
    files = {**manifest.files, ENGINE: file_record(folder / ENGINE)}
    write_manifest(folder, replace(manifest, engines=engines, files=files))
    return folder


def test_engines_of_a_stranger_are_passed_over_and_that_is_said(foreign: Path) -> None:
    result = run("generate", foreign, "--prompt", "What?", "--max-new-tokens", 2)
    assert result.exit_code == 0, result.output
    assert "backend: onnxruntime on cpu" in result.stderr
    assert "inductor: its engines are code that nobody vouches for (--trust-engines)" in result.stderr


def test_engines_of_a_stranger_are_refused_when_asked_for(foreign: Path) -> None:
    result = run("generate", foreign, "--prompt", "What?", "--backend", "inductor")
    assert_refused(
        result, TrustError, "nobody vouches for", "--trust-engines", "--trusted-keys", "--backend onnxruntime"
    )
    for open_backend in (InductorBackend, lambda opened: TensorRTBackend(opened, "tensorrt-rtx")):
        opened = Bundle(foreign)
        renamed = replace(opened.manifest.engines[0], kind="tensorrt-rtx", library="tensorrt_rtx")
        opened.manifest = replace(opened.manifest, engines=(*opened.manifest.engines, renamed))
        with pytest.raises(TrustError, match="nobody vouches for"):
            open_backend(opened)


@pytest.mark.parametrize("vouch", ["user", "compiled"])
def test_engines_run_when_somebody_vouches(foreign: Path, vouch: str) -> None:
    opened = Bundle(foreign, trust=Trust(engines=vouch == "user"))
    if vouch == "compiled":
        assert distrust(opened, "inductor") is not None
        remember_compiled([sha256_of(foreign / ENGINE)])
    assert distrust(opened, "inductor") is None
    passed = [option.problem for option in choose(opened, machine=CPU_ONLY).passed_over if option.backend == "inductor"]
    assert "nobody vouches" not in str(passed)


def test_a_voucher_is_for_the_bytes_and_not_for_the_record(foreign: Path) -> None:
    """Another engine under the hash of one that was compiled here, in a bundle that nobody verified."""
    remember_compiled([sha256_of(foreign / ENGINE)])
    (foreign / ENGINE).write_bytes(b"another library!")
    opened = Bundle(foreign, verify=False)
    with pytest.raises(BundleError, match=r"rest\.pt2 is altered"):
        InductorBackend(opened)
    with pytest.raises(BundleError, match=r"rest\.pt2 is altered"):
        choose(opened, "inductor", machine=CPU_ONLY)


def test_only_this_user_says_what_was_compiled_here() -> None:
    first, other = "1" * 64, "2" * 64
    remember_compiled([first])
    assert is_compiled_here(first)
    assert not is_compiled_here(other)
    assert not is_compiled_here("../" + first)
    (user_cache(COMPILED) / first).rename(user_cache(COMPILED) / other)  # as whoever may write the folder could
    assert not is_compiled_here(other)
    (user_cache(COMPILED) / first).write_text(first)
    (user_cache(COMPILED) / first).chmod(0o666)
    assert not is_compiled_here(first)


# --- Servers ----------------------------------------------------------------------------------------------------------


def test_every_error_says_whose_fault_it_is() -> None:
    """What a server answers with a status of 4xx is what another request would mend."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FrameFusionError)]
    senders = {kind.__name__ for kind in kinds if kind.sender_fault}
    assert senders == {"BudgetError", "PromptError", "ReducerError", "RequestError", "VideoError"}


def test_a_refused_request_leaves_a_pipeline_as_it_was(pipeline: Pipeline, film: Path, tmp_path: Path) -> None:
    turns, request = [Turn("user", (Visual.VIDEO, "What?"))], Request(max_new_tokens=4)
    answer = pipeline.generate(turns, [film], request).token_ids
    refused: list[tuple[Any, Any, Any]] = [
        (turns, [tmp_path / "none.mp4"], request),
        (turns, [], request),
        (turns, [film], replace(request, cost=7.0)),
        (turns, [film], replace(request, reducer="none such")),
        (turns, [film], replace(request, max_new_tokens=0)),
        ([Turn("user", ("word " * 2000,))], [], request),
    ]
    for arguments in refused:
        with pytest.raises(FrameFusionError) as error:
            pipeline.generate(*arguments)
        assert error.value.sender_fault, error.value
        assert pipeline.generate(turns, [film], request).token_ids == answer
