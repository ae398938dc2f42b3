"""Calibration: input statistics of a model's linears on real text, collected by hooks, for the methods that need them.

One pass over the calibration tokens serves all sites. Sites with the very same input tensor (c_q, c_k, c_v) are one
*group* and share one covariance. Sums are kept in float64 and added batch by batch, so that memory does not grow with
the number of tokens: 8 in^2 bytes per group, plus 8 out^2 per site with gradients.
"""
import contextlib
import dataclasses

import torch

from data.loader import Loader
from decomposition import wide
from decomposition.moments import Moments, Stats
from decomposition.progress import with_bar
from variants import UserError

BATCH_TOKENS = 4096
MEMORY = 2 << 30                        # bytes of sums; more sites are taken in several passes
FEW = 8                                 # tokens by which a large model shows which sites share an input


# ---------------------------------------------------------------------------------------------------
# the text

def batches(dataset, tokens, block_size, seed=1337, split='train', at_once=BATCH_TOKENS):
    """[(x, y)] of int64 (B, T): `tokens` tokens, up to a whole window, in windows drawn without replacement.

    A pure function of its arguments, independent of training's random numbers. at_once: tokens of a batch, at least a
    window. Raises UserError when the split is too short.
    """
    rows = -(-tokens // block_size)
    size = max(1, min(rows, at_once // block_size))
    loader = Loader(dataset, split, block_size, size, seed=seed)
    if rows > loader.windows:
        raise UserError(f'calibration_tokens can be at most {loader.windows * block_size:,}, the size of split {split!r} of '
                        f'{dataset.folder} in windows of {block_size}, got {tokens:,}', 'calibration_tokens')
    found = [loader.batch(step) for step in range(-(-rows // size))]
    last = rows - size * (len(found) - 1)
    return found[:-1] + [tuple(t[:last] for t in found[-1])]


def check_enough(model, sites, batches):
    """Refuse a text with fewer tokens than the widest of the sites has inputs: its covariance is singular otherwise."""
    count = sum(x.numel() for x, _ in batches)
    modules = model.sites(experts=True)
    widest = max(sites, key=lambda site: modules[site].in_features)
    width = modules[widest].in_features
    if count < width:
        raise UserError(f'calibration_tokens must be at least {width:,}, the inputs of {widest}, better ten times that, '
                        f'got {count:,}', 'calibration_tokens')


# ---------------------------------------------------------------------------------------------------
# hooks

class Hooks:
    """Context with hooks on some modules and the model in eval mode. A second forward pass for gradients calls none."""

    def __init__(self, *models):
        self.models, self.handles = models, []

    def before(self, module, function):
        """function(input) at every call of the module."""
        self.handles.append(module.register_forward_pre_hook(
            lambda _, inputs: None if wide.Again.now else function(inputs[0])))

    def behind(self, module, function):
        """function(output) at every call of the module; its result, if not None, replaces the output."""
        self.handles.append(module.register_forward_hook(
            lambda _, inputs, output: None if wide.Again.now else function(output)))

    def __enter__(self):
        self.training = [model.training for model in self.models]
        for model in self.models:
            model.eval()
        return self

    def __exit__(self, *failure):
        for handle in self.handles:
            handle.remove()
        for model, training in zip(self.models, self.training):
            model.train(training)


def device_of(model):
    return next(model.parameters()).device


@torch.no_grad()
def groups(model, x):
    """[[site, ...]] in the order of their first call: sites of one group share their input tensor. x (B, T) tokens."""
    calls = []                                          # (site, input); inputs are kept alive, so that no id occurs twice
    with Hooks(model) as hooks:
        for site, module in model.sites(experts=True).items():
            hooks.before(module, lambda x, site=site: calls.append((site, x)))
        model(x[:, :FEW].to(device_of(model)) if wide.is_wide(model) else x.to(device_of(model)))
    found = {}
    for site, x in calls:
        if not any(site in sites for sites in found.values()):
            found.setdefault(id(x), []).append(site)
    idle = model.sites(experts=True).keys() - {site for site, _ in calls}
    return list(found.values()) + [[site] for site in sorted(idle)]


# ---------------------------------------------------------------------------------------------------
# one model

def passes(model, sites, batches, gradients=False, memory=MEMORY):
    """Yield {site: Stats} until all of `sites` are done: one pass over the batches, or several to limit memory.

    model: dense or not, unchanged; batches: [(x, y)] tokens (B, T). Sums take at most `memory` bytes at once (a
    single group may take more). Cost: a forward pass of the model plus 2 in^2 FLOPs per token and group in float64; with
    gradients a backward pass without weight gradients, and 2 out^2 per token and site.
    Raises UserError for too few tokens, or a site that the model never calls.
    """
    check_enough(model, sites, batches)
    for chunk in chunks(model, groups(model, batches[0][0][:1]), sites, gradients, memory):
        yield one_pass(model, chunk, batches, gradients)


def chunks(model, groups, sites, gradients, memory):
    """Yield the groups [[site, ...]] of each pass, whose sums take at most `memory` bytes (a single group may take more)."""
    modules, chunk, used = model.sites(experts=True), [], 0
    for group in groups:
        group = [site for site in group if site in sites]
        if not group:
            continue
        size = sums_of(modules, group, gradients)
        if chunk and used + size > memory:
            yield chunk
            chunk, used = [], 0
        chunk, used = chunk + [group], used + size
    if chunk:
        yield chunk


def sums_of(modules, group, gradients):
    """Bytes of the sums of a group."""
    return 8 * modules[group[0]].in_features ** 2 + gradients * sum(8 * modules[s].out_features ** 2 for s in group)


def one_pass(model, groups, batches, gradients):
    """{site: Stats} of these groups in one pass."""
    inputs = [Moments() for _ in groups]
    outputs = {site: Moments() for group in groups for site in group} if gradients else {}
    modules = model.sites(experts=True)
    with Hooks(model) as hooks:
        for group, moments in zip(groups, inputs):
            hooks.before(modules[group[0]], moments.add)
        for site, moments in outputs.items():
            hooks.behind(modules[site], lambda y, moments=moments: watch(y, moments))
        run(model, hooks, batches, gradients, sorted({int(site.split('.')[1]) for group in groups for site in group}))
    found = {}
    for group, moments in zip(groups, inputs):
        if not moments.count:
            raise UserError(f'{group[0]} is never called by its model, so that there is nothing to calibrate; leave it '
                            'dense or take decompose=van_loan', 'decompose')
        mean, covariance = moments.mean, moments.covariance
        for site in group:
            found[site] = Stats(moments.count, mean, covariance, second(outputs[site]) if gradients else None)
    return found


def second(moments):
    """E[x x^T]"""
    return moments.covariance + torch.outer(moments.mean, moments.mean)


def watch(y, moments):
    """Add the gradient of y to the moments once it is computed; y is unchanged."""
    y.register_hook(lambda gradient: moments.add(gradient))


class Reached(Exception):
    """Raised when what is needed is there: the rest of the forward pass is skipped."""


def run(model, hooks, batches, gradients, blocks):
    """The model over all batches as far as `blocks`, rising; with gradients backwards down to them, through activations."""
    device = device_of(model)
    if not gradients:
        if blocks[-1] + 1 < len(model.transformer.h):
            hooks.before(model.transformer.h[blocks[-1] + 1], stop)
        with torch.no_grad():
            for x, _ in with_bar(batches, 'calibration', 'batch'):
                with contextlib.suppress(Reached):
                    model(x.to(device))
        return
    wanted, config = {p: p.requires_grad for p in model.parameters()}, model.config
    hooks.before(model.transformer.h[blocks[0]], begin)
    try:
        model.config = dataclasses.replace(config, recompute=False)     # recomputation would call the hooks twice
        for p in wanted:
            p.requires_grad_(False)
        with torch.enable_grad():
            for x, y in with_bar(batches, 'calibration with gradients', 'batch'):
                _, loss = model(x.to(device), y.to(device))
                (loss * y.numel()).backward()           # of the summed loss, whatever the batch's size
    finally:
        model.config = config
        for p, flag in wanted.items():
            p.requires_grad_(flag)


def stop(x):
    raise Reached


def begin(x):
    """The block's input x is where gradients end."""
    x.requires_grad_()
