"""Product-aware steps: the spectral norm that they promise, in float64; the power iteration; resuming; several ranks."""
import copy
import itertools
import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import configurator
import variants
from kron.experts import ExpertLinear
from layers.sums import SumLinear
from model import GPT, GPTConfig
from optimizers import optim, products
from optimizers.muon import ADJUST_LR, CONVERGENT, Muon
from variants import LINEARS, UserError

SPECS = {'lowrank': ['lowrank(5)'], 'pivot': ['pivot(7)'],
         'kron': ['kron(8, 6)', 'kron(24, 24, terms=3, scale=True)', 'kron(2, 3, terms=4)']}


def linear(text, out=48, cols=96, seed=0):
    torch.manual_seed(seed)
    spec = variants.parse_spec(text, LINEARS)
    return LINEARS[spec.name](cols, out, False, *spec.args, **spec.kwargs).double()


def norm(x):
    return torch.linalg.matrix_norm(x, 2)


def spectron(module, **settings):
    factors = [p for n, p in module.named_parameters() if module.tags.get(n) == 'factor']
    return Muon(factors, momentum_warmup=0, coefficients=CONVERGENT, products=products.products_of(module), **settings)


def with_gradients(module, seed=1, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = scale * torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p.dtype)


# ---- the promise ----

@pytest.mark.parametrize('text', [text for texts in SPECS.values() for text in texts])
@pytest.mark.parametrize('shape', [(48, 96), (96, 48)])
@pytest.mark.parametrize('lr', [0.02, 0.3])
def test_the_product_moves_by_at_most_lr(text, shape, lr):
    """|W' - W|_2 <= lr f(out, in) per term, and at least a quarter of it; without the option it is another multiple."""
    module = linear(text, *shape)
    other, bound = copy.deepcopy(module), lr * ADJUST_LR['original'](*shape)
    terms = len(module.A) if hasattr(module, 'A') else 1
    before = module.product_weight().detach()
    with_gradients(module)
    spectron(module, lr=lr).step()
    moved = norm(module.product_weight().detach() - before)
    assert 0.1 * bound < moved <= 1.01 * terms * bound
    with_gradients(other)                               # control: the factors' own steps
    Muon([p for n, p in other.named_parameters() if other.tags.get(n) == 'factor'], lr=lr, momentum_warmup=0,
         coefficients=CONVERGENT).step()
    assert abs(norm(other.product_weight().detach() - before) / moved - 1) > 0.1


@pytest.mark.parametrize('kind', ['product', 'kron'])
def test_aligned_factors_reach_the_bound(kind):
    """Rank-one factors along the same vectors as their gradients: r (|A| + |B| + r) exactly, r = lr / (|A| + |B| + 1)."""
    torch.manual_seed(0)
    e = lambda n: torch.nn.functional.normalize(torch.randn(n, dtype=torch.float64), dim=0)     # noqa: E731
    u, v, w, a, b, lr = e(12), e(9), e(7), 3.0, 0.5, 0.1
    (p, q), (s, t) = {'product': ((u, v), (v, w)), 'kron': ((u, v), (w, v))}[kind]
    A, B = torch.nn.Parameter(a * torch.outer(p, q)), torch.nn.Parameter(b * torch.outer(s, t))
    A.grad, B.grad = -A.detach().clone(), -B.detach().clone()
    join = {'product': torch.matmul, 'kron': torch.kron}[kind]
    before = join(A.detach(), B.detach())
    Muon([A, B], lr=lr, momentum_warmup=0, coefficients=CONVERGENT, products=[((8, 8), [A, B])]).step()
    r = lr / (a + b + 1)
    moved = norm(join(A.detach(), B.detach()) - before)
    assert moved.item() == pytest.approx(r * (a + b + r), rel=1e-6) and moved <= lr


class Chain(torch.nn.Module):
    """A newcomer's product of three factors, P Q R."""
    tags, products, out_features, in_features = dict.fromkeys('PQR', 'factor'), (('P', 'Q', 'R'),), 12, 9

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        for name, shape in {'P': (12, 7), 'Q': (7, 5), 'R': (5, 9)}.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=rng, dtype=torch.float64)))

    def product_weight(self):
        return self.P @ self.Q @ self.R


def test_three_factors_that_a_newcomer_declares():
    """Each moves by lr f / (prod(|F| + 1) - prod |F|), and the product by at most lr f."""
    module, lr = Chain(), 0.1
    before, W = {n: p.detach().clone() for n, p in module.named_parameters()}, module.product_weight().detach()
    with_gradients(module)
    spectron(module, lr=lr, nesterov=False).step()
    n = [norm(p) for p in before.values()]
    share = (ADJUST_LR['original'](12, 9) / (math.prod(x + 1 for x in n) - math.prod(n))).item()
    for name, p in module.named_parameters():
        assert norm(p.detach() - before[name]).item() == pytest.approx(lr * share, rel=0.03), name
    assert 0.1 * lr < norm(module.product_weight().detach() - W) <= lr * ADJUST_LR['original'](12, 9)


@pytest.mark.parametrize('scale', [1e-4, 1e4])
def test_the_scale_of_the_gradients_does_not_matter_and_that_of_the_factors_does(scale):
    module = linear('lowrank(5)')
    other, lopsided = copy.deepcopy(module), copy.deepcopy(module)
    with torch.no_grad():
        lopsided.U.mul_(10)
        lopsided.V.div_(10)
    for one, size in ((module, 1.0), (other, scale), (lopsided, 1.0)):
        optimizer = spectron(one, lr=0.05)
        for step in range(4):
            with_gradients(one, step, size)
            optimizer.step()
    assert (module.dense_weight() - other.dense_weight()).abs().max() < 1e-9
    assert (module.dense_weight() - lopsided.dense_weight()).abs().max() > 1e-3


def test_weights_of_zero_take_a_step():
    module = linear('lowrank(5)')
    with torch.no_grad():
        module.U.zero_()
    with_gradients(module)
    optimizer = spectron(module, lr=0.05)
    optimizer.step()
    V = norm(linear('lowrank(5)').V.detach()).item()
    assert module.U.isfinite().all() and norm(module.U.detach()).item() == pytest.approx(0.05 / (V + 1), rel=0.02)
    assert optimizer.state[module.U]['vector'].norm().item() == pytest.approx(1)


# ---- the power iteration ----

def test_the_power_iteration_converges_from_below():
    x = torch.randn(6, 20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact, last = torch.linalg.svdvals(x)[:, 0], 0.0
    v = products.first_vector(torch.empty(6, 20, 30), torch.float64)[:, 0]
    for _ in range(300):
        size, v = products.power_step(x, v)
        assert (size <= exact * (1 + 1e-12)).all() and (size >= last - 1e-12).all()
        last = size
    assert (last / exact - 1).abs().max() < 1e-9
    size, _ = products.power_step(x, products.first_vector(torch.empty(6, 20, 30), torch.float64)[:, 0])
    assert (size / exact - 1).abs().max() > 0.05        # control: one iteration is not enough


def test_one_iteration_per_step_follows_the_weights():
    module, optimizer = linear('lowrank(5)'), None
    optimizer = spectron(module, lr=0.05)
    for step in range(30):
        with_gradients(module, step)
        exact = [norm(p.detach()) for p in (module.U, module.V)]
        found = optimizer.products.norms(copy.deepcopy(dict(optimizer.state)) if step == 0 else optimizer.state)
        for p, size in zip((module.U, module.V), exact):
            assert 0.93 * size < found[p][0] <= size * (1 + 1e-9), step
        optimizer.step()


# ---- declarations ----

def test_every_declared_product_exists_and_bounds_its_weight():
    """A class that declares products has those parameters, tagged factor; and |W|_2 <= sum over terms of prod |F_i|_2."""
    declared = {name: cls for name in LINEARS if (cls := LINEARS[name]).products}
    assert set(SPECS) <= set(declared), 'give a new class a line in SPECS'
    for name in declared:
        for text in SPECS.get(name, declared[name].examples):
            module = linear(text)
            found = products.products_of(module)
            assert len(found) == len(type(module).products), (text, 'a declared factor is no parameter')
            assert all(module.tags[n] == 'factor' for names in type(module).products for n in names)
            norms = products.Products(found).norms({})
            bound = sum(math.prod(norms[f] for f in factors).sum() for _, factors in found)
            scale = getattr(module, 'scale', None)
            assert scale is None or (scale == 1).all()
            assert norm(module.product_weight().detach()) <= 1.1 * (bound if name != 'pivot' else bound + norm(module.U))


def test_products_of_mixtures_sums_and_models():
    shared = ExpertLinear(48, 96, False, 4, 8, 6, share='B').double()
    (shape, (A, B)), = products.products_of(shared)
    assert shape == (96, 48) and A is shared.A and B is shared.B
    with_gradients(shared)
    before = B.detach().clone()
    optimizer = Muon([A, B], lr=0.1, momentum_warmup=0, coefficients=CONVERGENT, products=[(shape, [A, B])])
    shares = optimizer.products.shares({})
    assert shares[A].shape == (4, 1, 1) and shares[B].shape == (1, 1, 1) and shares[B] == shares[A].min()
    optimizer.step()
    assert not torch.equal(B, before)
    assert not products.products_of(ExpertLinear(48, 96, False, 4, 96, 48, share=None))         # dense experts
    assert len(products.products_of(SumLinear(48, 96, False, ('lowrank(4)', 'kron(8, 6)')))) == 2
    assert not products.products_of(linear('kron_pivot(8, 6, terms=3)')) and not products.products_of(GPT(GPTConfig(**TINY)))


TINY = dict(block_size=16, vocab_size=65, n_layer=2, n_head=4, n_embd=32)
MIXED = {'h.*.mlp.c_fc': 'kron(4, 8, terms=3)', '*.c_v': 'lowrank(4)', '*.c_q': 'pivot(6)', 'h.*.mlp.c_proj': 'abba(3, 3)'}


def optimizer_of(model, *settings):
    return optim.build(model, configurator.load(['--optimizer=muon', '--muon_lr=0.02', *settings]), 'cpu')


def train(model, optimizer, first, last):
    for step in range(first, last):
        x = torch.randint(65, (4, 17), generator=torch.Generator().manual_seed(step))
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_setting_reaches_a_model_and_other_matrices_step_as_before():
    torch.manual_seed(0)
    plain = GPT(GPTConfig(**TINY, linear=MIXED))
    aware = copy.deepcopy(plain)
    train(plain, optimizer_of(plain), 0, 1)
    train(aware, optimizer_of(aware, '--muon_product=spectron'), 0, 1)
    changed = {n for (n, p), q in zip(plain.named_parameters(), aware.parameters()) if not torch.equal(p, q)}
    assert changed == {n for n, _ in plain.named_parameters() if n.split('.')[-1] in ('A', 'B', 'U', 'V', 'R')}


def test_resuming_is_exact_and_needs_the_vectors(tmp_path):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = GPT(GPTConfig(**TINY, linear=MIXED))
    whole, setting = copy.deepcopy(start), '--muon_product=spectron'
    train(whole, optimizer_of(whole, setting), 0, 8)
    first = optimizer_of(start, setting)
    train(start, first, 0, 4)
    torch.save({'model': start.state_dict(), 'optimizer': optim.state_by_name(first, start)}, tmp_path / 'x')
    saved = torch.load(tmp_path / 'x', weights_only=True)
    entries = saved['optimizer']['transformer.h.0.mlp.c_fc.A']
    assert entries['vector'].shape == (3, 1, 8) and entries['vector'].dtype == torch.float32
    assert saved['optimizer']['transformer.h.0.attn.c_v.U']['vector'].shape == (4,)
    assert 'vector' not in saved['optimizer']['transformer.h.0.attn.c_k.weight']

    def resumed(change=lambda entries: None):
        model = GPT(GPTConfig(**TINY, linear=MIXED))
        model.load_state_dict(saved['model'])
        optimizer, state = optimizer_of(model, setting), copy.deepcopy(saved['optimizer'])
        for entries in state.values():
            change(entries)
        optim.load_state_by_name(optimizer, model, state)
        train(model, optimizer, 4, 8)
        return all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters()))
    assert resumed()
    assert not resumed(lambda entries: entries.pop('vector', None))             # control: other vectors, other bits


def test_a_frozen_factor_counts_and_keeps_no_state():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY, linear={'*.c_v': 'lowrank(4)'}))
    frozen = model.transformer.h[0].attn.c_v.V.requires_grad_(False)
    optimizer = optimizer_of(model, '--muon_product=spectron')
    train(model, optimizer, 0, 2)
    assert frozen not in optimizer.state
    U = model.transformer.h[0].attn.c_v.U
    sizes = norm(U.detach()), norm(frozen.detach())
    share = optimizer.parts[1].products.shares(optimizer.parts[1].state)[U].item()
    assert share == pytest.approx(1 / (sum(sizes) + 1).item(), rel=0.02)


def test_low_precision_weights_have_vectors_in_fp32():
    module = linear('lowrank(5)').to(torch.bfloat16)
    with_gradients(module)
    optimizer = spectron(module, lr=0.05)
    optimizer.step()
    assert {optimizer.state[p]['vector'].dtype for p in (module.U, module.V)} == {torch.float32}


def test_mistakes_are_said():
    with pytest.raises(UserError, match="muon_row_beta.*muon_product='spectron'.*drop one"):
        configurator.load(['--optimizer=muon', '--muon_product=spectron', '--muon_row_beta=0.9'])
    with pytest.raises(UserError, match="muon_product.*spectron"):
        configurator.load(['--muon_product=lora'])


# ---- many processes ----

class Pair(torch.nn.Module):
    """Matrices with odd rows and fewer rows than ranks, stacks of an odd number of terms, and a stack that all share."""
    products = (('A', 'B'), ('C', 'D'), ('E', 'F'), ('short', 'wide'))
    out_features, in_features = 14, 21

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        for name, shape in {'A': (14, 5), 'B': (5, 21), 'C': (3, 7, 3), 'D': (3, 2, 7), 'E': (3, 2, 3), 'F': (1, 7, 7),
                            'short': (1, 4), 'wide': (4, 1), 'plain': (14, 5)}.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=rng)))

    def forward(self, step):
        rng = torch.Generator().manual_seed(step)
        shapes = {n: tuple(p.shape) for n, p in self.named_parameters()}
        return sum(((p - torch.randn(shapes[n], generator=rng)) ** 2).sum() for n, p in self.named_parameters())


SETTINGS = [dict(products=True), dict(row_beta=0.9)]


def muon_of(module, products=False, **settings):
    from optimizers.products import products_of
    found = products_of(module) if products else ()
    return Muon(module.parameters(), lr=0.05, momentum_warmup=3, **settings, products=found)


def run(module, net, settings, resume=False):
    optimizer = muon_of(module, **settings)
    for step in range(5):
        net(step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if resume and step == 2:                        # through what a checkpoint holds
            state = optim.state_by_name(optimizer, module)
            optimizer = muon_of(module, **settings)
            optim.load_state_by_name(optimizer, module, state)
    return {name: optim.whole(p).detach() for name, p in module.named_parameters()}


def worker(rank, world, folder):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    result = {}
    for i, settings in enumerate(SETTINGS):
        module = Pair()
        result['ddp', i] = run(module, DistributedDataParallel(module), {**settings, 'process_group': dist.group.WORLD})
        for resume in (False, True):
            module = fully_shard(Pair(), mesh=dist.init_device_mesh('cpu', (world,)))
            result['fsdp', i, resume] = run(module, module, settings, resume)
    torch.save({str(key): value for key, value in result.items()}, f'{folder}/{rank}.pt')
    dist.barrier()                                      # a rank that leaves early can bring the other down at its end
    dist.destroy_process_group()


@pytest.mark.parametrize('world', [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_get_the_weights_of_one_process(tmp_path, world):
    alone = [run(module := Pair(), module, settings) for settings in SETTINGS]
    assert any(not torch.equal(a, b) for a, b in zip(alone[0].values(), alone[1].values()))
    torch.multiprocessing.spawn(worker, (world, str(tmp_path)), nprocs=world)
    results = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(world)]
    for kind, i, *_ in itertools.chain((('ddp', i) for i in range(2)), (('fsdp', i, r) for i in range(2) for r in (0, 1))):
        key = str((kind, i, *([bool(_[0])] if _ else [])))
        for name, p in alone[i].items():
            got = [r[key][name] for r in results]
            assert all(torch.equal(got[0], other) for other in got[1:]), (key, name)
            assert (got[0] - p).abs().max() < 2e-6, (key, name)
