"""A disk that dies at a chosen operation: nothing that comes later has an effect, and it may forget what was not flushed."""

import io
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from jaxfed import files
from jaxfed.run import checkpoint, journal


class Crash(BaseException):
    """The process is dead. No Exception, so that nobody recovers from it."""


class Disk:
    """Counts what changes the disk, and dies at the operation number ``dies_at``.

    A write that dies has done half. With ``forgets``, bytes that were not flushed are gone, as after a power failure.
    """

    def __init__(self, dies_at=None, forgets=False):
        self.dies_at, self.forgets = dies_at, forgets
        self.count, self.dead = 0, False
        self.flushed = {}

    def step(self, whole, half=lambda: None):
        if self.dead:
            raise Crash
        self.count += 1
        if self.count == self.dies_at:
            self.dead = True
            half()
            raise Crash
        return whole()

    def fsync(self, descriptor):
        # Only noted: this disk keeps its own books of what a power failure would leave.
        self.step(lambda: None)
        status = os.fstat(descriptor)
        if status.st_ino in self.flushed:
            self.flushed[status.st_ino] = status.st_size

    def forget(self, folder):
        """What the next start of the machine finds."""
        for path in Path(folder).rglob("*.journal*" if self.forgets else "nothing"):
            os.truncate(path, min(path.stat().st_size, self.flushed.get(path.stat().st_ino, path.stat().st_size)))


class File:
    """A file whose every write reaches the disk."""

    def __init__(self, disk, path, mode):
        self.disk = disk
        self.raw = disk.step(lambda: io.FileIO(path, mode))
        self.seek, self.fileno = self.raw.seek, self.raw.fileno
        self.inode = os.fstat(self.fileno()).st_ino
        disk.flushed[self.inode] = os.fstat(self.fileno()).st_size

    def write(self, piece):
        piece = bytes(piece)
        self.disk.step(lambda: self.raw.write(piece), lambda: self.raw.write(piece[: len(piece) // 2]))

    def truncate(self, size):
        self.disk.step(lambda: self.raw.truncate(size))
        self.disk.flushed[self.inode] = min(size, self.disk.flushed[self.inode])

    def flush(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.raw.close()


class Proxy:
    """A module with some functions replaced."""

    def __init__(self, module, **replaced):
        self.__dict__.update(replaced, _module=module)

    def __getattr__(self, name):
        return getattr(self._module, name)


def write_arrays(folder, leaves):
    """In place of Orbax, whose operations are many and its own."""
    folder.mkdir()
    np.savez(folder / "leaves.npz", **{str(i): np.atleast_1d(x).view(np.uint8) for i, x in enumerate(leaves.values())})


def read_arrays(folder, like):
    with np.load(folder / "leaves.npz") as stored:
        return {name: stored[str(i)].view(x.dtype).reshape(x.shape) for i, (name, x) in enumerate(like.items())}


@contextmanager
def mounted(disk=None):
    """Sends what checkpoints and journals do to the disk through one that may die, and journals tables of every size."""
    disk = Disk() if disk is None else disk

    def opened(path, mode="r", **options):
        return File(disk, path, mode) if mode in ("wb", "r+b") else open(path, mode, **options)

    def through(function):
        return lambda *a, **k: disk.step(lambda: function(*a, **k))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "JOURNAL_BYTES", 0)
        patch.setattr(checkpoint, "_write", write_arrays)
        patch.setattr(checkpoint, "_read", read_arrays)
        patch.setattr(checkpoint, "versions", dict)
        patch.setattr(files, "os", Proxy(os, fsync=disk.fsync, replace=through(os.replace), rename=through(os.rename)))
        patch.setattr(files, "shutil", Proxy(shutil, rmtree=through(shutil.rmtree)))
        patch.setattr(files, "open", opened, raising=False)
        patch.setattr(journal, "open", opened, raising=False)
        patch.setattr(Path, "unlink", through(Path.unlink))
        patch.setattr(Path, "mkdir", through(Path.mkdir))
        yield disk
