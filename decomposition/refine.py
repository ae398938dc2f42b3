"""Block-local refinement: every block of a compressed model learns to meet the dense model's block at the same tokens.

Block by block, in depth order: x' is the compressed model's stream before the block, with all earlier blocks refined, and
y the dense model's stream after it. min E||block(x') - y||^2 over the block's parameters by Adam, no gradient leaves the
block, so that one block's optimizer is in memory at a time. A tenth of the windows is held out, and the state with the
least error on it is kept: the start counts, so no block gets worse by that measure.
Source: AA-SVD, arXiv 2604.02119, which refines whole blocks by the plain error; steps, rates, the held-out tenth and the
error weighted by the curvature of the loss are ours.
"""
import contextlib
import dataclasses
import math
from dataclasses import dataclass

import torch

from checkpoints.digest import of_tensors
from decomposition import calibrate
from decomposition.calibrate import Hooks, Moments
from decomposition.progress import with_bar
from decomposition.sequential import Streams
from decomposition.stored import Store
from layers.losses import Losses
from lowrank.svd import GRADIENT_RIDGE, with_ridge
from variants import UserError

STEP_TOKENS = 1024                      # of a step, up to a whole window
LOOKS = 20                              # how often the held-out error is measured
PATIENCE = 7                            # looks in a row without a lower one: the block is done
LEAST_RMS = 0.01                        # a bias of zeros moves as entries of this size
CURVATURE_TOKENS = 8192                 # on which the curvature at the ends of the blocks is measured
FACTOR = 0.3                            # learning rate of a factor of a product, over that of a matrix


@dataclass
class Refinement:
    """How blocks are refined.

    steps: of Adam per block, STEP_TOKENS tokens each; learning_rate: its peak, as a share of each tensor's rms, factors
    FACTOR times that, on a cosine to 0; parameters: 'mlp' trains the MLP of a block, 'block' all of it; error: 'mse', or
    'curvature', tr(H E[e e^T]) with H = E[g g^T] of the loss's gradients at the dense block's outputs, which is twice the
    nats that the error e costs to second order; seed: of the order of the text.
    """
    steps: int = 200
    learning_rate: float = 0.01
    parameters: str = 'mlp'
    error: str = 'mse'
    seed: int = 1337


def refine(dense, model, batches, how, folder=None, say=None, write=True):
    """Refine `model` in place, block by block; returns one row per block: block, before, after, step.

    dense, model: GPTs of one n_layer and n_embd on one device, which may share frozen modules; batches: [(x, y)] of
    calibration tokens; how: a Refinement. Parameters that do not train, or that other modules use too, stay as they are.
    before, after: held-out error over the mean square of the outputs' change by the dense block. folder: each block is
    written there once done (write=False: read only), and a later call with the same models, text and settings goes on
    behind it, with equal bits. Memory: both streams, the dense one once more, with 'mlp' the attention's outputs, one
    block's Adam. Cost: three passes of the block per step. Raises UserError for text of fewer than two windows.
    """
    train, held = windows(batches)
    place = folder and Store(folder, identity(dense, model, batches, how), write)
    root = None if how.error == 'mse' else roots(dense, batches, place)
    streams, rows = Streams(dense, model, [*train, *held]), []
    with Hooks(dense, model):
        for index in with_bar(range(len(model.transformer.h)), 'refine', 'block'):
            before = list(streams.streams[0])
            streams.move(0)                             # the dense stream after the block is the target
            block = Block(streams, before, len(train), how, root and root[index])
            row = place.load(block, index) if place else None
            if row is None:
                row = {'block': index, **fit(block, how, torch.Generator().manual_seed(how.seed + index))}
                if place:
                    place.save(block, index, row)
            rows.append(row)
            if say and row['before']:
                say(f'h.{index}: held-out error {row["before"]:.4f} -> {row["after"]:.4f} at step {row["step"]}')
            streams.move(1)
            streams.next()
    return rows


def windows(batches):
    """(pieces that train, pieces held out) [(x, None)] of STEP_TOKENS tokens, up to a window; a tenth is held out."""
    rows = torch.cat([x for x, _ in batches]) if batches else torch.zeros(0, 1)
    if len(rows) < 2:
        raise UserError(f'refine holds a tenth of the calibration text out, in whole windows of {rows.shape[1]:,} tokens, '
                        f'and got {len(rows)} of them; raise calibration_tokens', 'calibration_tokens')
    out, size = max(1, len(rows) // 10), max(1, STEP_TOKENS // rows.shape[1])
    return tuple([(piece, None) for piece in part.split(size)] for part in (rows[:-out], rows[-out:]))


# ---------------------------------------------------------------------------------------------------
# one block

class Block:
    """The current block of the compressed model: what trains, its error on a piece of text.

    streams: Streams, the dense one already behind the block; before: the dense stream before it; train: number of pieces
    that train, the rest is held out; root: (C, C) or None, R with R R^T = H, by which errors are weighed.
    """

    def __init__(self, streams, before, train, how, root):
        self.streams, self.root, self.whole = streams, root, how.parameters == 'block'
        self.model, self.target = streams.models[1], streams.streams[0]
        self.block = self.model.transformer.h[streams.index]
        pieces = range(len(self.target))
        self.train, self.held = pieces[:train], pieces[train:]
        changes = [self.weighed(self.target[i][0] - before[i][0]) for i in self.held]
        self.scale = sum(c.double().sum().item() for c in changes) / sum(c.numel() for c in changes) or 1.0
        self.parameters = self.trained()

    def trained(self):
        """{name: parameter} that trains: those of the MLP, or all; none that is frozen or that another module uses."""
        part = self.block if self.whole else self.block.mlp
        uses = [id(p) for m in self.model.modules() for p in m.parameters(recurse=False)]
        return {name: p for name, p in part.named_parameters() if p.requires_grad and uses.count(id(p)) == 1}

    def weighed(self, error):
        """Squared errors, (B, T, C), in the weighted coordinates."""
        return (error if self.root is None else error @ self.root).square()

    def error(self, piece):
        """The mean squared error on one piece, over the mean square of what the dense block adds."""
        x, ctx = self.streams.streams[1][piece]
        if self.whole:                                  # the context stays as it is: its values must have no graph
            out = self.block(x, dataclasses.replace(ctx, losses=Losses(), measures={}, shared=dict(ctx.shared)))
        else:
            with self.streams.attention_done(self.model, piece):
                out = self.block(x, ctx)
        return self.weighed(out - self.target[piece][0]).mean() / self.scale

    @torch.no_grad()
    def held_out(self):
        sizes = [self.target[i][0].numel() for i in self.held]
        return sum(self.error(i).item() * n for i, n in zip(self.held, sizes)) / sum(sizes)

    @torch.no_grad()
    def normalise(self):
        """nGPT: its matrices to unit vectors, as GPT.normalise_weights does."""
        if self.block.ngpt:
            self.model.normalise_weights(f'h.{self.streams.index}.')

    def copies(self):
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def put(self, values):
        for name, p in self.parameters.items():
            p.copy_(values[name])

    @contextlib.contextmanager
    def alone(self):
        """Context in which nothing but these parameters has gradients."""
        wanted, mine = [p for p in self.model.parameters() if p.requires_grad], {id(p) for p in self.parameters.values()}
        try:
            for p in wanted:
                p.requires_grad_(id(p) in mine)
            with torch.enable_grad():
                yield
        finally:
            for p in wanted:
                p.requires_grad_(True)
                p.grad = None


def fit(block, how, generator):
    """Train one block's parameters and leave the best state in them -> {'before', 'after', 'step'}."""
    first = best = block.held_out()
    kept, at, looks, every = block.copies(), 0, 0, max(1, how.steps // LOOKS)
    if not block.parameters or not first:
        return {'before': first, 'after': first, 'step': 0}
    with block.alone():
        optimizer = adam(block, how.learning_rate)
        rates = [group['lr'] for group in optimizer.param_groups]
        for step, piece in zip(range(how.steps), order(block.train, generator)):
            for group, rate in zip(optimizer.param_groups, rates):
                group['lr'] = rate * (1 + math.cos(math.pi * step / how.steps)) / 2
            block.error(piece).backward()
            optimizer.step()
            optimizer.zero_grad()
            block.normalise()
            if (step + 1) % every == 0 or step + 1 == how.steps:
                now = block.held_out()
                looks = 0 if now < best else looks + 1
                if now < best:
                    best, at, kept = now, step + 1, block.copies()
                if looks == PATIENCE or not math.isfinite(now):
                    break
    block.put(kept)
    return {'before': first, 'after': best, 'step': at}


def adam(block, learning_rate):
    """Adam whose steps are a share of each tensor's rms, so that one rate fits models and structures of any scale."""
    groups = []
    for name, p in block.parameters.items():
        owner, _, own = name.rpartition('.')
        part = (block.block if block.whole else block.block.mlp).get_submodule(owner)
        kind = FACTOR if getattr(part, 'tags', {}).get(own) == 'factor' else 1.0
        size = max(p.detach().square().mean().sqrt().item(), LEAST_RMS)
        groups.append({'params': [p], 'lr': learning_rate * kind * size})
    return torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)


def order(pieces, generator):
    """The pieces again and again, each time in another order."""
    while True:
        yield from (pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist())


# ---------------------------------------------------------------------------------------------------
# curvature

def roots(dense, batches, place=None):
    """[R (C, C)] per block with R R^T = E[g g^T] + ridge, scaled to a mean diagonal of 1: g at the block's outputs."""
    found = place.curvature() if place else None
    if found is None:
        seen, rows = [], 0
        for x, y in batches:
            if rows < CURVATURE_TOKENS:
                seen.append((x, y))
                rows += x.numel()
        moments = [Moments() for _ in dense.transformer.h]
        with Hooks(dense) as hooks:
            for block, moment in zip(dense.transformer.h, moments):
                hooks.behind(block, lambda y, moment=moment: calibrate.watch(y, moment))
            calibrate.run(dense, hooks, seen, True, range(len(dense.transformer.h)))
        found = [calibrate.second(moment) for moment in moments]
        if place:
            place.keep_curvature(found)
    like = next(dense.parameters())
    made = [with_ridge(H.cpu(), ridge=GRADIENT_RIDGE) for H in found]
    return [torch.linalg.cholesky(H / H.diagonal().mean()).to(like) for H in made]


def identity(dense, model, batches, how):
    """Whatever a refined block depends on, as one digest."""
    tensors = {f'{name} {key}': t for name, m in (('dense', dense), ('model', model)) for key, t in m.state_dict().items()}
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    text = {f'text {i} {j}': t for i, batch in enumerate(batches) for j, t in enumerate(batch)}
    sizes = [STEP_TOKENS, LOOKS, PATIENCE, LEAST_RMS, CURVATURE_TOKENS, FACTOR]
    return of_tensors({**tensors, **text}, dataclasses.asdict(how), sizes, trains, model.config.linear, model.config.mlp)
