"""This process as a rank of a run: device, precision, communication, and each rank's share of a batch."""
import dataclasses
import datetime
import math
import os
import time
import warnings

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from reporting import hardware
from training import precision
from variants import UserError


@dataclasses.dataclass
class Job:
    """This process's rank, device and precision."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype                                  # of the computation: autocast's, or the weights' own
    half_weights: bool = False
    stop: dict = dataclasses.field(default_factory=dict)            # train.py's STOP: 'signal' is set when one arrived
    source: dict = None                                 # what init_from's weights had: init_from, kind, step, tokens, flops
    data: str = None                                    # the data set's digest, for env.json
    said: dict = None                                   # what init_from's place said besides: pretrained/said.py
    control: object = None                              # gloo group for small messages that must not wait for a GPU

    @property
    def main(self):
        return self.rank == 0

    def autocast(self):
        """The context of a forward pass: none where the weights themselves are in half precision."""
        return hardware.autocast(self.device, torch.float32 if self.half_weights else self.dtype)

    def agree(self, value, op=dist.ReduceOp.MAX):
        """The same number, or list of numbers, on every rank: the largest (or the sum) of all."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, op, group=self.control)
        return tensor.tolist()

    def say(self, text):
        if self.main:
            print(text, flush=True)


def start(config):
    """This process's Job: finds rank, device and precision, and joins the process group under torchrun."""
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if rank == 0 and os.environ.get('NANOKRON_FIRST_NODE'):         # run.sh asks on which node this is
        with open(os.environ['NANOKRON_FIRST_NODE'], 'w') as mark:
            mark.write('rank 0\n')
    precision.deterministic(config.deterministic)       # before CUDA and NCCL read the environment
    device = hardware.device(config.device, int(os.environ.get('LOCAL_RANK', 0)))
    half = config.weights != 'float32'
    job = Job(rank, world_size, device, hardware.dtype(config.weights if half else config.dtype, device), half)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')      # TF32; after backends.cuda.matmul.fp32_precision the getters raise
    if world_size > 1:
        timeout = datetime.timedelta(seconds=config.dist_timeout)
        backend = config.backend if device.type == 'cuda' else 'gloo'
        warnings.filterwarnings('ignore', message='Grad strides do not match')      # of factors with one term: harmless
        join(backend, rank, world_size, timeout)
        job.control = dist.new_group(backend='gloo', timeout=timeout)
    return job


def join(backend, rank, world_size, timeout):
    """Join the process group that torchrun describes in the environment.

    torchrun's agent keeps its store through a restart (torch 2.13). The entries of dead ranks, such as their addresses,
    are under the keys that the new ranks use: a rank that reads before the other has written connects to a dead one. So
    after a restart the keys begin with the restart's number. Agents on several nodes count separately (only the failed
    one counts), so there the store must not be shared: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, set by run.sh and
    docs/slurm.sh.
    """
    count, here = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), os.environ.get('LOCAL_WORLD_SIZE')
    where = {}
    if count != '0' and here == str(world_size) and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        agent = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), world_size, False, timeout)
        where = {'store': dist.PrefixStore(f'restart {count}', agent), 'rank': rank, 'world_size': world_size}
    dist.init_process_group(backend, timeout=timeout, **where)


def absent(seconds=10):
    """The ranks that do not say within these seconds that they are alive, when all are asked; [] where none can be asked.

    For those who waited for them in vain. They meet in the store of torchrun's agent, which lives when a rank is stopped.
    """
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return []
    patience = datetime.timedelta(seconds=seconds)
    where = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    agent = dist.PrefixStore(f'alive {os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")}',
                             dist.TCPStore(*where, None, False, patience))
    agent.set(os.environ['RANK'], 'here')
    until, ranks = time.monotonic() + seconds, [str(rank) for rank in range(int(os.environ['WORLD_SIZE']))]
    while time.monotonic() < until and not agent.check(ranks):
        time.sleep(0.1)
    return [int(rank) for rank in ranks if not agent.check([rank])]


def split_batch(config, world_size):
    """(sequences per micro-step, micro-steps of the whole job) for this many ranks, tokens per step unchanged.

    Accumulation counts the whole job, as in nanoGPT; where the ranks do not divide it, micro-steps get smaller instead.
    """
    accumulation, sequences = config.gradient_accumulation_steps, config.batch_size
    if accumulation % world_size == 0:
        return sequences, accumulation
    total = accumulation * sequences
    if total % world_size:
        raise UserError(f'{total} sequences per step (batch_size * gradient_accumulation_steps) do not divide over '
                        f'{world_size} ranks', 'gradient_accumulation_steps')
    micro = next(n for n in range(math.ceil(total / sequences / world_size), total + 1)
                 if total % (n * world_size) == 0) * world_size
    return total // micro, micro


def shard(model, config, job):
    """With parallel='fsdp': every block's parameters, and the rest, split over the ranks on dim 0 (FSDP2); in place.

    Under bf16 autocast a block's parameters are gathered in bf16, its vectors too; embeddings and head, which autocast
    reads in fp32 or which are the same tensor, in fp32.

    Raises UserError for weights in half precision, whose fp32 masters cannot be sharded (precision.widened).
    """
    if job.world_size > 1 and config.parallel == 'fsdp':
        if job.half_weights:
            raise UserError(f"weights={config.weights!r} does not go with parallel='fsdp'; take weights='float32' with "
                            f"dtype={config.weights!r}, or parallel='ddp'", 'weights')
        mesh = dist.device_mesh.init_device_mesh(job.device.type, (job.world_size,))
        policy = MixedPrecisionPolicy()
        if job.dtype == torch.bfloat16:                 # autocast's type; masters and sums of gradients are fp32
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
    return model


def compiles(config, job):
    """Whether this run uses torch.compile: as set, else on a GPU."""
    return config.compile if config.compile is not None else job.device.type == 'cuda'


def wrap(model, config, job):
    """(the model, compiled or not, the same with gradients averaged over the ranks).

    Buffers are not broadcast: every rank sets them to the same values. No static_graph: it saves the search for unused
    parameters, which is off, and its first step allows no micro-steps without a sync.
    """
    fast = torch.compile(model) if compiles(config, job) else model
    if job.world_size == 1 or isinstance(model, FSDPModule) or job.half_weights:        # see mean_gradients
        return fast, fast
    return fast, DistributedDataParallel(fast, device_ids=[job.device] if job.device.type == 'cuda' else None,
                                         broadcast_buffers=False, gradient_as_bucket_view=True)


def sync_gradients(net, wanted):
    """Whether the next backward pass communicates gradients: only needed in a step's last micro-step."""
    inner = getattr(net, '_orig_mod', net)              # below torch.compile
    if isinstance(inner, FSDPModule):
        inner.set_requires_gradient_sync(wanted)
    elif isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = wanted


def mean_gradients(model, job):
    """With half-precision weights: gradients, widened to fp32, averaged over the ranks in one call, without DDP.

    precision.widened changes the type of every weight and back, and autograd then drops the node with DDP's hooks: from
    the second step on DDP would silently average nothing.
    """
    if job.world_size == 1 or not job.half_weights:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    row = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(row)
    parts = (row / job.world_size).split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients)])
