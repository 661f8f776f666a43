"""What else can be in a checkpoint's folder: links, other names, damage, other files, another run that saves."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from support.ranks import Odd

from cosface_kernels import checkpoint
from cosface_kernels.optim import FusedSGD


def test_a_checkpoint_is_one_under_any_name(tmp_path, monkeypatch):
    """Else a run would begin anew in silence, or evaluate untrained weights."""
    path = checkpoint.save(tmp_path / "run", 7, odd=Odd(1))
    (tmp_path / "newest").symlink_to(path)
    (tmp_path / "folder").symlink_to(path.parent)
    monkeypatch.chdir(path)
    for name in (path, tmp_path / "newest", tmp_path / "folder", ".", ".."):
        assert checkpoint.load(name, odd=Odd(None)) == 7, name
    best = path.rename(tmp_path / "best")
    assert checkpoint.load(best, odd=Odd(None)) == 7
    assert checkpoint.load(tmp_path, odd=Odd(None)) is None
    for gone in (path, tmp_path / "newest"):
        with pytest.raises(RuntimeError, match=rf"^reading {gone} failed: FileNotFoundError: .*"):
            checkpoint.load(gone, odd=Odd(None))
    (file,) = best.iterdir()
    with pytest.raises(NotADirectoryError, match=rf"got the file {file}\.$"):
        checkpoint.load(file, odd=Odd(None))


def test_damaged_bytes_are_said_to_be_so(tmp_path):
    """Of the header, and of what a checkpoint says of itself, bit by bit."""

    def run() -> dict[str, object]:
        layer = torch.nn.Linear(3, 2)
        optimizer = FusedSGD(layer.parameters(), lr=0.1, momentum=0.9)
        layer(torch.ones(3)).sum().backward()
        optimizer.step()
        return {"layer": layer, "optimizer": optimizer}

    path = checkpoint.save(tmp_path, 1, **run())
    (file,) = path.iterdir()
    whole = file.read_bytes()
    structure, end = whole.index(b'{"step"'), int.from_bytes(whole[:8], "little") + 8
    failed = []
    for at in (*range(0, end, 23), *range(structure, min(structure + 900, len(whole)), 7)):
        for bit in (1, 128):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            try:
                checkpoint.load(tmp_path, **run())
            except (
                RuntimeError,
                ValueError,
            ) as error:  # ValueError: a name is another, and an object lacks its own
                failed.append(error)
    assert len(failed) > 100
    assert all(str(path) in str(error) for error in failed)
    for at, new in ((structure, bytes(64)), (structure + 2, b"S"), (whole.index(b"saved_offsets"), b"S")):
        file.write_bytes(whole[:at] + new + whole[at + len(new) :])
        for read in (lambda: checkpoint.load(path), lambda: checkpoint.load_tensor(path, "layer/weight")):
            with pytest.raises(RuntimeError, match=rf"^reading {path} failed: \w+: "):
                read()


def test_files_that_are_none_of_a_checkpoint_are_named(tmp_path):
    path = checkpoint.save(tmp_path, 1, odd=Odd(torch.ones(3)))
    (file,) = path.iterdir()
    for name, content in (("._x.safetensors", b"\0\5\26\7" * 10), ("copy.safetensors", file.read_bytes())):
        (path / name).write_bytes(content)
        with pytest.raises(
            RuntimeError, match=rf"reading {path} failed: .* {name} in it may be none of its files\.$"
        ):
            checkpoint.load(tmp_path, odd=Odd(None))
        (path / name).unlink()
    shutil.copy(file, path / file.name.replace("00001-of", "00002-of"))
    with pytest.raises(RuntimeError, match=rf"reading {path} failed: some of its files are there twice, and "):
        checkpoint.load(tmp_path, odd=Odd(None))


def test_what_is_no_folder_is_in_the_way_of_no_checkpoint(tmp_path):
    first = checkpoint.save(tmp_path / "run", 1, odd=Odd(1))
    (tmp_path / "run" / "step-1.partial").write_text("a file")
    (tmp_path / "run" / "step-2.partial").symlink_to(first)
    (tmp_path / "run" / "step-000000000003-000003").write_text("a file")
    (tmp_path / "run" / "step-000000000004-000004").symlink_to(first)
    assert checkpoint.save(tmp_path / "run", 5, keep=3, odd=Odd(5)).name == "step-000000000005-000005"
    assert first.is_dir()
    assert checkpoint.save(tmp_path / "run", 6, keep=1, odd=Odd(6)).name == "step-000000000006-000006"
    assert sorted(os.listdir(tmp_path / "run")) == ["step-000000000003-000003", "step-000000000006-000006"]


@pytest.mark.parametrize("step", [5, 6])
@pytest.mark.parametrize("part", ["all", "its begin"])
@pytest.mark.parametrize("moment", ["save_state_dict", "_end"])
def test_of_two_runs_that_save_in_one_folder_one_is_told(tmp_path, monkeypatch, moment, part, step):
    """As a requeued job beside the one that it replaces: what save says that it saved is there, and of one run."""
    checkpoint.save(tmp_path, 4, odd=Odd([4] * 3))
    whole = getattr(checkpoint, moment)

    def after_another(*args, **kwargs):
        monkeypatch.setattr(checkpoint, moment, whole)
        if part == "all":
            checkpoint.save(tmp_path, step, odd=Odd([200] * 3))
        else:
            checkpoint._begin(tmp_path, step)
        return whole(*args, **kwargs)

    monkeypatch.setattr(checkpoint, moment, after_another)
    saved, refusal, loaded = None, "another run saves into", Odd(None)
    try:
        saved = checkpoint.save(tmp_path, 5, keep=1, odd=Odd([100] * 3))
    except RuntimeError as error:
        refusal = str(error)
    assert "another run saves into" in refusal
    checkpoint.load(tmp_path, odd=loaded)
    assert loaded.value in ([[200] * 3] if part == "all" else [[4] * 3, [100] * 3])
    if saved is not None and saved.exists():
        checkpoint.load(saved, odd=loaded)
        assert loaded.value == [100] * 3


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(torch.distributed.checkpoint.filesystem.os, "fsync", full)
    with pytest.raises(
        RuntimeError, match=r"writing .*step-0{11}1-0{5}1\.\w{8}\.partial failed on rank 0: no space"
    ):
        checkpoint.save(tmp_path, 1, layer=torch.nn.Linear(2, 2))
