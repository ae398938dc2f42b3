"""Compress a model layer by layer: each site is fitted on the inputs x' from the already compressed earlier layers.

METHOD_sequential fits to the dense model's outputs W x and corrects a part of the earlier layers' errors.
METHOD_streamed fits to W x': it corrects nothing, but keeps all of W where x' says little about x. Source of the idea for
low rank: SVD-LLM, Wang et al. 2024, arXiv 2403.07378 (its sequential update).
"""
import contextlib

import torch

from decomposition import calibrate
from decomposition.calibrate import Hooks, Moments, Reached, Stats, device_of
from variants import UserError


class Streams:
    """The residual streams of a dense model and of the one being compressed, block by block.

    dense, mixed: models of one shape that share no module; mixed has compressed sites where they are done and the
    dense ones elsewhere; compared=False: only mixed. Memory: 4 x 4 bytes x tokens x n_embd for the streams and the
    attention's outputs, and three in^2 in float64; alone 2 x 4 bytes and one in^2. Cost: the block once in each model,
    once more without attention for each group of sites after it, and for each group in attention the part before it.
    """

    def __init__(self, dense, mixed, batches, compared=True):
        self.models, self.index, self.attended = (dense, mixed) if compared else (mixed,), 0, {}
        self.streams = [[stopped_at(model, model.transformer.h[0], x.to(device_of(model))) for x, _ in batches]
                        for model in self.models]       # [[(x, ctx) of a batch]] before the current block

    def advance(self):
        """Advance both streams through the current block: no site in it may change any more."""
        for which in range(len(self.models)):
            self.move(which)
        self.next()

    @torch.no_grad()
    def move(self, which):
        """Advance one of the streams through the current block."""
        model, stream = self.models[which], self.streams[which]
        with Hooks(model):
            for i, (x, ctx) in enumerate(stream):
                with self.attention_done(model, i):
                    stream[i] = model.transformer.h[self.index](x, ctx), ctx

    def next(self):
        """The next block is the current one, once every stream has moved."""
        self.index, self.attended = self.index + 1, {}

    def stats(self, site, source=None):
        """Stats of a site of the current block; of both models with the cross moment of their inputs.

        source: known Stats of the dense model there, whose sums need not be computed again.
        """
        here, there, cross = Moments(), Moments(), Moments()
        if self.in_attention(site):
            self.attended = {}
        for batch in range(len(self.streams[0])):
            *others, x = (self.input(model, site, batch, *stream[batch]) for model, stream in zip(self.models, self.streams))
            here.add(x)
            for old in others:
                cross.add(old, x)
                if source is None:
                    there.add(old)
        if len(self.models) == 1:
            return Stats(here.count, here.mean, here.covariance)
        mean, covariance = (there.mean, there.covariance) if source is None else (source.mean, source.covariance)
        return Stats(here.count, here.mean, here.covariance, None, cross.covariance, mean, covariance)

    def input(self, model, site, batch, x, ctx):
        """The site's input, (B, T, in), for the block's input x."""
        with contextlib.nullcontext() if self.in_attention(site) else self.attention_done(model, batch):
            found = stopped_at(model.transformer.h[self.index], model.sites(experts=True)[site], x, ctx)
        if found is None:
            raise UserError(f'{site} is never called by its block, so that there is nothing to calibrate; leave it dense '
                            'or take decompose=van_loan', 'decompose')
        return found[0]

    def in_attention(self, site):
        return site.startswith(f'h.{self.index}.attn.')

    @contextlib.contextmanager
    def attention_done(self, model, batch):
        """Context in which the current attention returns its cached output for this batch: none of its sites changes."""
        attention, key = model.transformer.h[self.index].attn, (id(model), batch)

        def forward(*arguments):
            if key not in self.attended:
                self.attended[key] = type(attention).forward(attention, *arguments)
            return self.attended[key]
        attention.forward = forward                     # overrides the class's
        try:
            yield
        finally:
            del attention.forward


@torch.no_grad()
def stopped_at(outer, inner, *arguments):
    """The arguments of the first call of module `inner` while outer(*arguments) runs, then aborted; None without one."""
    kept = []

    def keep(_, inputs):
        kept.append(inputs)
        raise Reached
    handle = inner.register_forward_pre_hook(keep)
    try:
        with Hooks(outer):
            outer(*arguments)
    except Reached:
        pass
    finally:
        handle.remove()
    return kept[0] if kept else None


def walk(dense, mixed, todo, batches, gradients=False, passes=calibrate.passes, compared=True):
    """Yield (site, Stats) of the sites of todo, block by block; the caller puts each into `mixed` before the next.

    With gradients the Stats include the gradient covariance of the dense model, from `passes`, as calibrate.passes gives
    them; cached ones are used without gradients too. compared=False: only the compressed model's inputs are needed.
    """
    calibrate.check_enough(dense, todo, batches)
    streams, known = Streams(dense, mixed, batches, compared), {}
    kept = gradients or compared and passes is not calibrate.passes
    found = passes(dense, todo, batches, gradients) if kept else None
    order = [[site for site in group if site in todo] for group in calibrate.groups(dense, batches[0][0][:1])]
    for index in range(len(dense.transformer.h)):
        for group in order:
            if not group or not group[0].startswith(f'h.{index}.'):
                continue
            while kept and not set(group) <= known.keys():
                known.update(next(found))
            stats = streams.stats(group[0], known.get(group[0]))
            for site in group:
                stats.gradient = known.pop(site).gradient if kept else None
                yield site, stats
        streams.advance()
