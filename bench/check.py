"""Part check: is torch.compile's code correct here? Gradients, bits, graphs, DDP of one rank, and the fp32 getter.

    python bench.py check --json=check.json
    python bench.py check --device=cpu --backend=aot_eager --n_embd=128 --block_size=32 --vocab_size=64

A case is a model of two blocks whose compiled gradients are compared with eager ones, at two points of the run, so that
windows move. A gradient g is wrong where |compiled - eager| / |eager| is above the LIMIT of the precision and above twice
|eager - fp32| / |fp32|, the effect of rounding alone. The file of --json is written after every case.
"""
from dataclasses import dataclass

from bench import Output, tables
from bench.cases import RANKED, cases
from configurator import key
from variants import UserError, did_you_mean


@dataclass
class Settings(Output):
    """Which cases, where, and how large."""
    only: str = key('', 'names of cases, by commas, ddp and getter among them; by default all')
    device: str = key('auto', "'auto' = cuda, else cpu; 'cpu', 'cuda', 'cuda:1'")
    backend: str = key('inductor', 'of torch.compile', choices=('inductor', 'aot_eager'))
    n_embd: int = key(256, 'hidden size; heads are half of it', low=64)
    block_size: int = key(512, 'tokens per sequence', low=16)
    batch_size: int = key(4, 'sequences', low=1)
    vocab_size: int = key(1024, 'tokens in the vocabulary', low=8)
    threads: int = key(1, 'torch threads on a CPU', low=1)


def wanted(settings):
    """The names of `only`: cases, 'ddp' and 'getter'; all of them by default."""
    known = [*cases(settings), 'ddp', 'getter']
    known.insert(6, known.pop(-2))                      # after the six that matter most
    names = [name.strip() for name in settings.only.split(',')] if settings.only else known
    for name in names:
        if name not in known:
            raise UserError(f'only takes {", ".join(known)}, got {name!r}{did_you_mean(name, known)}', 'only')
    return [name for name in known if name in names]


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    wanted(settings)
    if settings.device.split(':')[0] not in ('auto', 'cpu', 'cuda'):
        raise UserError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {settings.device!r}", 'device')


def run(settings, part):
    """All cases, each with its own error if it has one."""
    import torch

    from bench.modules import machine
    from bench.processes import keep
    from configurator import Config
    from training import parallel
    torch.set_num_threads(settings.threads)
    device = parallel.start(Config(device=settings.device)).device
    result = {'part': 'check', 'backend': settings.backend, 'rows': [], 'machine': machine(device)}
    for name in wanted(settings):
        result['rows'] += guarded(name, settings, device)
        keep(result | totals(result['rows']), settings.json)
    return result | totals(result['rows'])


def guarded(name, settings, device):
    """The rows of a case; an exception is a row too, so that the other cases continue."""
    import time

    from bench import compiled
    begin = time.monotonic()
    try:
        if name == 'getter':
            found = [compiled.getter()]
        elif name == 'ddp':
            found = [compiled.one_rank(one, settings, device) for one in RANKED]
        else:
            found = [compiled.compare(name, cases(settings)[name], settings, device)]
    except (Exception, SystemExit) as error:            # a compiler raises anything
        lines = str(error).strip().splitlines() or ['']
        found = [{'name': name, 'passed': False, 'error': f'{type(error).__name__}: {lines[0][:300]}'}]
    return [{**row, 's': (time.monotonic() - begin) / len(found)} for row in found]


def totals(rows):
    """Totals of the rows."""
    sums = {name: sum(row.get(name, 0) for row in rows) for name in ('gradients', 'wrong', 'breaks', 'recompiled')}
    return {**sums, 'failed': [row['name'] for row in rows if not row['passed']]}


def text(result):
    """One line per case, then the totals."""
    machine = result['machine']
    head = ['case', 'loss', 'compiled', 'gradients', 'wrong', 'worst', 'rounding', 'of', 'same bits', 'graphs', 'breaks',
            'recompiled', 's', '']
    lines = [[row['name'], *cells(row), f'{row["s"]:.1f}', 'PASS' if row['passed'] else 'FAIL'] for row in result['rows']
             if 'gradients' in row]
    found = [f'torch.compile by {result["backend"]} on {machine["gpu"] or machine["device"]}, torch {machine["torch"]}; '
             'worst: |compiled - eager| / |eager| of the gradient where it stands highest above its limit']
    found += [tables.aligned([head, *lines])] * bool(lines)
    found += [f'{row["name"]}: {"PASS" if row["passed"] else "FAIL"}; {row.get("error") or row["words"]}'
              for row in result['rows'] if 'gradients' not in row]
    failed = f'; FAIL: {", ".join(result["failed"])}' if result['failed'] else '; all pass'
    found.append(f'{result["gradients"]} gradients compared, {result["wrong"]} wrong; {result["breaks"]} graph breaks, '
                 f'{result["recompiled"]} recompilations{failed}')
    return '\n\n'.join(found)


def cells(row):
    """The cells of one comparison."""
    def number(value, form):
        return 'not finite' if value is None else form.format(value)
    return [*(number(row[name], '{:.4f}') for name in ('loss', 'compiled_loss')), str(row['gradients']), str(row['wrong']),
            *(number(row[name], '{:.2g}') for name in ('worst', 'rounding')), row['worst_name'],
            'yes' if row['same_bits'] else 'no', str(row['graphs']), str(row['breaks']), str(row['recompiled'])]
