"""Saving beside and moving into place; manifests."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from optimum_segquant import files
from optimum_segquant.files import (
    MANIFEST_NAME,
    DamagedFilesError,
    check_writable,
    sha256_of,
    staged_directory,
    verify_manifest,
    write_manifest,
)


def save_model(directory: Path, content: str) -> None:
    with staged_directory(directory) as staged:
        (staged / "config.json").write_text("{}")
        (staged / "model.safetensors").write_text(content)


def content_of(directory: Path) -> dict[str, str]:
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_nothing_is_there_until_the_block_ends(tmp_path):
    target = tmp_path / "a" / "model"
    with staged_directory(target) as staged:
        (staged / "config.json").write_text("{}")
        assert not target.exists()
        assert staged.parent == target.parent
    assert content_of(target) == {"config.json": "{}"}
    assert os.listdir(target.parent) == ["model"]


def test_a_model_is_replaced_whole(tmp_path):
    target = tmp_path / "model"
    save_model(target, "old")
    (target / "model-00002-of-00002.safetensors").write_text("stale shard")
    (target / "README.md").write_text("card")
    (target / ".git").mkdir()
    (target / ".git" / "HEAD").write_text("main")
    save_model(target, "new")
    assert content_of(target) == {
        "config.json": "{}",
        "model.safetensors": "new",
        "README.md": "card",
        ".git/HEAD": "main",
    }
    assert os.listdir(tmp_path) == ["model"]


def test_permissions_are_those_of_any_new_directory(tmp_path):
    save_model(tmp_path / "model", "x")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_full_disk_keeps_what_was_there(tmp_path, monkeypatch, existing):
    target = tmp_path / "model"
    if existing:
        save_model(target, "old")
    before = content_of(tmp_path)

    write = Path.write_text

    def full(self, text, *args, **kwargs):
        if self.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_model(target, "new")
    assert caught.value.errno == errno.ENOSPC
    assert content_of(tmp_path) == before
    assert os.listdir(tmp_path) == (["model"] if existing else [])


def test_full_disk_found_at_the_flush(tmp_path, monkeypatch):
    target = tmp_path / "model"
    save_model(target, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(target, "new")
    assert content_of(target)["model.safetensors"] == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_failed_move_puts_the_old_one_back(tmp_path, monkeypatch):
    target = tmp_path / "model"
    save_model(target, "old")
    rename = Path.rename

    def fail(self, new):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        save_model(target, "new")
    assert content_of(target)["model.safetensors"] == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_interrupt_leaves_nothing(tmp_path):
    def interrupted():
        with staged_directory(tmp_path / "model") as staged:
            (staged / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_directories_that_are_no_model_are_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        save_model(tmp_path, "x")
    assert content_of(tmp_path) == {"thesis.tex": "years of work"}
    with pytest.raises(NotADirectoryError, match="is a file"):
        save_model(tmp_path / "thesis.tex", "x")


def test_empty_directories_and_links_are_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_model(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert content_of(tmp_path / "real")["model.safetensors"] == "x"


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "model"
    (directory / "transformer").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "transformer" / "weights.safetensors").write_bytes(bytes(range(256)) * 5000)
    (directory / "README.md").write_text("card")
    write_manifest(directory)
    return directory


def test_manifest_lists_sizes_and_checksums(saved):
    content = json.loads((saved / MANIFEST_NAME).read_text())
    weights = (saved / "transformer" / "weights.safetensors").read_bytes()
    assert content["files"] == {
        "config.json": {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()},
        "transformer/weights.safetensors": {"size": 1_280_000, "sha256": hashlib.sha256(weights).hexdigest()},
    }
    assert verify_manifest(saved) == {
        name: sha256_of(saved / name) for name in ("config.json", "transformer/weights.safetensors")
    }


def test_every_damaged_file_is_named(saved):
    weights = saved / "transformer" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (saved / "config.json").unlink()
    with pytest.raises(DamagedFilesError, match=r"config\.json is missing.*truncated \(1279999 of 1280000 bytes\)"):
        verify_manifest(saved)


def test_one_flipped_bit_is_found(saved):
    weights = saved / "transformer" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[1_234_567] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DamagedFilesError, match=r"weights\.safetensors is altered"):
        verify_manifest(saved)
    assert list(verify_manifest(saved, files=["config.json"])) == ["config.json"]


def test_documentation_may_change(saved):
    (saved / "README.md").write_text("another card")
    assert len(verify_manifest(saved)) == 2


def test_files_that_must_be_listed(saved):
    (saved / "other.safetensors").write_bytes(b"x")
    with pytest.raises(DamagedFilesError, match=r"other\.safetensors is not in"):
        verify_manifest(saved, files=["other.safetensors"])


def test_missing_manifest(saved):
    (saved / MANIFEST_NAME).unlink()
    with pytest.raises(DamagedFilesError, match="no segquant_manifest"):
        verify_manifest(saved)
    assert verify_manifest(saved, required=False) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"manifest_version": 1}', "is damaged"),
        ('{"manifest_version": 1, "files": {"../x": {"size": 1, "sha256": "%s"}}}' % ("0" * 64), "points out"),
        ('{"manifest_version": 1, "files": {"x": {"size": "1", "sha256": "0"}}}', "no valid size"),
        ('{"manifest_version": 2, "files": {}}', "manifest_version 2"),
    ],
    ids=["truncated", "list", "no files", "path", "types", "version"],
)
def test_damaged_manifests(saved, content, message):
    (saved / MANIFEST_NAME).write_text(content)
    with pytest.raises(DamagedFilesError, match=message):
        verify_manifest(saved)


def test_a_place_for_a_file_is_looked_at_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert check_writable(tmp_path / "new" / "a.HTML", example="r.html", endings=[".html"]).name == "a.HTML"
    with pytest.raises(IsADirectoryError, match=f"is a directory: give the name of a file, such as {tmp_path}/r.html"):
        check_writable(tmp_path, example="r.html")
    with pytest.raises(NotADirectoryError, match="file is a file: give another name"):
        check_writable(tmp_path / "file" / "sub" / "r.html", example="r.html")
    with pytest.raises(ValueError, match=r"a\.xyz must end in \.png, \.svg, such as .*/r\.png"):
        check_writable(tmp_path / "a.xyz", example="r.png", endings=[".svg", ".png"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]
