"""Contraction plans by measurement: the fastest for a shape, a number of tokens, a type and a device."""
import contextlib
import itertools
import math
import statistics
import time

import torch

from kron import cost, lean
from kron.plan import PLANS, assign, column, considered, entry, kronecker, row, rule, shape_of, sizes_of

LOOKS = {512: 2.0, 2048: 1.35}  # tokens of a first pass: a plan that took that many times the best is not timed with more
MOST = 8192         # most tokens of a timing
SLOW = 2.0          # a plan whose first calls took that many times the best is dropped
ROUNDS = 3, 5, 60   # interleaved timings per plan: at least, at least among the best, at most; no more after ENOUGH_S
CLOSE = 1.25        # times the best: plans that are timed again
ENOUGH_S = 0.5
TURN_S = 2e-3       # of one timing, s: so many calls
HALF = (torch.bfloat16, torch.float16)
CACHES = 2 ** 27    # bytes of weights that a timing with fewer than 512 tokens cycles through, where the model has as many
GAIN = 0.03         # share of time that another plan than the rule's must save
BROADCAST = {('a_rows', 'a_planes', 'a_outer'): column, ('b_rows', 'b_planes', 'b_inner'): row}     # the same there
BACKEND = 'inductor'                # of torch.compile, where plans are timed compiled: as parallel.wrap's


def candidates(shape, tokens, device, compiled=False):
    """Names of the plans that may be the fastest for a shape and a number of tokens on a device.

    Where a single column or row is broadcast (lean.broadcasts), only the rule's of the plans that are then the same.
    """
    same = set()
    if compiled or torch.device(device).type == 'cuda':
        same = {name for names, fits in BROADCAST.items() if fits(shape) for name in names} - {rule(*sizes_of(shape))[0]}
    return [name for name in considered(shape, tokens, device) if name not in same]


def layers(numel, tokens, most):
    """Number of layers of that size that a timing cycles through: with few tokens CACHES bytes of them, `most` at most."""
    return 1 if tokens >= min(LOOKS) else max(1, min(most, CACHES // (4 * numel)))


class Trial:
    """Random factors and rows of one shape in which plans are timed; under autocast to dtype unless `half`.

    copies: layers that calls cycle through: decoding a token reads every weight of a model once, from memory where there
    are many; merged: materialise has its W already; compiled: every plan by torch.compile, seconds at its first call.
    """

    def __init__(self, shape, tokens, dtype, device, training, merged=False, half=False, copies=1, compiled=False):
        generator, self.device = torch.Generator().manual_seed(0), torch.device(device)
        self.training, self.merged, self.compiled = training, merged, compiled
        self.autocast = torch.autocast(self.device.type, dtype) if not half and dtype in HALF else contextlib.nullcontext()

        def make(*size):
            t = torch.randn(*size, generator=generator)
            return t.to(device, dtype if half else torch.float32).requires_grad_(training)
        A_size, B_size = sizes_of(shape)
        self.x, self.factors = make(tokens, shape.n * shape.q), [
            (make(*A_size), make(*B_size)) for _ in range(layers(math.prod(A_size) + math.prod(B_size), tokens, copies))]
        kept = layers(shape.m * shape.p * shape.n * shape.q, tokens, copies)
        with torch.no_grad(), self.autocast:
            self.W = [lean.form(A, B).to(lean.computed_in(self.x)) for A, B in self.factors[:kept * merged]]
            self.gradient = torch.ones_like(PLANS['materialise'].apply(self.x, *self.factors[0]))

    def call(self, name):
        """-> a function that applies the plan once, with its backward pass in training, to the next layer."""
        apply, weights = PLANS[name].apply, itertools.cycle(self.factors)
        if self.merged and name == 'materialise':
            apply, weights = (lambda x, W: x @ W.t()), itertools.cycle((W,) for W in self.W)
        if self.compiled:                               # dynamo counts versions per function: each plan is separate
            apply = torch.compile(apply, backend=BACKEND, dynamic=False)

        def forward():
            with torch.no_grad(), self.autocast:
                apply(self.x, *next(weights))

        def step():
            layer = next(weights)
            with self.autocast:
                y = apply(self.x, *layer)
            torch.autograd.grad(y, (self.x, *layer), self.gradient)
        return step if self.training else forward


def clock(device):
    """CPU time where one CPU thread does all the work, as other programs disturb it less, else wall-clock time."""
    return time.process_time if device.type == 'cpu' and torch.get_num_threads() == 1 else time.perf_counter


def seconds(call, times, device):
    """Time of `times` calls, in seconds; on a GPU until the last is done."""
    now = clock(device)
    wait = getattr(torch, device.type).synchronize
    wait()
    begin = now()
    for _ in range(times):
        call()
    wait()
    return now() - begin


def timings(calls, device, warm=1):
    """{name: seconds per call} of {name: call}, the median of interleaved rounds; one that is SLOW at first is dropped.

    warm: untimed calls before each timing, so that caches contain what this plan reads and not the last one's data.
    Not the minimum of the rounds: that was at times a third below a plan's usual time (records/LOG.md).
    """
    for call in calls.values():
        call()                                          # kernels are chosen and loaded
    first = dict.fromkeys(calls, math.inf)
    for _, name in itertools.product(range(3), calls):  # one short call may meet a hiccup of the machine
        if first[name] == math.inf or first[name] <= 10 * TURN_S:
            first[name] = min(first[name], max(seconds(calls[name], 1, device), 1e-9))
    calls = {name: call for name, call in calls.items() if first[name] <= SLOW * min(first.values())}
    rounds = {name: [] for name in calls}
    for least in ROUNDS[:2]:                            # the second time among the best only: other work
        by_turns(calls, rounds, first, least, device, warm)                     # on the machine may outlast the first rounds
        medians = {name: statistics.median(times) for name, times in rounds.items()}
        calls = {name: call for name, call in calls.items() if medians[name] <= CLOSE * min(medians.values())}
        if len(calls) == 1:
            break
    return first | medians


def by_turns(calls, rounds, first, least, device, warm):
    """Adds timings of each call to its rounds: `least` at least, until ENOUGH_S or the most of ROUNDS."""
    spent = 0.0
    for count in range(ROUNDS[2]):
        if count >= least and spent > ENOUGH_S:
            break
        for name, call in calls.items():
            times = max(warm if first[name] < TURN_S else 1, min(100, round(TURN_S / first[name])))
            if first[name] < TURN_S:
                seconds(call, warm, device)
            took = seconds(call, times, device)
            rounds[name].append(took / times)
            spent += took


def fastest(shape, tokens, dtype, device, training, merged=False, half=False, copies=1, compiled=False):
    """(name of the fastest plan here, {name: seconds per call}); arguments as Trial's.

    With many tokens only plans that were near the best in LOOKS are tried; compiled plans, whose compilation takes the
    time, are timed once. The rule's plan stays unless another saves GAIN. Earlier compiled code is dropped.
    """
    device, names = torch.device(device), candidates(shape, tokens, device, compiled)
    for size in [*(look for look in LOOKS if look < tokens and not compiled), min(tokens, MOST)]:
        trial = Trial(shape, size, dtype, device, training, merged, half, copies, compiled)
        found = timings({name: trial.call(name) for name in names}, device, len(trial.factors))
        names = [name for name in names if found[name] <= LOOKS.get(size, SLOW) * min(found.values())]
    if compiled:
        torch.compiler.reset()                          # after 8 versions of one function dynamo gives up
    best, plain = min(found, key=found.get), cost.ruled(shape, tokens, device, training, merged, compiled)
    return (plain if plain in found and found[best] > (1 - GAIN) * found[plain] else best), found


def measured(model, tokens, dtype, device, known=None, half=False, phases=(True, False), compiled=False,
             choose=None):
    """`known` plus the missing entries for the model's shapes: {entry: plan}, by timing each once.

    model: only its shapes are used, so that it may be on 'meta'; tokens: numbers of tokens per call; phases: with
    gradients, without; compiled: as the model will run. An entry does not record this: a choice is kept. choose: a
    function that names a plan, in place of fastest.
    """
    found, modules = dict(known or {}), kronecker(model)
    shapes = {shape_of(module.A, module.B): 0 for module in modules}
    merged = any(module.merge for module in modules) and not compiled       # torch.compile forms W at each call
    for shape, count, training in itertools.product(shapes, sorted(set(tokens)), phases):
        key = entry(shape, training, count, dtype, device)
        if key not in found:
            call = shape, count, dtype, device, training, merged and not training, half, len(modules), compiled
            found[key] = choose(*call) if choose else fastest(*call)[0]
    return found


def prepare(model, tokens, dtype, device, keep=True):
    """Plans for a model that is only evaluated: timed without gradients for these numbers of tokens per call.

    keep: a W that is formed is kept (KroneckerLinear.merge), as many bytes as the dense matrix; torch.compile forms it
    at each call.
    """
    for module in kronecker(model):
        module.merge = keep
    assign(model, measured(model, tokens, dtype, device, phases=(False,)), dtype, device)
