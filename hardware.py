"""What this machine is: device, precision, peak speed, memory and versions."""
import contextlib
import os
import platform
import resource
import subprocess
import sys
import time

import torch

from variants import UserError

# dense bf16 FLOP/s by the data sheets, for MFU; the first name that the device's name contains
PEAK_BF16 = {'H200': 989e12, 'H100': 989e12, 'GH200': 989e12, 'B200': 2250e12, 'A100': 312e12, 'L40S': 362e12,
             'A10': 125e12, '4090': 165e12, '3090': 71e12, 'V100': 125e12, 'T4': 65e12}


def device(wanted, local_rank=0):
    """torch.device for 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'; plain 'cuda' becomes this rank's own.

    Raises UserError when the device is not there.
    """
    if wanted == 'auto':
        wanted = 'cuda' if torch.cuda.is_available() else 'cpu'
    kind, _, index = wanted.partition(':')
    there = {'cpu': True, 'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}[kind]
    if there and kind == 'cuda':
        number = int(index) if index.isdigit() else local_rank
        there, wanted = number < torch.cuda.device_count(), f'cuda:{number}'
    if not there:
        raise UserError(f"device {wanted!r} is not on this machine; leave device='auto' or take 'cpu'", 'device')
    return torch.device(wanted)


def dtype(wanted, where):
    """torch.dtype for 'auto' or a name: bfloat16 where the GPU has it, float16 on older GPUs, else float32."""
    if wanted == 'auto':
        wanted = 'float32'
        if where.type == 'cuda':
            wanted = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    return getattr(torch, wanted)


def autocast(where, kind):
    """The autocast context of a forward pass in `kind`; none for float32."""
    return contextlib.nullcontext() if kind == torch.float32 else torch.autocast(where.type, dtype=kind)


def peak_flops(where, kind):
    """FLOP/s that 100 % MFU stands for: the best of several matrix products in `kind`, timed here in 0.1 s or so."""
    n, kind = (8192, kind) if where.type == 'cuda' else (1024, torch.float32)       # CPUs: half precision may be slower
    a, b, best = *(torch.randn(n, n, device=where, dtype=kind) for _ in range(2)), float('inf')
    for _ in range(12 if where.type == 'cuda' else 6):
        begin = time.perf_counter()
        (a @ b)[0, 0].item()                            # .item() waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * n ** 3 / best


def data_sheet_flops(where, kind):
    """FLOP/s that the data sheet of a known GPU promises for dense products in `kind`; None for others."""
    name = torch.cuda.get_device_name(where) if where.type == 'cuda' else ''
    flops = next((flops for part, flops in PEAK_BF16.items() if part in name), None)
    return flops / 2 if flops and kind == torch.float32 else flops


def peak_memory(where):
    """Most memory used so far, bytes: of the GPU, or of this process."""
    if where.type == 'cuda':
        return torch.cuda.max_memory_allocated(where)
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def git(*words):
    """Output of a git command in this repo, '' when there is none."""
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        return subprocess.run(['git', '-C', here, *words], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ''


def environment(where):
    """What env.json of a run holds: versions, hardware, commit, uncommitted changes, command."""
    return {
        'command': [os.path.basename(sys.executable), os.path.basename(sys.argv[0]), *sys.argv[1:]],
        'python': platform.python_version(),
        'torch': str(torch.__version__), 'platform': f'{platform.system()} {platform.machine()}', 'cpus': os.cpu_count(),
        'threads': torch.get_num_threads(), 'device': str(where),
        'gpu': torch.cuda.get_device_name(where) if where.type == 'cuda' else None,
        'world_size': int(os.environ.get('WORLD_SIZE', 1)),
        'commit': git('rev-parse', 'HEAD'), 'diff': git('diff', 'HEAD')[:200_000],
    }
