import os

import pytest

from jaxfed import files


def fail(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    files.write(tmp_path / "a", "old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"):
        files.write(tmp_path / "a", "new")
    assert (os.listdir(tmp_path), (tmp_path / "a").read_text()) == (["a"], "old")


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failing_folder_leaves_nothing(tmp_path, monkeypatch, call):
    (tmp_path / "deep").mkdir()
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"), files.new_folder(tmp_path / "deep" / "a") as partial:
        (partial / "file").write_text("x")
    assert os.listdir(tmp_path / "deep") == []


def test_a_folder_appears_when_its_block_ends(tmp_path):
    with files.new_folder(tmp_path / "a") as partial:
        (partial / "file").write_text("x")
        assert not (tmp_path / "a").exists()
    assert os.listdir(tmp_path / "a") == ["file"]
    with pytest.raises(FileExistsError), files.new_folder(tmp_path / "a"):
        raise AssertionError("the block must not run")
    (tmp_path / "empty").mkdir()
    with files.new_folder(tmp_path / "empty") as partial:
        (partial / "file").write_text("x")
    assert os.listdir(tmp_path / "empty") == ["file"]


def test_an_interrupted_folder_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "a"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_lock_is_held_once_and_released(tmp_path):
    def lock():
        return files.locked(tmp_path / "lock", "It is taken.")

    with lock(), pytest.raises(BlockingIOError, match=r"It is taken\."), lock():
        raise AssertionError("the block must not run")
    with lock():
        pass
