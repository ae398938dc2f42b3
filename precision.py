"""Which numbers a run keeps: fp32 weights with or without autocast, or weights that are in half precision themselves."""
import contextlib

import torch


def scaler(config, job):
    """The loss scaler: on in float16, where gradients below 6e-8 would be 0; torch.amp's, doubled and halved as it goes."""
    return torch.amp.GradScaler(job.device.type, enabled=job.dtype == torch.float16 and config.loss_scaling)


def halve(model, dtype):
    """Keep every parameter in `dtype`, in place; buffers stay."""
    for p in model.parameters():
        p.data = p.data.to(dtype)


@contextlib.contextmanager
def widened(optimizer, half, masters):
    """Inside, the optimizer sees half-precision weights and gradients in fp32; afterwards the weights are rounded back.

    half: False does nothing. masters: keep the fp32 weights in the optimizer's state under `master` and go on from them;
    else the rounded weights are all there is, 2 bytes each, and a step below half their spacing is lost: 2^-11 of the
    weight in float16, 2^-8 in bfloat16 (Micikevicius et al. 2018). The optimizer's own state is fp32 either way; fp32
    weights and gradients exist while it steps.
    """
    if not half:
        yield
        return
    narrow = {}
    for p in (p for group in optimizer.param_groups for p in group['params']):
        narrow[p], gradient, p.grad = p.data, p.grad, None          # a gradient must have its tensor's type
        p.data = optimizer.state.get(p, {}).get('master', p.data.float())
        p.grad = None if gradient is None else gradient.float()
    yield
    for p, rounded in narrow.items():
        wide, p.grad = p.data, None
        p.data = rounded.copy_(wide)
        if masters and optimizer.state.get(p):                      # no state yet: the first step overflowed
            optimizer.state[p]['master'] = wide
