"""Files that are complete or absent, whatever stops the machine, and a lock on a folder."""
import contextlib
import errno
import os
import shutil
import sys
from pathlib import Path

from variants import UserError

try:
    import fcntl
except ImportError:                     # Windows: no lock
    fcntl = None


class FileOps:
    """The disk operations of a save, one method each, so that a test can stop after any or lose what was not synced."""

    def open(self, path):
        return open(path, 'wb')

    def write(self, file, data):
        file.write(data)

    def fsync(self, file):
        file.flush()
        os.fsync(file.fileno())

    def replace(self, source, target):
        os.replace(source, target)

    def fsync_dir(self, folder):
        if os.name == 'nt':             # has no such call; renames are journalled
            return
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            os.remove(path)


DISK = FileOps()


def write_whole(path, data, ops):
    """Write a temporary file, sync, rename, sync the folder: path has all of data or its old content; no .tmp stays.

    data: bytes or a memoryview. Raises OSError, with the errno of the step that failed.
    """
    aside = path.with_name(path.name + '.tmp')
    try:
        with ops.open(aside) as file:
            ops.write(file, data)
            ops.fsync(file)
        ops.replace(aside, path)
        ops.fsync_dir(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            ops.remove(aside)
        raise


class Lock:
    """One trainer per folder: holds <folder>/.lock until release() or the end of the process, however it ends.

    Raises UserError with the holder's pid, or where there can be no such folder. The file of a dead process does not block:
    the lock is the kernel's.
    """

    def __init__(self, folder):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if (Path(folder) / '.lock').is_fifo():      # which would wait for a reader
                raise FileExistsError(errno.EEXIST, '.lock is a pipe')
            self.file = open(Path(folder) / '.lock', 'a+', encoding='ascii', errors='replace')
        except OSError as error:
            raise UserError(f'{str(folder)[:200]!r} cannot be used: {(error.strerror or str(error)).lower()}; take another '
                            '--out_dir', 'out_dir') from None
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read(20).strip() or 'unknown'
            self.file.close()
            raise UserError(f'{folder} is in use by another trainer (pid {holder}); '
                            'wait for it, stop it, or take another --out_dir') from None
        except OSError as error:
            print(f'{folder} cannot be locked ({error}); start no second trainer there', file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):              # a full disk: the lock holds without the number
            self.file.truncate(0)
            os.write(self.file.fileno(), f'{os.getpid()}\n'.encode())

    def release(self):
        self.file.close()               # the file stays: removing it would let two processes lock two files
