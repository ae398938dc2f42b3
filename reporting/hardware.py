"""This machine: device, precision, peak speed, memory and versions."""
import contextlib
import os
import platform
import re
import resource
import subprocess
import sys
import time
import warnings

import torch

from reporting import masking
from variants import UserError

DIFF = 200_000                          # characters of env.json's diff of the code; a longer one is cut there
# TFLOP/s of dense matrix products by the makers' data sheets and architecture papers (of figures "with sparsity", half):
# NVIDIA's for each data-centre part, its Ampere, Ada and Blackwell papers for GeForce (with sums in fp32), AMD's for
# MI300X. float32 is TF32 from Ampere on, which parallel.start turns on; V100 and T4 have neither TF32 nor bf16, and on
# MI300X torch leaves TF32 (653.7) off. None: not there, or not on the sheet.
KINDS = torch.float16, torch.bfloat16, torch.float32, torch.float64
TERAFLOPS = {
    'T4': (65, None, 8.1, None), 'V100 PCIE': (112, None, 14, 7), 'V100': (125, None, 15.7, 7.8),
    'A10': (125, 125, 62.5, None), 'A10G': (70, 70, 35, None), 'A100': (312, 312, 156, 19.5),
    'RTX 3090': (71, 71, 35.6, None), 'RTX 4090': (165.2, 165.2, 82.6, None), 'RTX 5090': (209.5, 209.5, 104.8, None),
    'L4': (121, 121, 60, None), 'L40S': (362, 362, 183, None), 'H20': (148, 148, 74, 1),
    'H100': (989, 989, 494.5, 67), 'H100 PCIe': (756, 756, 378, 51), 'H100 NVL': (835, 835, 417.5, 60),
    'H200': (989, 989, 494.5, 67), 'H200 NVL': (835, 835, 417.5, 60), 'GH200': (989, 989, 494.5, 67),
    'B200': (2250, 2250, 1125, 37), 'GB200': (2500, 2500, 1250, 40), 'MI300X': (1307.4, 1307.4, 163.4, 163.4),
}
# parts of another speed under the same name, or shares of one: MIG slices and virtual GPUs (GRID, A10-24Q)
OTHER = re.compile(r'\b(Ti|D|Laptop|FHHL|HBM2e?|MIG|GRID|\d+[ABCQ])\b')
# start of CUDA_VISIBLE_DEVICES where all GPUs are hidden on purpose; the last is Slurm's
HIDDEN = '', '-1', 'NoDevFiles'
SMI_TIMEOUT = 20                                        # seconds; nvidia-smi hangs when a driver fails


def device(wanted, local_rank=0):
    """torch.device for 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'; plain 'cuda' becomes this rank's GPU.

    Raises UserError when the device is missing, and for 'auto' too where there is a GPU that torch cannot use.
    """
    kind, _, index = wanted.partition(':')
    cuda = kind in ('auto', 'cuda') and sees_cuda()
    if wanted == 'auto':
        wanted = kind = 'cuda' if cuda else 'cpu'
    there = {'cpu': True, 'cuda': cuda, 'mps': torch.backends.mps.is_available()}[kind]
    if there and kind == 'cuda':
        number = int(index) if index.isdigit() else local_rank
        there, wanted = number < torch.cuda.device_count(), f'cuda:{number}'
    if not there:
        raise UserError(f"device {wanted!r} is not on this machine; leave device='auto' or take 'cpu'", 'device')
    return torch.device(wanted)


def sees_cuda():
    """Whether torch sees a GPU. Raises UserError where nvidia-smi lists one, not hidden on purpose, and torch sees none."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                 # torch's warning about an old driver: ours is one line
        if torch.cuda.is_available():
            return True
    listed = re.findall(r'^GPU \d+:', nvidia_smi('-L'), re.M)
    if listed and os.environ.get('CUDA_VISIBLE_DEVICES', 'all').split(',')[0].strip() not in HIDDEN:
        raise UserError(unseen(f'{len(listed)} GPU{"s" * (len(listed) > 1)}'), 'device')
    return False


def nvidia_smi(*words):
    """Output of nvidia-smi; '' where it is missing or hangs."""
    try:
        return subprocess.run(['nvidia-smi', *words], capture_output=True, encoding='utf-8', errors='replace',
                              timeout=SMI_TIMEOUT).stdout
    except (OSError, subprocess.SubprocessError):
        return ''


def unseen(gpus):
    """The sentence on GPUs ('2 GPUs') that nvidia-smi lists and torch does not see: the fault, and the remedy."""
    found = re.search(r'CUDA (?:UMD )?Version *: *(\d+)(\.\d+)?', nvidia_smi())       # UMD: drivers of 2026
    driver, built = ''.join(filter(None, found.groups())) if found else '(unknown)', torch.version.cuda
    remedy = f'remove .venv and run again with TORCH_INDEX_URL=<index of torch builds for CUDA {driver}>'
    if not built:
        fault = 'is a build without CUDA'
    elif found and int(found[1]) < int(built.partition('.')[0]):
        fault, remedy = f'needs one for CUDA {built}', f'{remedy}, renew the driver'
    elif 'CUDA_VISIBLE_DEVICES' in os.environ:
        fault, remedy = f'sees none of CUDA_VISIBLE_DEVICES={os.environ["CUDA_VISIBLE_DEVICES"]}', 'correct that'
    else:
        fault = "sees none (python -c 'import torch; torch.cuda.init()' says why)"
    return (f'nvidia-smi lists {gpus} and a driver for CUDA {driver}, but torch {torch.__version__} {fault}; {remedy}, or '
            'compute on the CPU: --device=cpu')


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
    """FLOP/s of 100 % MFU: the best of several matrix products in `kind`, timed here in about 0.1 s."""
    n, kind = (8192, kind) if where.type == 'cuda' else (1024, torch.float32)       # CPUs: half precision may be slower
    a, b, best = *(torch.randn(n, n, device=where, dtype=kind) for _ in range(2)), float('inf')
    for _ in range(12 if where.type == 'cuda' else 6):
        begin = time.perf_counter()
        (a @ b)[0, 0].item()                            # .item() waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * n ** 3 / best


def data_sheet_flops(where, kind):
    """FLOP/s of a known GPU's data sheet for dense products in `kind`; None for others."""
    name = torch.cuda.get_device_name(where) if where.type == 'cuda' else ''
    words = f' {name.replace("-", " ")} '
    known = [part for part in TERAFLOPS if f' {part} ' in words]
    if not known or OTHER.search(name):
        return None
    teraflops = dict(zip(KINDS, TERAFLOPS[max(known, key=len)])).get(kind)
    return teraflops and teraflops * 1e12


def peak_memory(where):
    """Most memory used so far, bytes: of the GPU, or of this process."""
    if where.type == 'cuda':
        return torch.cuda.max_memory_allocated(where)
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def git(*words):
    """Output of a git command in this repo, '' when there is none."""
    try:
        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        return subprocess.run(['git', '-C', here, *words], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ''


def untracked():
    """Python files of this repo that this process has loaded and git does not track, by their paths from the root."""
    top = git('rev-parse', '--show-toplevel')
    loaded = {os.path.realpath(m.__file__) for m in list(sys.modules.values()) if getattr(m, '__file__', None)}
    names = git('ls-files', '--others', '--exclude-standard', '--full-name', '--', ':/*.py').splitlines()
    return [name for name in names if os.path.realpath(os.path.join(top, name)) in loaded]


def changes():
    """{'dirty': files that differ from the commit, 'diff': how}, loaded files that git does not track included.

    dirty with an empty diff: git could not say how.
    """
    new = untracked()
    parts = [git('diff', 'HEAD'), *(git('diff', '--no-index', '--', os.devnull, name) for name in new)]
    text = '\n'.join(filter(None, parts))
    return {'dirty': sorted([*git('diff', 'HEAD', '--name-only').splitlines(), *new]),
            'diff': masking.text(text[:2 * DIFF])[:DIFF]}


def processor():
    """The processor's name as the system gives it, else its architecture."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return next(line.split(':', 1)[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(where):
    """Content of a run's env.json: versions, hardware, commit; uncommitted changes and command without secrets."""
    return {
        'command': [os.path.basename(sys.executable), os.path.basename(sys.argv[0]), *masking.command(sys.argv[1:])],
        'python': platform.python_version(),
        'torch': str(torch.__version__), 'platform': f'{platform.system()} {platform.machine()}', 'cpu': processor(),
        'cpus': os.cpu_count(), 'threads': torch.get_num_threads(), 'device': str(where),
        'gpu': torch.cuda.get_device_name(where) if where.type == 'cuda' else None,
        'world_size': int(os.environ.get('WORLD_SIZE', 1)),
        'commit': git('rev-parse', 'HEAD'), **changes(),
    }
