"""Several ranks on this machine without torchrun: processes forked from a server that has imported everything once."""
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import configurator
import train

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['tests.reliability.ranks'])


def body(rank, world, port, out, function, arguments):
    """One rank: function(*arguments) with stdout and stderr in out/<rank>.txt; the exit code is the program's."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port))
    file = open(Path(out, f'{rank}.txt'), 'w')
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def together(world, out, function, *arguments, seconds=120):
    """Run function(*arguments) on that many ranks: [(exit code, what it printed)]; none is left running."""
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks = [CONTEXT.Process(target=body, args=(rank, world, port, out, function, arguments)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(seconds)
        if rank.is_alive():
            rank.kill()
            rank.join()
    return [(process.exitcode, (out / f'{rank}.txt').read_text()) for rank, process in enumerate(ranks)]


def training(*arguments):
    train.main(configurator.load(arguments))


def grouped(function, *arguments):
    """function(group, *arguments) inside a process group of gloo."""
    dist.init_process_group('gloo')
    try:
        function(dist.group.WORLD, *arguments)
    finally:
        dist.destroy_process_group()


def trained(world, out, *arguments, code=0):
    """Train on that many ranks into out; returns what rank 0 printed."""
    ends = together(world, Path(out), training, *arguments)
    assert [end for end, _ in ends] == [code] * world, '\n'.join(text[-3000:] for _, text in ends)
    return ends[0][1]
