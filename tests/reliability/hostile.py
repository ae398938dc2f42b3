"""Checkpoints made to harm whoever reads them. HOSTILE: name -> function(canary path) -> bytes of a data file."""
import io
import os
import pickle
import struct
import zipfile
import zlib

import torch

GIB = 1 << 30


class Calls:
    """Pickles as a call of function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickled(value, protocol=2):
    return pickle.dumps({'step': 1, 'schema': 1, 'model': value}, protocol)


def stream(value):
    """A state whose model is what these instructions leave on the stack."""
    return b'\x80\x02}(' + text('step') + b'K\x01' + text('schema') + b'K\x01' + text('model') + value + b'u.'


def text(string):
    return b'X' + struct.pack('<I', len(string)) + string.encode()


def called(function, *arguments):
    return b'c' + function.replace(' ', '\n').encode() + b'\n(' + b''.join(arguments) + b'tR'


def number(value):
    data = value.to_bytes(value.bit_length() // 8 + 1, 'little')
    return b'\x8a' + bytes([len(data)]) + data


def tensor(elements, shape, stride, offset=0, storage='torch FloatStorage'):
    """Instructions for a tensor over data/0, which is said to hold that many elements."""
    place = (b'(' + text('storage') + b'c' + storage.replace(' ', '\n').encode() + b'\n' + text('0') + text('cpu')
             + number(elements) + b'tQ')
    return called('torch._utils _rebuild_tensor_v2', place, number(offset), number(shape) + b'\x85',
                  number(stride) + b'\x85', b'\x89', called('collections OrderedDict'))


def container(index, members=(), root='archive', start=b''):
    """A zip as torch.save lays it out, around this index; members: (name, bytes, [size when unpacked, method])."""
    members = [('data.pkl', index), ('byteorder', b'little'), ('version', b'3\n'), *members]
    body, directory = start, b''
    for name, data, *packed in members:
        name = f'{root}/{name}'.encode()
        size, method = packed or (len(data), 0)
        numbers = struct.pack('<HHHHIIIHH', 0, method, 0, 0, zlib.crc32(data), len(data), size, len(name), 0)
        directory += (b'PK\1\2' + struct.pack('<H', 20) + struct.pack('<H', 20) + numbers
                      + struct.pack('<HHHII', 0, 0, 0, 0, len(body) - len(start)) + name)
        body += b'PK\3\4' + struct.pack('<H', 20) + numbers + name + data
    return body + directory + end(len(members), len(directory), len(body) - len(start))


def end(members, length, offset):
    return b'PK\5\6' + struct.pack('<HHHHIIH', 0, 0, members & 0xffff, members & 0xffff, length, offset, 0)


def bomb(size):
    """(bytes, size, method) of a deflated run of zeros, made of one flushed piece over and over."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return piece * (size >> 24) + packer.flush(), size, 8


def bombed_index():
    """4 GiB of zeros where the index should be."""
    data, size, method = bomb(4 * GIB - (1 << 24))
    whole = container(data)
    first = struct.pack('<HHHHIII', 0, 0, 0, 0, zlib.crc32(data), len(data), len(data))
    return whole.replace(first, struct.pack('<HHHHIII', 0, method, 0, 0, zlib.crc32(data), len(data), size))


def legacy(canary):
    return pickle.dumps(0x1950a86a20f9469cfc6c, 2) + pickled(Calls(os.system, f'touch {canary}'))


def nested_storage(canary):
    return container(pickled(Calls(torch.storage._load_from_bytes, legacy(canary))))


def many_members(canary):
    """A directory of 1.2 million entries for one member."""
    plain = container(stream(b'K\x01'))
    offset = plain.index(b'PK\1\2')
    entry = plain[offset:plain.index(b'PK\1\2', offset + 1)]
    return plain[:offset] + entry * 1_200_000 + end(1_200_000, len(entry) * 1_200_000, offset)


def overlapping(canary):
    """Sixty members, all of them the same 64 KiB."""
    plain = container(stream(b'K\x01'), [('data/0', bytes(1 << 16))])
    offset = plain.index(b'PK\1\2')
    entry = plain[plain.rindex(b'PK\1\2'):plain.index(b'PK\5\6')]
    names = [entry.replace(b'data/0', b'data/%d' % i) for i in range(1, 10)]
    directory = plain[offset:plain.index(b'PK\5\6')] + b''.join(names)
    return plain[:offset] + directory + end(13, len(directory), offset)


def two_in_one(canary):
    """Two zips of one layout, one after the other: the last is what zipfile reads, the first what torch reads."""
    evil = stream(called('builtins bytearray', number(64 * GIB)))
    good = stream(text('x' * (len(evil) - len(stream(text(''))))))
    return container(evil)[:-len(end(0, 0, 0))] + container(good)


def compressed_index(canary):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    index = stream(text('x' * 100))
    data = packer.compress(index) + packer.flush()
    whole = container(data)
    stored = struct.pack('<HHHHIII', 0, 0, 0, 0, zlib.crc32(data), len(data), len(data))
    return whole.replace(stored, struct.pack('<HHHHIII', 0, 8, 0, 0, zlib.crc32(index), len(data), len(index)))


def zip_of(names):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        for name in names:
            archive.writestr(name, stream(b'K\x01') if name.endswith('data.pkl') else b'3\n')
    return out.getvalue()


def laughs():
    """Forty lists, each holding the one before it twice: a tree of 2^40 leaves in 400 bytes."""
    inner = []
    for _ in range(40):
        inner = [inner, inner]
    return inner


def shell(canary, protocol=2):
    return pickled(Calls(os.system, f'touch {canary}'), protocol)


HOSTILE = {
    'os.system': lambda canary: container(shell(canary)),
    'os.system in protocol 4': lambda canary: container(shell(canary, 4)),
    'builtins.eval': lambda canary: container(pickled(Calls(eval, f'open({str(canary)!r}, "w")'))),
    'nested torch storage': nested_storage,
    'not a zip, os.system': legacy,
    'bare pickle': shell,
    'torchscript': lambda canary: container(shell(canary), [('constants.pkl', shell(canary)), ('code/x.py', b'')]),
    'open as a type': lambda canary: container(stream(b'c__builtin__\nopen\n' + text(str(canary)) + text('w')
                                                      + b'\x86\x81')),
    'bytearray of 64 GiB': lambda _: container(stream(called('builtins bytearray', number(64 * GIB)))),
    'tensor of 64 GiB by its class': lambda _: container(stream(called('torch Tensor', number(16 * GIB)))),
    'storage of 64 GiB by its class': lambda _: container(stream(called('torch.storage UntypedStorage',
                                                                        number(64 * GIB)))),
    'huge shape': lambda _: container(stream(tensor(1, 1 << 40, 1)), [('data/0', bytes(4))]),
    'huge shape over an empty storage': lambda _: container(stream(tensor(0, 4 * GIB, 1)), [('data/0', b'')]),
    'huge shape by stride 0': lambda _: container(stream(tensor(1, 1 << 40, 0)), [('data/0', bytes(4))]),
    'offset past the end': lambda _: container(stream(tensor(1, 1, 1, offset=1 << 30)), [('data/0', bytes(4))]),
    'storage longer than its member': lambda _: container(stream(tensor(1 << 20, 1 << 20, 1)), [('data/0', bytes(4))]),
    'zip bomb': lambda _: container(stream(tensor(GIB, GIB, 1)), [('data/0', *bomb(4 * GIB - (1 << 24)))]),
    'zip bomb in the index': lambda _: bombed_index(),
    'compressed index': compressed_index,
    'two zips in one': two_in_one,
    'protocol 3': lambda _: container(b'\x80\x03' + stream(b'K\x01')[2:]),
    'many members': many_members,
    'overlapping members': overlapping,
    'member twice': lambda _: container(stream(b'K\x01'), [('data.pkl', stream(b'K\x02'))]),
    'bytes before the zip': lambda _: container(stream(b'K\x01'), start=b'#!/bin/sh\n'),
    'deep lists': lambda _: container(stream(b']' * 120_000 + b'a' * 119_999)),
    'deep tuples': lambda _: container(stream(b')' + b'\x85' * 240_000)),
    'deep, 2^40 leaves': lambda _: container(pickled(laughs())),
    'long index': lambda _: container(stream(text('x' * (6 << 20)))),
    'four million instructions': lambda _: container(stream(b')' + b'\x85' * 4_000_000)),
    '.. in a member': lambda _: zip_of(['archive/data.pkl', 'archive/version', 'archive/../../canary']),
    '.. as the root': lambda _: zip_of(['../data.pkl', '../version', '../data/0']),
    'absolute member': lambda _: zip_of(['/archive/data.pkl', '/archive/version']),
    'no members': lambda _: end(0, 0, 0),
    'a list': lambda _: container(b'\x80\x02].'),
    'empty': lambda _: b'',
    'text': lambda _: b'this is no checkpoint\n' * 100,
    'json': lambda _: b'{"step": 1}',
}
