"""Disks that fail: killed at any operation, out of space at any operation, or robbed of what was not synced."""
import errno
import itertools
import os
import signal
import sys
import traceback

from checkpoints.durable import FileOps


def in_child(action, *arguments):
    """Run action(*arguments) in a forked child -> its wait status: 0, or what killed it."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            action(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


class Hasty(FileOps):
    """Without the waiting for the disk, to set scenes up."""

    def fsync(self, file):
        file.flush()

    def fsync_dir(self, folder):
        pass


class Counting(FileOps):
    """Calls before() ahead of each operation and after() behind it, with the operation's name."""

    def __init__(self):
        self.done = []

    def before(self, name, arguments):
        pass

    def after(self, name, arguments):
        pass


def counted(name):
    def operation(self, *arguments):
        self.before(name, arguments)
        result = getattr(FileOps, name)(self, *arguments)
        self.done.append(name)
        self.after(name, arguments)
        return result
    return operation


for _name in ('open', 'write', 'fsync', 'replace', 'fsync_dir', 'remove'):
    setattr(Counting, _name, counted(_name))


class Killed(Counting):
    """SIGKILL after the k-th operation; with half, in the midst of the k-th if that is a write."""

    def __init__(self, k, half=False):
        super().__init__()
        self.k, self.half = k, half

    def before(self, name, arguments):
        if self.k == len(self.done):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.half and name == 'write' and self.k == len(self.done) + 1:
            file, data = arguments
            file.write(data[:len(data) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def after(self, name, arguments):
        if self.k == len(self.done):
            os.kill(os.getpid(), signal.SIGKILL)


class Full(Counting):
    """The k-th operation fails with ENOSPC, a write after half of its bytes; nothing can be written from then on."""

    def __init__(self, k):
        super().__init__()
        self.k, self.full = k, False

    def before(self, name, arguments):
        if len(self.done) + 1 == self.k or self.full and name in ('open', 'write', 'fsync'):
            self.k, self.full = None, True
            if name == 'write':
                arguments[0].write(arguments[1][:len(arguments[1]) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Inode:
    def __init__(self, data, synced=False):
        self.data, self.synced = data, synced

    def outcomes(self):
        """What a power cut may leave of it: everything, or for bytes that were not synced nothing, zeros, a part."""
        if self.synced:
            return [self.data]
        return [self.data, b'', b'\0' * len(self.data), self.data[:len(self.data) // 2]]


class Journal(FileOps):
    """Does everything for real and collects in .disks every folder that a power cut could leave.

    A file's bytes are safe once it was fsynced. A name is safe once the folder was; until then each creation, rename
    and removal may have happened or not, whatever the others did. This is harsher than any journalling file system.
    """

    def __init__(self, folder, syncs=True):
        self.safe = {p.name: Inode(p.read_bytes(), True) for p in folder.iterdir()}
        self.now, self.pending, self.files = dict(self.safe), [], {}
        self.syncs, self.disks = syncs, set()
        self.snapshot()

    def snapshot(self):
        for chosen in itertools.product((True, False), repeat=len(self.pending)):
            names = dict(self.safe)
            for change in itertools.compress(self.pending, chosen):
                for name, inode in change.items():
                    names.pop(name, None)
                    if inode:
                        names[name] = inode
            for contents in itertools.product(*(inode.outcomes() for inode in names.values())):
                self.disks.add(frozenset(zip(names, contents)))

    def change(self, **names):
        self.pending.append(names)
        for name, inode in names.items():
            self.now.pop(name, None)
            if inode:
                self.now[name] = inode
        self.snapshot()

    def open(self, path):
        file, inode = super().open(path), Inode(b'')
        self.files[file] = inode
        self.change(**{path.name: inode})
        return file

    def write(self, file, data):
        super().write(file, data)
        self.files[file].data += bytes(data)
        self.snapshot()

    def fsync(self, file):
        super().fsync(file)
        self.files[file].synced = self.syncs
        self.snapshot()

    def replace(self, source, target):
        super().replace(source, target)
        self.change(**{target.name: self.now[source.name], source.name: None})

    def fsync_dir(self, folder):
        super().fsync_dir(folder)
        if self.syncs:
            self.safe, self.pending = dict(self.now), []
        self.snapshot()

    def remove(self, path):
        super().remove(path)
        self.change(**{path.name: None})
