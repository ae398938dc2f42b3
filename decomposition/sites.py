"""Dense weights to structured ones: which method at which site, in which order, with which input statistics."""
import dataclasses
import functools
import inspect
from dataclasses import dataclass

import torch

import variants
from decomposition import calibrate, sequential, wide
from kron.methods import moved
from layers import sums
from layers.sums import SEQUENTIAL, STREAMED
from model import GPT
from variants import UserError, did_you_mean

PRUNINGS = ('none', 'magnitude', 'wanda')


@dataclass
class Decomposition:
    """How dense weights become structured ones.

    method: a name in the METHODS of the structures, or several with commas: each site takes the first that its
    structure has. Any name may end in _sequential or _streamed.
    batches: [(x, y)] of calibration tokens, or a function that returns them when a method needs them.
    prune_before: 'none', 'magnitude' or 'wanda', with prune_fraction, before the method.
    validation: [(x, y)] on which the loss increase of each site alone is measured, or None.
    device: of calibration and fits, None = the model's.
    passes: collects the statistics of the dense model, as calibrate.passes does; for callers that cache them.
    dense: the source as a model that runs, for callers that have it; wide: keep a source in half precision so (wide.py).
    orders: {(site of a c_proj, method): order of its units} of narrow.order_of, for callers that know them.
    """
    method: str = 'van_loan'
    batches: object = None
    prune_before: str = 'none'
    prune_fraction: float = 0.0
    validation: list | None = None
    device: object = None
    passes: object = calibrate.passes
    dense: object = None
    wide: bool = False
    orders: dict = dataclasses.field(default_factory=dict)


class Work:
    """The decomposition of a model's sites: which method where, in which order, with which stats."""

    def __init__(self, model, config, state, how):
        self.sites, self.how, self.config, self.state = fillable(model), how, config, state
        check_pruning(how)
        self.mixed = self.dense_loss = None

    @functools.cached_property
    def dense(self):
        """The source as a model that runs."""
        return self.how.dense or runnable(self.config, self.state, self.how.device, self.how.wide)

    def walk(self, todo):
        """Yield (site, Stats or None) in the order in which the sites are to be filled."""
        methods = [self.method(site) for site in todo]
        compared = any(SEQUENTIAL in name for name, _ in methods)
        layerwise = compared or any(STREAMED in name for name, _ in methods)
        seen = layerwise or self.how.prune_before == 'wanda' or any(needs for _, needs in methods)
        if todo and self.how.validation:
            self.dense_loss = mean_loss(self.dense, self.how.validation)
        if not todo or not seen:
            yield from ((site, None) for site in todo)
            return
        batches = self.how.batches() if callable(self.how.batches) else self.how.batches
        if not batches:
            asks = layerwise or any(needs for _, needs in methods)
            what = f'decompose={self.how.method}' if asks else 'prune_before=wanda'
            raise UserError(f'{what} needs text to calibrate on; set calibration_tokens above 0', 'decompose')
        gradients = any('hessian' in name for name, _ in methods)
        if layerwise:
            self.mixed = runnable(self.config, self.dense.state_dict(), self.how.device, self.how.wide)     # shares tensors
            yield from sequential.walk(self.dense, self.mixed, todo, batches, gradients, self.how.passes, compared)
            return
        measured = getattr(self.how.passes, 'measures', None)           # a wider model, and ours is not needed
        for found in self.how.passes(measured or self.dense, todo, batches, gradients):
            yield from found.items()

    def method(self, site):
        """(the first method of how.method that the site's structure has, whether it needs stats)."""
        _, arguments = structure(self.sites[site])
        try:
            return sums.choose(type(self.sites[site]), self.how.method, arguments)
        except ValueError as error:
            raise UserError(f'{site}: {error}', 'decompose') from None

    def fill(self, site, source, stats):
        """Fill one site from `source`, its module in the source without values -> a row of the report."""
        module, tensors = self.sites[site], tensors_of(self.state, site)
        stats = alone(stats) if STREAMED in self.method(site)[0] else stats
        like = next(module.parameters())
        device = self.how.device or like.device
        values = {key: t.to(device, like.dtype if t.is_floating_point() else t.dtype) for key, t in tensors.items()}
        source.load_state_dict(values, assign=True)
        weight, (_, arguments) = source.dense_weight(), structure(module)
        made = self.make(type(module), site, weight, source.bias, stats, arguments)
        module.load_state_dict(made.state_dict())
        if hasattr(made, 'experts'):
            made = made.at_start()                      # as a dense linear: what it is before its router learns
        made.spec = module.spec
        if self.mixed is not None:
            self.mixed.transformer.set_submodule(site, made)
        kept, norm = made.dense_weight(), weight.norm().clamp_min(1e-30)
        row = {'error': ((weight - kept).norm() / norm).item(), 'norm': (kept.norm() / norm).item()}
        if stats is not None:
            row['output_error'] = output_error(weight, source.bias, kept, made.bias, stats)
        if self.how.validation:
            row.update(loss=self.loss_alone(site, made), dense_loss=self.dense_loss)
        return row

    def make(self, cls, site, weight, bias, stats, arguments):
        """The structured module; a sequential form that the class does not have is its plain one with another target.

        A streamed form is the plain one on the site's inputs in the compressed model: W unchanged, on those inputs.
        """
        method = self.method(site)[0].replace(STREAMED, '')
        weight = prune(weight, self.how.prune_fraction, self.how.prune_before, stats)
        if SEQUENTIAL in method and method not in cls.methods:
            method, (weight, bias, stats) = method.replace(SEQUENTIAL, ''), moved(weight, bias, stats)
        return cls.from_dense(weight, bias, method=method, stats=stats, **arguments)

    def loss_alone(self, site, made):
        """The source's validation loss with this site alone replaced."""
        whole = self.dense.sites()[site]
        self.dense.transformer.set_submodule(site, made)
        try:
            return mean_loss(self.dense, self.how.validation)
        finally:
            self.dense.transformer.set_submodule(site, whole)


def runnable(config, state, device, in_half=False):
    """The source as a separate model that shares the tensors of `state` (those that are on the device).

    Half precision becomes float32, or with in_half stays and computes in float32 (wide.py).
    """
    config = dataclasses.replace(config, dropout=0.0, recompute=False)
    with torch.device('meta'):
        model = GPT(config)
    if any(True for _ in model.buffers()):              # tables that a layer computes at construction
        with torch.random.fork_rng(devices=[]):
            model = GPT(config)
    if config.tie_weights:
        state = {'lm_head.weight': state['transformer.wte.weight'], **state}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f'the source does not fit its config: {error}'.replace('\n', ' '), 'init_from') from None
    if config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight             # one tensor on another device too
    half = next(model.parameters()).dtype in wide.HALF
    if half and not in_half:
        model.float()                                   # a copy: covariances need digits, and CPUs are slow in half
    return wide.widened(model.to(device).eval()) if half and in_half else model.to(device).eval()


def alone(stats):
    """The same stats without the dense model's inputs."""
    return dataclasses.replace(stats, cross=None, source_mean=None, source_covariance=None)


def mean_loss(model, batches):
    """Mean loss per token over [(x, y)]."""
    total = count = 0
    for x, y in batches:
        total += model(x.to(calibrate.device_of(model)), y.to(calibrate.device_of(model)))[1].item() * y.numel()
        count += y.numel()
    return total / count


def output_error(weight, bias, kept, new_bias, stats):
    """sqrt(E||W x + b - Ŵ x' - b'||^2 / E||W x||^2) over the calibration tokens, x' = x unless they differ."""
    W, K = weight.double(), kept.double()
    C = stats.covariance.to(W.device)
    S, M = (C if t is None else t.to(W.device) for t in (stats.source_covariance, stats.cross))
    mean = stats.mean.to(W.device)
    source = mean if stats.source_mean is None else stats.source_mean.to(W.device)
    shift = W @ source - K @ mean + (0 if bias is None else bias.double() - new_bias.double())
    spread = ((W @ S) * W).sum() - 2 * ((W @ M) * K).sum() + ((K @ C) * K).sum()
    whole = ((W @ S) * W).sum() + (W @ source).square().sum()
    return ((spread.clamp_min(0) + shift.square().sum()) / whole.clamp_min(1e-300)).sqrt().item()


# ---------------------------------------------------------------------------------------------------
# pruning

def check_pruning(how):
    """Refuse an unknown kind of pruning, and a fraction outside 0 .. 1."""
    if how.prune_before not in PRUNINGS:
        raise UserError(f"prune_before must be 'none', 'magnitude' or 'wanda', got {how.prune_before!r}"
                        f'{did_you_mean(how.prune_before, PRUNINGS)}', 'prune_before')
    if not 0 <= how.prune_fraction < 1 or (how.prune_before == 'none') != (how.prune_fraction == 0):
        raise UserError(f'prune_fraction must be above 0 and below 1 with prune_before, and 0 without, got '
                        f'{how.prune_fraction} with prune_before={how.prune_before!r}', 'prune_fraction')


def prune(weight, fraction, kind, stats=None):
    """W (out, in) with floor(fraction * entries) zeros in place of the entries with the smallest score.

    kind 'magnitude': |W|, the least of the whole matrix; 'wanda': |W_ij| sqrt(E x_j^2), the least of each row, by stats
    (Sun et al. 2023, arXiv 2306.11695); 'none': W itself. Cost: a sort.
    """
    if kind == 'none' or fraction == 0:
        return weight
    score = weight.double().abs()
    if kind == 'wanda':
        power = stats.covariance.diagonal() + stats.mean.square()           # E x_j^2
        score = score * power.to(score.device).clamp_min(0).sqrt()
    else:
        score = score.reshape(1, -1)
    drop = score.argsort(dim=-1, stable=True)[:, :int(fraction * score.shape[1])]
    return weight.reshape(score.shape).scatter(1, drop, 0.0).view_as(weight)


def fillable(model):
    """{site: module} of the sites that a dense matrix can fill: linears, and linears of many experts; no routers."""
    return {site: module for site, module in model.sites(experts=True).items() if hasattr(module, 'from_dense')}


def tensors_of(state, site):
    """{name below the site: tensor}."""
    prefix = f'transformer.{site}.'
    return {name[len(prefix):]: t for name, t in state.items() if name.startswith(prefix)}


def structure(module):
    """(name, {argument: value}) of a site's spec, so that kron(8, 8) and kron(8, n=8, terms=1) are the same."""
    if hasattr(module, 'experts'):
        return type(module).__name__, module.arguments()
    spec = variants.parse_spec(module.spec)
    bound = inspect.signature(variants.LINEARS[spec.name]).bind(0, 0, False, *spec.args, **spec.kwargs)
    bound.apply_defaults()
    return spec.name, dict(list(bound.arguments.items())[3:])       # all but in_features, out_features and bias
