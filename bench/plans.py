"""Part plans: every contraction plan of a Kronecker sum against the chosen one and the dense matrix, on a fixed list.

    python bench.py plans --json=plans.json

The list: Krony-PT's shapes of GPT-2's two MLP matrices and kron(out/2, in/2) of smaller ones; one token to 8,192, forward
without gradients (a W that is formed is kept there) and, from 512 tokens, forward + backward. The chosen plan is that of
timing.fastest, which does its own timing. Then the plans and the dense layer are timed in interleaved rounds in one
process, the median counts, and cells that miss an aim are timed again with three times the rounds. Calls cycle through as
many layers as make 128 MB, dense ones and sums separately: decoding a token reads every weight of a model once, from memory
and not from a cache. A plan that was SLOW at 512 tokens, or clearly behind at the previous number, is not timed with more
tokens. Takes three quarters of an hour on one thread.
"""
import copy
import itertools
import statistics
import sys
from dataclasses import dataclass

from bench import Output
from configurator import key
from variants import UserError

GPT2 = (3072, 768)                      # (out, in) of c_fc; c_proj is the transpose
# name -> (m, n, terms) of c_fc: rows of the 3072 side and columns of the 768 side; c_proj has m and n exchanged
KRONY = {
    '67M': [(64, 32, 1), (64, 48, 1), (96, 32, 1), (64, 64, 1), (128, 32, 1), (96, 48, 1), (96, 64, 1), (128, 48, 1)],
    '68M': [(128, 64, 1), (96, 96, 1), (192, 48, 1), (128, 96, 1), (192, 64, 1)],
    'MF1': [(128, 128, 1), (256, 64, 1)],
    'MF2': [(1024, 256, 1), (768, 384, 1), (1024, 384, 1)],
    '81M': [(768, 768, 1), (1536, 384, 1)],
    '86M': [(1024, 768, 1)],
    '96M': [(1536, 768, 1), (3072, 384, 1)],
    '80M-2': [(1024, 256, 2)], '86M-3': [(1024, 256, 3)], '92M-4': [(1024, 256, 4)], '256_64_10': [(64, 256, 10)],
}
SMALL = [(576, 1536), (128, 512), (384, 1536)]          # kron(out/2, in/2), both ways round
TRAINED = 512                           # tokens from which forward + backward is timed
BEHIND = 1.3                            # times the best: a plan that far behind is not timed with more tokens
LEAST_ROUNDS, MOST_ROUNDS = 3, 7
LAYERS = 64                             # most layers that calls cycle through, to read 128 MB of weights


@dataclass
class Settings(Output):
    """What is measured, where, and how long."""
    tokens: str = key('1,16,512,2048,8192', 'numbers of tokens')
    only: str = key('', 'names of shapes by commas: 67M, 81M, ..., small; by default all')
    cell_s: float = key(0.6, 'seconds of the rounds of one timing, at least three rounds', low=0)
    threads: int = key(1, 'torch threads on a CPU; one gives the steadiest ratios', low=1)
    device: str = key('cpu', "'cpu', 'cuda', 'cuda:1'")
    dtype: str = key('auto', "autocast type; 'auto' = bfloat16 where the GPU has it, float16 on older ones, "
                     'float32 on a CPU', choices=('auto', 'float32', 'bfloat16', 'float16'))
    seed: int = key(1337, 'of weights and inputs', low=0)
    choice: str = key('measure', "the chosen plan: 'measure' times it as training does, 'rule' is the rule's, sooner",
                      choices=('measure', 'rule'))


def matrices():
    """[(name, out, in, m, n, terms)] of the whole list."""
    found = []
    for name, shapes in KRONY.items():
        for m, n, terms in shapes:
            found += [(name, *GPT2, m, n, terms), (name, *reversed(GPT2), n, m, terms)]
    for sizes in SMALL:
        found += [('small', a, b, a // 2, b // 2, 1) for a, b in (sizes, sizes[::-1])]
    return found


def wanted(settings):
    """The matrices of `only`."""
    names = [word.strip() for word in settings.only.split(',') if word.strip()]
    known = list(dict.fromkeys(row[0] for row in matrices()))
    for name in names:
        if name not in known:
            raise UserError(f'only takes {", ".join(known)}, got {name!r}', 'only')
    return [row for row in matrices() if not names or row[0] in names]


def token_counts(settings):
    words = [word.strip() for word in settings.tokens.split(',')]
    if not all(word.isdecimal() and 0 < int(word) <= 10 ** 6 for word in words):
        raise UserError(f"tokens takes numbers of at least 1 such as '1,16,512', got {settings.tokens!r}", 'tokens')
    return sorted({int(word) for word in words})


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    wanted(settings)
    token_counts(settings)


# ---------------------------------------------------------------------------------------------------
# measuring

class Layer:
    """LAYERS copies of the dense matrix and of the Kronecker sum of one row, and calls that cycle through them."""

    def __init__(self, row, settings, device, dtype):
        import torch

        from kron.linear import KroneckerLinear
        from kron.plan import shape_of
        from kron.timing import layers
        from layers.basic import Linear
        torch.manual_seed(settings.seed)
        (self.name, self.out, self.inputs, *sizes), self.device, self.dtype = row, device, dtype
        dense, kron = Linear(self.inputs, self.out, False).to(device), KroneckerLinear(self.inputs, self.out, False, *sizes)
        self.dense, self.sums = (
            [copy.deepcopy(one) for _ in range(layers(sum(p.numel() for p in one.parameters()), 1, LAYERS))]
            for one in (dense, kron.to(device)))
        self.shape = shape_of(self.sums[0].A, self.sums[0].B)

    def call(self, plan, tokens, training):
        """-> a call of the plan, 'dense' for the dense matrix: forward without gradients, or forward + backward."""
        import torch

        from reporting import hardware
        x = torch.randn(tokens, self.inputs, generator=torch.Generator().manual_seed(0)).to(self.device)
        some = self.dense if plan == 'dense' else self.sums
        for module in some[:len(self.dense)] if plan == 'materialise' and not training else ():
            module.merge = True
            module.merged_weight(self.dtype)
        some = itertools.cycle(some[:len(self.dense)] if plan == 'materialise' else some)
        x.requires_grad_(training)
        with torch.no_grad(), hardware.autocast(self.device, self.dtype):
            gradient = torch.ones_like(self.dense[0](x))

        def forward():
            module = next(some)
            module.plans = (((tokens, plan),),) * 2
            with hardware.autocast(self.device, self.dtype), torch.set_grad_enabled(training):
                return module, module(x)

        def step():
            module, y = forward()
            torch.autograd.grad(y, [x, *module.parameters()], gradient)
        return step if training else forward


def rounds_of(calls, settings, device, more=1):
    """{name: ms per call}, the median of interleaved rounds."""
    from kron.timing import seconds
    once = {name: max(seconds(call, 1, device), 1e-9) for name, call in calls.items()}     # kernels are chosen at the first
    times = {name: max(1, min(100, round(settings.cell_s / 10 / len(calls) / t))) for name, t in once.items()}
    spent, found, count = 0.0, {name: [] for name in calls}, 0
    while count < LEAST_ROUNDS * more or (spent < settings.cell_s * more and count < MOST_ROUNDS * more):
        for name, call in calls.items():
            if once[name] * LAYERS < settings.cell_s / 10:
                seconds(call, LAYERS // 2, device)           # caches hold what this plan reads, not what the last one did
            took = seconds(call, times[name], device)
            found[name].append(1e3 * took / times[name])
            spent += took
        count += 1
    return {name: statistics.median(each) for name, each in found.items()}


def cell(layer, tokens, training, names, settings):
    """One number of tokens, forward or with backward: times, the choice, and the prediction by FLOPs."""
    from bench.verdicts import needs, ratio
    from kron.cost import ruled
    from kron.plan import order_flops, sizes_of
    from kron.timing import fastest
    chosen = ruled(layer.shape, tokens, layer.device, training, not training) if settings.choice == 'rule' else fastest(
        layer.shape, tokens, layer.dtype, layer.device, training, merged=not training, copies=LAYERS)[0]
    names = [chosen, *(name for name in names if name != chosen), 'dense']
    found = {'name': layer.name, 'matrix': layer.shape.words, 'phase': 'training' if training else 'forward',
             'tokens': tokens, 'chosen': chosen,
             'flops': min(order_flops(*sizes_of(layer.shape))) / (2 * layer.out * layer.inputs)}
    calls = {name: layer.call(name, tokens, training) for name in names}
    ms = rounds_of(calls, settings, layer.device)
    if any(need and ratio(found | {'ms': ms}, kind) < need for kind, need in needs(found, ms).items()):
        ms = rounds_of(calls, settings, layer.device, more=3)
    return found | {'ms': ms}


def measure(row, settings, device, dtype):
    """All cells of one matrix."""
    from kron.timing import SLOW, candidates
    layer, cells = Layer(row, settings, device, dtype), []
    for training in (False, True):
        slow, limit = set(), SLOW
        for tokens in token_counts(settings):
            if training and tokens < TRAINED:
                continue
            names = [name for name in candidates(layer.shape, tokens, device) if name not in slow]
            found = cell(layer, tokens, training, names, settings)
            cells.append(found)
            least = min(t for name, t in found['ms'].items() if name != 'dense')
            if tokens >= TRAINED:
                slow, limit = slow | {n for n in names if found['ms'][n] > limit * least}, BEHIND
    return cells


def run(settings, part):
    """Measure the list."""
    import time

    import torch

    from bench.modules import machine
    from bench.processes import keep
    from bench.verdicts import clauses
    from kron.timing import clock
    from reporting import hardware
    torch.set_num_threads(settings.threads)
    device = hardware.device(settings.device)
    dtype, begin, cells = hardware.dtype(settings.dtype, device), time.monotonic(), []
    for row in wanted(settings):
        print(f'bench.py: {row} ...', file=sys.stderr, flush=True)
        cells += measure(row, settings, device, dtype)
        keep({'part': 'plans', 'cells': cells, 'clauses': clauses(cells)}, settings.json)
    from bench.training import matmul_peak
    return {'part': 'plans', 'dtype': str(dtype).split('.')[-1], 'peak_flops': matmul_peak(device, dtype),
            'bandwidth': bandwidth(device), 'clock': clock(device).__name__, 'machine': machine(device),
            'processor': hardware.processor(),
            'seconds': time.monotonic() - begin, 'cells': cells, 'clauses': clauses(cells)}


def bandwidth(device):
    """Bytes per second that a large copy reads and writes."""
    import torch

    from kron.timing import seconds
    a = torch.empty(2 ** 28 if device.type == 'cuda' else 2 ** 24, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(max(seconds(lambda: b.copy_(a), 1, device), 1e-9) for _ in range(5))


def text(result):
    """One table per phase, then the verdicts."""
    from bench.verdicts import text
    return text(result)
