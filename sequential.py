"""Compress a model layer by layer: each site is fitted to the dense model's outputs under the inputs that it will get.

What the compressed layers in front of a site do wrong is known when the site is fitted, so that it can make up for a part
of it. Source of the idea for low rank: SVD-LLM, Wang et al. 2024, arXiv 2403.07378 (its sequential update).
"""
import torch

import calibrate
from calibrate import Hooks, Moments, Stats, device_of
from variants import UserError


class Reached(Exception):
    """What was waited for is there: the rest of the forward pass need not be computed."""


class Streams:
    """The residual streams of a dense model and of the one that is being compressed, side by side, block by block.

    dense, mixed: models of one shape that share no module; mixed holds compressed sites where they are done and the
    dense ones elsewhere. Memory: 2 x 4 bytes x tokens x n_embd for the streams, and three in^2 in float64.
    Cost: for each group of sites that share an input a part of a block in both models, and the block once more.
    """

    def __init__(self, dense, mixed, batches):
        self.models, self.index = (dense, mixed), 0
        self.streams = [[stopped_at(model, model.transformer.h[0], x.to(device_of(model))) for x, _ in batches]
                        for model in self.models]       # [[(x, ctx) of a batch]] in front of the block at hand

    @torch.no_grad()
    def advance(self):
        """Carry both streams through the block at hand: no site in it may change any more."""
        for model, stream in zip(self.models, self.streams):
            with Hooks(model):
                for i, (x, ctx) in enumerate(stream):
                    stream[i] = model.transformer.h[self.index](x, ctx), ctx
        self.index += 1

    def stats(self, site):
        """Stats of a site of the block at hand, with the cross moment of both models' inputs."""
        here, there, cross = Moments(), Moments(), Moments()
        for batch in zip(*self.streams):
            source, x = (self.input(model, site, *stream) for model, stream in zip(self.models, batch))
            there.add(source)
            here.add(x)
            cross.add(source, x)
        return Stats(here.count, here.mean, here.covariance, None, cross.covariance, there.mean, there.covariance)

    def input(self, model, site, x, ctx):
        """What the site is fed, (B, T, in), for the block's input x."""
        found = stopped_at(model.transformer.h[self.index], model.sites()[site], x, ctx)
        if found is None:
            raise UserError(f'{site} is never called by its block, so that there is nothing to calibrate; leave it dense '
                            'or take decompose=van_loan', 'decompose')
        return found[0]


@torch.no_grad()
def stopped_at(outer, inner, *arguments):
    """The arguments of the first call of module `inner` while outer(*arguments) runs, which ends there; None without one."""
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


def walk(dense, mixed, todo, batches, gradients=False, passes=calibrate.passes):
    """Yield (site, Stats) of the sites of todo, block by block; who asks for the next one has put its site into `mixed`.

    With gradients the Stats hold the gradient covariance of the dense model, of `passes`, as calibrate.passes gives them.
    """
    calibrate.check_enough(dense, todo, batches)
    streams, known = Streams(dense, mixed, batches), {}
    found = passes(dense, todo, batches, gradients=True) if gradients else None
    order = [[site for site in group if site in todo] for group in calibrate.groups(dense, batches[0][0][:1])]
    for index in range(len(dense.transformer.h)):
        for group in order:
            if not group or not group[0].startswith(f'h.{index}.'):
                continue
            stats = streams.stats(group[0])
            for site in group:
                while gradients and site not in known:
                    known.update(next(found))
                stats.gradient = known.pop(site).gradient if gradients else None
                yield site, stats
        streams.advance()
