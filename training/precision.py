"""Precision of a run: fp32 weights with or without autocast, or weights in half precision."""
import contextlib
import os

import torch

from variants import UserError


def deterministic(wanted):
    """Turn torch's deterministic algorithms on or off; call it before anything is computed on a GPU.

    Torch then does this: an operation without such an algorithm raises RuntimeError; sums by atomics (gradients of
    embeddings, index_add, scatter_add, the backward passes of flash and memory-efficient attention) become ordered sums;
    inductor times no kernels, whose choice could differ between runs; NCCL does not use NVLS. We add: a fixed cuBLAS
    workspace in the environment, no cuDNN timing, and no cuDNN attention, whose backward pass is not guaranteed to be
    deterministic. FlexAttention's Triton kernels have no atomics. Newly allocated memory is not filled with NaN, which
    costs a pass over it: our code reads none, as a test with the filling shows.
    """
    if wanted:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    if wanted != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(wanted)
        torch.utils.deterministic.fill_uninitialized_memory = not wanted
        torch.backends.cudnn.deterministic = wanted
        torch.backends.cuda.enable_cudnn_sdp(not wanted)
    if wanted:
        torch.backends.cudnn.benchmark = False


def check(config, job):
    """Refuse a residual stream in bf16 where nothing is computed in bf16; only warn where the device decides that."""
    if config.residual == 'float32' or job.dtype == torch.bfloat16 and not job.half_weights:
        return
    if job.half_weights or config.dtype != 'auto':
        raise UserError(f"residual={config.residual!r} is for dtype='bfloat16' with weights='float32', got "
                        f"dtype={config.dtype!r} and weights={config.weights!r}; set residual='float32'", 'residual')
    job.say(f'residual={config.residual!r} needs a GPU with bf16 and has no effect here: all is computed in {job.dtype}')


def scaler(config, job):
    """The loss scaler: torch.amp's dynamic one, on in float16, where gradients below 6e-8 would be 0."""
    return torch.amp.GradScaler(job.device.type, enabled=job.dtype == torch.float16 and config.loss_scaling)


def halve(model, dtype):
    """Cast every parameter to `dtype`, in place; buffers are unchanged."""
    for p in model.parameters():
        p.data = p.data.to(dtype)


@contextlib.contextmanager
def widened(optimizer, half, masters):
    """Context in which the optimizer sees half-precision weights and gradients in fp32; then the weights are rounded back.

    half: False does nothing. masters: keep the fp32 weights in the optimizer's state under `master` and continue from
    them; else only the rounded weights are kept, 2 bytes each, and an update below half their spacing is lost: 2^-11 of
    the weight in float16, 2^-8 in bfloat16 (Micikevicius et al. 2018). The optimizer's own state is fp32 either way; fp32
    weights and gradients exist during its step.
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
