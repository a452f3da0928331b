"""What a bundle says of the checkpoint it was made of: manifest, model card, licence files; and that they agree."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from framefusion import errors
from framefusion.export.checkpoints.origin.source import License, license_of
from framefusion.export.report.card import card, front_matter
from framefusion.export.report.inspection import bytes_of_files
from framefusion.runtime.format.bundle_files import sha256_of
from framefusion.runtime.format.manifest import Manifest, SourceRecord
from framefusion.runtime.format.manifest_file import read_manifest, write_manifest
from tests.commands import assert_refused, export
from tests.export.checkpoints.test_hub import COMMIT, REPO, cache, fill_cache  # noqa: F401  (a fixture)

APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"


def with_card(folder: Path, front: str = "", **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    if front:
        (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("front", "files", "expected"),
    [
        ("license: mit", {}, License("mit")),
        ("license: [mit]", {"LICENSE": APACHE}, License("mit")),
        (
            "license: other\nlicense_name: tongyi-qianwen\nlicense_link: https://example.org/l",
            {},
            License("other", "tongyi-qianwen", "https://example.org/l"),
        ),
        ("license: [mit, cc-by-4.0]", {}, License("other", "mit, cc-by-4.0")),
        ("license: no", {}, License("unknown")),  # YAML's false is no licence
        ("tags: [video]", {"LICENSE": APACHE}, License("apache-2.0", None, "LICENSE")),
        ("license: [", {"LICENSE": APACHE}, License("apache-2.0", None, "LICENSE")),  # no YAML
        (
            "",
            {"LICENSE": "MIT License\n\nPermission is hereby granted, free of charge, to"},
            License("mit", None, "LICENSE"),
        ),
        (
            "",
            {"LICENSE": "\n# Tiny LICENSE AGREEMENT\n" + 1000 * "." + APACHE},
            License("other", "Tiny LICENSE AGREEMENT", "LICENSE"),
        ),
        ("", {"NOTICE": APACHE}, License()),
        ("", {}, License()),
    ],
)
def test_a_licence_is_what_the_checkpoint_says(
    tmp_path: Path, front: str, files: dict[str, str], expected: License
) -> None:
    assert license_of(with_card(tmp_path / "model", front, **files)) == expected


def front_of(path: Path) -> dict[str, Any]:
    _, text, _ = path.read_text(encoding="utf-8").split("---\n", 2)
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def rows_of(text: str) -> dict[str, str]:
    """First two columns of all tables."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1] for row in rows}


def test_the_card_of_a_folder_says_what_the_manifest_says(bundle: Path, checkpoint: Path) -> None:
    manifest = read_manifest(bundle)
    front, text = front_of(bundle / "README.md"), (bundle / "README.md").read_text(encoding="utf-8")
    source = manifest.source
    assert source == SourceRecord(checkpoint.name, False, None, None, sha256_of(checkpoint / "config.json"))
    assert "base_model" not in front  # a folder's name is no id
    assert (front["license"], front["library_name"]) == ("unknown", "framefusion-aot")
    assert front["pipeline_tag"] == "video-text-to-text"
    assert manifest.model.model_type in front["tags"]
    rows = rows_of(text)
    assert rows["licence"] == "unknown: the checkpoint does not state one"
    assert rows["SHA-256 of config.json"] == source.config_sha256
    assert rows["cost"] == "keeps 40 %, drops 60 %"
    assert rows["longest prompt"] == f"{manifest.limits.max_input_len} tokens"
    for line in manifest.check["lines"]:
        assert rows[line["what"]] == f"{line['value']:.3g}"
    assert manifest.check["reference"] in text
    for tool, version in manifest.tools.items():
        assert rows[tool] == version
    parts = {name: size for name, size in bytes_of_files(manifest.files).items() if name != "README"}
    assert {part: int(rows[part]) for part in parts} == parts
    assert int(rows["total"]) == sum(parts.values())
    assert str(checkpoint.parent) not in text + (bundle / "manifest.json").read_text()  # no path of this machine
    assert card(manifest_without_card(manifest)) == text


def manifest_without_card(manifest: Manifest) -> Manifest:
    return replace(manifest, files={name: record for name, record in manifest.files.items() if name != "README.md"})


def test_verification_covers_the_card(bundle: Path, tmp_path: Path) -> None:
    assert read_manifest(bundle).files["README.md"].sha256 == sha256_of(bundle / "README.md")
    spoiled = tmp_path / "spoiled"
    shutil.copytree(bundle, spoiled)
    text = (spoiled / "README.md").read_text()
    (spoiled / "README.md").write_text(text.replace("40 %", "50 %", 1))
    assert_refused(export("check", spoiled), errors.BundleError, "README.md is altered")


@pytest.mark.usefixtures("instant_traces")
def test_the_card_of_an_id(cache: Path, checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    files = tmp_path / "files"
    shutil.copytree(checkpoint, files)
    with_card(
        files, "license: other\nlicense_name: tiny\nlicense_link: LICENSE", LICENSE="Tiny terms\n", NOTICE="Mind.\n"
    )
    fill_cache(cache, files)
    result = export("build", REPO, "--revision", COMMIT, "-o", tmp_path / "bundle", "--cost", 0.5, "--no-check")
    assert result.exit_code == 0, result.output
    manifest, text = read_manifest(tmp_path / "bundle"), (tmp_path / "bundle" / "README.md").read_text()
    source = manifest.source
    assert source is not None
    assert (source.name, source.on_hub, source.revision, source.commit) == (REPO, True, COMMIT, COMMIT)
    front = front_of(tmp_path / "bundle" / "README.md")
    assert yaml.safe_load(front_matter(manifest)) == front
    assert (front["base_model"], front["license"], front["license_name"], front["license_link"]) == (
        REPO, "other", "tiny", "LICENSE",
    )  # fmt: skip
    assert f"ff-export build {REPO} -o bundle --revision {COMMIT} --cost 0.5" in text
    assert "Not checked" in text
    assert (tmp_path / "bundle" / "LICENSE").read_text() == "Tiny terms\n"
    assert {"README.md", "LICENSE", "NOTICE"} <= set(manifest.files)
    text = export("inspect", tmp_path / "bundle").stdout
    assert f"base model: {REPO} at {COMMIT}" in text
    assert "licence: tiny (LICENSE)" in text
    facts = json.loads(export("inspect", tmp_path / "bundle", "--json").stdout)
    assert facts["source"]["license_name"] == "tiny"


@pytest.mark.usefixtures("instant_traces")
def test_a_resumed_build_writes_its_card_afresh(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first try ends between card and publication, after a check; the second leaves the check out."""
    from framefusion.export.check import check
    from framefusion.export.writing import staging

    def interrupt(_: staging.Staging) -> None:
        raise KeyboardInterrupt

    line = {"what": "dense logits", "value": 1e-6, "limit": 1e-4}
    passed = {"passed": True, "reference": "the test", "prompt_tokens": 9, "lines": [line], "failures": []}
    with monkeypatch.context() as patch:
        patch.setattr(check, "check_bundle", lambda *_, **__: passed)
        patch.setattr(staging.Staging, "publish", interrupt)
        result = export("build", checkpoint, "-o", tmp_path / "bundle")
    assert_refused(result, errors.InterruptedBuildError, "resume")
    assert "the test" in (tmp_path / "bundle.partial" / "README.md").read_text()
    result = export("build", checkpoint, "-o", tmp_path / "bundle", "--no-check")
    assert result.exit_code == 0
    nothing = "NOT CHECKED: compared neither with the eager model nor with transformers"
    assert result.stdout.splitlines()[-1] == f"{nothing} (--no-check)"
    assert "Not checked" in (tmp_path / "bundle" / "README.md").read_text()
    result = export("check", tmp_path / "bundle")
    assert result.exit_code == 0
    now = "files only: NOTHING was compared now (--checkpoint does); when it was built: "
    assert result.stdout.splitlines()[-1] == now + nothing


@pytest.mark.slow
def test_a_bundle_is_compared_with_its_own_commit(cache: Path, checkpoint: Path, bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    """main has moved on since, to a commit that is not there."""
    snapshot = fill_cache(cache, checkpoint)
    (snapshot.parent.parent / "refs" / "main").write_text("f" * 40)
    moved = tmp_path / "bundle"
    shutil.copytree(bundle, moved)
    manifest = read_manifest(moved)
    assert manifest.source is not None
    source = replace(manifest.source, name=REPO, on_hub=True, revision="main", commit=COMMIT)
    write_manifest(moved, replace(manifest, source=source))
    result = export("check", moved, "--checkpoint", REPO)
    assert result.exit_code == 0, result.output
    assert "check passed, reference: transformers" in result.stdout
    result = export("check", moved, "--checkpoint", REPO, "--revision", "main")
    assert_refused(result, errors.CheckpointError, f"{REPO} at main", "HF_HUB_OFFLINE")


def test_the_card_says_what_was_not_run(bundle: Path) -> None:
    manifest = manifest_without_card(read_manifest(bundle))
    line = {"what": "tensors written that are not the checkpoint's", "value": 0, "limit": 0.0}
    check = {"method": "weights", "why": "nothing was run: 9 GB are free", "lines": [line], "notes": ["8 tensors"]}
    text = card(replace(manifest, check=check))
    assert "The bundle itself was not run: nothing was run: 9 GB are free." in text
    assert "- 8 tensors" in text
    assert "eager torch, float32" not in text
