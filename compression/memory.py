"""How much memory a study takes on its device, before it begins: for models in half precision, which run block by block.

Estimates from sizes alone: exact for weights and sums, a bound by hand for activations and for the fits in float64.
"""
from dataclasses import dataclass

import torch

from compression.sizes import counted
from decomposition import calibrate
from layers.sums import SEQUENTIAL, STREAMED
from model import GPT
from variants import UserError

RESERVE = 0.5e9         # of a GPU: the context of CUDA, and what its allocator cannot use
FIT = 6                 # matrices in float64 of the widest site that a fit holds at once: C, factor, SVD and copies
BETWEEN = 3             # activations of a block with their gradients, over the inputs and outputs of its matrices
NAMES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


@dataclass
class Plan:
    """Bytes on the device. passes: over the text, for statistics of inputs and of gradients; disk: of the calibration."""
    weights: int
    block: int                              # one block in float32
    activations: int                        # of one window, with gradients
    product: int                            # one covariance product and its rows in float64
    sums: int                               # of the largest pass
    fit: int
    streams: int                            # of layer-by-layer methods: activations of the whole text, compressed weights
    passes: tuple
    disk: int
    memory: float                           # allowed for the sums of a pass
    limit: float | None                     # of the device, None where it is not known

    @property
    def total(self):
        """At the worst moment: a pass with gradients, or a fit."""
        return self.weights + self.streams + max(self.block + self.activations + self.product + self.sums, self.fit)

    @property
    def fits(self):
        return self.limit is None or self.total + RESERVE <= self.limit


def limit(study, device=None):
    """Bytes to plan for: memory_gb, or what the GPU has; None on a CPU. device: torch.device, None = the study's."""
    if study.memory_gb:
        return study.memory_gb * 1e9
    from reporting import hardware
    device = device or hardware.device(study.device)
    return float(torch.cuda.mem_get_info(device)[1]) if device.type == 'cuda' else None


def plan(config, study, limit=None):
    """The Plan of a study for a dense model's GPTConfig whose block_size is the study's. Without weights or a device."""
    with torch.device('meta'):
        model = GPT(config).eval()
    dense = counted(model, study.sites)
    width, length = NAMES[study.weights].itemsize, config.block_size
    blocks = list(model.transformer.h)
    inside = max(sum(m.in_features + m.out_features for s, m in model.sites().items() if s.startswith(f'h.{i}.'))
                 for i in range(len(blocks)))
    widest = max(max(m.in_features, m.out_features) for m in dense.values())
    weights = width * model.num_params()
    parts = {
        'weights': weights, 'block': 4 * max(sum(p.numel() for p in b.parameters()) for b in blocks) * (width < 4),
        'activations': 4 * length * (config.n_layer * config.n_embd + max(BETWEEN * inside, 3 * config.vocab_size)),
        'product': 8 * widest ** 2 + 16 * length * widest, 'fit': FIT * 8 * widest ** 2,
        'streams': layerwise(study) * (weights + 16 * study.calibration_tokens * config.n_embd)}
    groups = calibrate.groups(model, torch.zeros(1, 2, dtype=torch.long))
    groups = [[site for site in group if site in dense] for group in groups]
    rest = sum(parts[name] for name in ('weights', 'block', 'activations', 'product', 'streams'))
    memory = calibrate.MEMORY if limit is None else max(limit - RESERVE - rest, 1.0)
    each = [[sum(calibrate.sums_of(dense, group, kind) for group in chunk)
             for chunk in calibrate.chunks(model, groups, dense, kind, memory)] for kind in (False, True)]
    disk = sum(calibrate.sums_of(dense, group, True) for group in groups if group) // (1 + (width < 4))
    return Plan(**parts, sums=max(each[0] + each[1]), passes=tuple(map(len, each)), disk=disk, memory=memory, limit=limit)


def layerwise(study):
    """Whether a variant of the study compresses layer by layer."""
    texts = [str(given.get('decompose', '')) + str(given.get('at', '')) for given in study.variants.values()]
    return any(end in text for text in texts for end in (STREAMED, SEQUENTIAL))


def described(plan):
    """The lines of --dry_run."""
    def size(value):
        return f'{value / 1e9:.2f} GB'
    rest = f', {size(plan.streams)} for layer-by-layer methods' if plan.streams else ''
    whole = 'not known' if plan.limit is None else size(plan.limit)
    verdict = '' if plan.limit is None else ', which fits' if plan.fits else ', which does NOT fit'
    return [f'memory of the device: weights {size(plan.weights)}, one block in float32 {size(plan.block)}, activations '
            f'{size(plan.activations)}, a product in float64 {size(plan.product)}, sums {size(plan.sums)} per pass{rest}',
            f'calibration: {plan.passes[0]} passes over the text for inputs alone, {plan.passes[1]} with gradients; '
            f'{size(plan.disk)} on disk; a fit takes {size(plan.fit)} in place of the calibration',
            f'total {size(plan.total)} of {whole}{verdict}']


def allowed(config, study, device):
    """Bytes that the sums of a pass may take; raises UserError where a study does not fit."""
    found = plan(config, study, limit(study, device))
    if not found.fits:
        raise UserError(f'the study takes about {(found.total + RESERVE) / 1e9:.1f} GB, and its device has '
                        f'{found.limit / 1e9:.1f}; take a smaller block_size, or try with a larger memory_gb', 'memory_gb')
    return found.memory
