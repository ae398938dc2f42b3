"""The loss of a model on a data set's splits, over all ranks; uses separate random generators."""
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule


def dealt(batches, model, job):
    """(x, y, whether it counts) for every batch of this rank; sharded ranks all yield equally often.

    Every forward pass of a sharded model gathers its weights from all ranks, so a rank without a batch would make the
    others wait forever: it computes one token, which is not counted.
    """
    batches = iter(batches)
    waits = job.world_size > 1 and isinstance(model, FSDPModule)
    while True:
        batch = next(batches, None)
        more = batch is not None
        if not (job.agree(more) if waits else more):
            return
        yield (*batch, True) if more else (*torch.zeros(2, 1, 1, dtype=torch.int64), False)


@torch.no_grad()
def mean_loss(model, fast, batches, job):
    """(mean loss per token, accuracy, expert_load) over all ranks' batches; None when asked to stop.

    Full-size batches use the compiled model.
    """
    total, count, shape, loads = torch.zeros(2, device=job.device, dtype=torch.float64), 0, None, {}
    for x, y, counts in dealt(batches, model, job):
        shape = shape or x.shape
        with job.autocast():
            guesses, loss = (fast if counts and x.shape == shape else model)(x.to(job.device), y.to(job.device), guess=True)
        if not counts:
            continue
        right = (guesses == y.to(job.device)).sum()
        total += torch.stack((loss.double() * y.numel(), right.double()))
        count += y.numel()
        for (_, site), load in model.measures.items():  # evaluation has no other loss
            loads[site] = loads.get(site, 0) + load
        if job.world_size == 1 and job.stop.get('signal'):
            return None
    sums = job.agree([*total.tolist(), count], dist.ReduceOp.SUM)
    loads = [job.agree(load.tolist(), dist.ReduceOp.SUM) for load in loads.values()]
    return sums[0] / sums[2], sums[1] / sums[2], [max(load) * len(load) / sum(load) for load in loads]


def evaluate(model, fast, loaders, config, job):
    """{'train_loss', 'val_loss', 'train_accuracy', 'val_accuracy'}, and 'expert_load' where mlps are mixtures.

    expert_load: for each of them the tokens of its busiest expert over the mean per expert, on the validation split.
    eval_iters=0 takes the whole validation split in order, and 20 batches of training.
    """
    model.eval()
    tokens = 1024 if job.device.type == 'cpu' else 4096            # small windows: fewer, larger batches, but within caches
    losses, rows = {}, max(config.batch_size, tokens // config.block_size)
    for split in ('train', 'val'):
        whole = split == 'val' and config.eval_iters == 0
        batches = (loaders[split].sequential(rows, rank=job.rank, world_size=job.world_size) if whole else
                   loaders[split].fixed(config.eval_iters or 20, split, rank=job.rank, world_size=job.world_size))
        losses[split] = mean_loss(model, fast, batches, job)
    model.train()
    if None in losses.values():
        return None
    loads = {'expert_load': losses['val'][2]} if losses['val'][2] else {}
    return {f'{split}_{name}': value for i, name in enumerate(('loss', 'accuracy')) for split, value in (
        (split, found[i]) for split, found in losses.items())} | loads
