"""The mixture of Kronecker experts: kron/moe.py, kron/experts.py, kron/router.py, and how a run, a checkpoint and a dense
model deal with it."""
import copy
import dataclasses
import functools
import json

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import configurator
import train
from checkpoints import checkpoint
from decomposition.initialise import build, initialise, read_folder
from growth import changes
from kron.experts import ExpertLinear
from kron.linear import KroneckerLinear
from kron.router import Slots, balance_loss, route, z_loss
from layers.basic import tags_of
from model import GPT, Context, GPTConfig, UserError
from optimizers import optim
from tests.tiny import arguments, make_data

SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=61)
SPECS = ['kron_moe(8)', 'kron_moe(8, 16, 8, top_k=3, share=None)', "kron_moe(4, 16, 8, share='A')",
         "kron_moe(4, 64, 8, top_k=1, share='B', approximate='tanh')", 'kron_moe(3, 16, 8, top_k=3)',
         'kron_moe(3, 128, 32, top_k=2)']
each_spec = pytest.mark.parametrize('spec', SPECS)


def small(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **settings})).to(dtype)
    with torch.no_grad():                                   # no bias is 0, and the router has opinions
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def mixture(spec, dtype=torch.float64, **settings):
    return small(dtype, mlp=spec, **settings).transformer.h[0].mlp


def tokens(*shape, seed=5):
    return torch.randint(61, shape or (3, 16), generator=torch.Generator().manual_seed(seed))


def reference(mlp, x):
    """The same function token by token: no groups, no factors."""
    first, second, rows = mlp.c_fc.dense_weight(), mlp.c_proj.dense_weight(), []
    for token in x.reshape(-1, x.shape[-1]):
        scores = mlp.router.weight @ token
        chosen = sorted(range(len(scores)), key=lambda e: -scores[e].item())[:mlp.top_k]
        gates = torch.softmax(scores[chosen], 0)
        u = sum(g * first[e] @ token for g, e in zip(gates, chosen)) + (0 if mlp.c_fc.bias is None else mlp.c_fc.bias)
        h = F.gelu(u, approximate=mlp.approximate)
        y = sum(g * second[e] @ h for g, e in zip(gates, chosen))
        rows.append(y if mlp.c_proj.bias is None else y + mlp.c_proj.bias)
    return torch.stack(rows).view(x.shape)


def largest(tensor):
    return tensor.abs().max().item()


def close(a, b, tolerance=1e-10):
    return largest(a - b) < tolerance * max(1, largest(b))


# ----------------------------------------------------------------------------------------------------
# the function

@each_spec
@pytest.mark.parametrize('bias', [True, False], ids=['bias', 'plain'])
def test_forward_and_all_gradients_equal_the_dense_reference(spec, bias):
    mlp = mixture(spec, bias=bias)
    x = torch.randn(3, 7, 32, dtype=torch.float64, requires_grad=True)
    weight, found = torch.randn_like(x), []
    for function in (lambda x: mlp(x, None), lambda x: reference(mlp, x)):
        mlp.zero_grad()
        y = function(x)
        found.append((y.detach(), torch.autograd.grad((y * weight).sum(), [x, *mlp.parameters()])))
    assert close(found[0][0], found[1][0])
    assert all(close(a, b) for a, b in zip(found[0][1], found[1][1]))
    mlp = mlp.float()
    assert close(mlp(x.float(), None), found[1][0].float(), 1e-5)


@each_spec
def test_few_tokens_take_their_own_factors_and_give_the_same(spec):
    mlp, x = mixture(spec), torch.randn(2, 16, 32, dtype=torch.float64)
    whole = mlp(x, None)
    assert all(close(mlp(x[:, t:t + 1], None), whole[:, t:t + 1]) for t in range(16))
    slots = Slots(torch.arange(mlp.top_k)[None], mlp.c_fc.experts)
    assert (slots.groups, len(slots.source)) == (mlp.top_k, mlp.top_k)      # nothing is padded


@pytest.mark.parametrize('spec', ['kron_moe(1, 16, 8, top_k=1)', 'kron_moe(1, 16, 8, top_k=1, share=None)',
                                  'kron_moe(1, 128, 32, top_k=1)'])
def test_x1_one_expert_is_the_mlp_of_its_kronecker_products_and_of_its_dense_matrix(spec):
    mlp, x = mixture(spec, bias=True), torch.randn(3, 7, 32, dtype=torch.float64)
    plain = small(bias=True).transformer.h[0].mlp
    with torch.no_grad():
        for name in ('c_fc', 'c_proj'):
            ours, theirs = getattr(mlp, name), getattr(plain, name)
            theirs.weight.copy_(ours.dense_weight()[0])
            theirs.bias.copy_(ours.bias)
    assert close(mlp(x, None), plain(x, None))
    assert close(mlp.float()(x.float(), None), plain.float()(x.float(), None), 1e-5)
    if mlp.c_fc.weight is None:
        linear = KroneckerLinear(32, 128, True, 16, 8).float()
        linear.load_state_dict(mlp.c_fc.state_dict())
        slots = Slots(torch.zeros(5, 1, dtype=torch.long), 1)
        assert close(mlp.c_fc(x[0, :5].float(), slots, torch.ones(5, 1)), linear(x[0, :5].float()), 1e-5)


@pytest.mark.parametrize('share', ['A', 'B', None])
@pytest.mark.parametrize('top_k', [1, 2, 4])
def test_x2_identical_experts_are_one_expert(share, top_k):
    many = mixture(f'kron_moe(4, 16, 8, top_k={top_k}, share={share!r})', bias=True)
    one = mixture('kron_moe(1, 16, 8, top_k=1)', bias=True)
    with torch.no_grad():
        for a, b in ((many.c_fc, one.c_fc), (many.c_proj, one.c_proj)):
            for name, p in a.named_parameters():
                p.copy_(getattr(b, name))
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    assert close(many(x, None), one(x, None))


def future_changes(model):
    """Largest change of the logits up to t when later tokens change."""
    x, worst = tokens(2, 16), 0.0
    for t in (0, 3, 14):
        y = x.clone()
        y[:, t + 1:] = tokens(2, 15 - t, seed=t)
        worst = max(worst, largest((model(x, x)[0] - model(y, y)[0])[:, :t + 1]))
    return worst


@each_spec
@torch.no_grad()
def test_x3_u1_u3_no_token_sees_the_future(spec):
    model, x = small(mlp=spec).eval(), tokens(2, 16)
    assert future_changes(model) < 1e-10
    for n in (1, 2, 7):
        assert close(model(x[:, :n], x[:, :n])[0], model(x, x)[0][:, :n])


@each_spec
def test_x3_u2_the_gradient_of_the_future_is_exactly_zero(spec):
    model, held = small(mlp=spec).eval(), []
    model.transformer.wte.register_forward_hook(lambda module, inputs, out: held.append(out))
    logits = model(tokens(2, 16), tokens(2, 16))[0]
    for t in (0, 6, 14):
        grad, = torch.autograd.grad(logits[:, :t + 1].sin().sum(), held[0], retain_graph=True)
        assert not grad[:, t + 1:].any() and grad[:, t].any()


@torch.no_grad()
def test_x3_expert_choice_would_be_found(monkeypatch):
    """Negative control: experts that choose their tokens look at all tokens."""
    def expert_choice(logits, top_k):
        mine = logits.softmax(-1)
        kept = mine.topk(max(1, len(mine) * top_k // mine.shape[1]), dim=0).indices             # (tokens per expert, E)
        open_ = torch.zeros_like(mine).scatter(0, kept, 1.0)
        return route(logits + 5 * open_, top_k)
    model = small(mlp='kron_moe(4, 16, 8, share=None)').eval()
    monkeypatch.setattr('kron.moe.route', expert_choice)
    assert future_changes(model) > 1e-4


@each_spec
@torch.no_grad()
def test_u4_cached_decoding_equals_the_full_forward(spec):
    model, x = small(mlp=spec).eval(), tokens(2, 16)
    full, caches, start = model(x, x)[0], [{}, {}], 0
    for n in (4, 3, 1, 1, 2, 1):
        logits, _ = model(x[:, start:start + n], caches=caches, start=start)
        start += n
        assert close(logits[:, -1], full[:, start - 1])


# ----------------------------------------------------------------------------------------------------
# routing

@pytest.mark.parametrize('rows, experts, top_k', [(1, 8, 2), (4, 8, 2), (5, 8, 2), (50, 8, 2), (50, 3, 3), (7, 1, 1)])
def test_x4_counts_sum_to_k_a_token_and_nothing_is_dropped(rows, experts, top_k):
    gates, chosen = route(torch.randn(rows, experts), top_k)
    slots = Slots(chosen, experts)
    assert slots.load.sum() == rows * top_k and slots.load.shape == (experts,)
    assert torch.equal(slots.load, torch.bincount(chosen.flatten(), minlength=experts))
    assert slots.slot.unique().numel() == rows * top_k                      # each in a place of its own
    assert torch.equal(slots.source[slots.slot], torch.arange(rows)[:, None].expand(rows, top_k))
    assert close(gates.sum(1), torch.ones(rows), 1e-6) and chosen.sort(1).values.diff(dim=1).ne(0).all()
    x = torch.randn(rows, 3)
    assert close(slots.gather(slots.scatter(x), gates), x, 1e-6)
    rows = len(slots.source) // slots.groups                                # each group holds tokens of its expert
    assert torch.equal(slots.expert[slots.slot // rows], chosen)
    assert len(slots.source) <= 1.25 * chosen.numel() or rows == 1


def test_x4_the_worst_load_is_kept_whole():
    slots = Slots(torch.zeros(64, 1, dtype=torch.long), 4)
    assert slots.load.tolist() == [64, 0, 0, 0] and slots.slot.flatten().tolist() == list(range(64))


def test_x4_a_model_counts_every_assignment_of_every_block():
    model = small(mlp='kron_moe(8, top_k=3)').eval()
    model(tokens(), tokens())
    assert {site: load.sum().item() for (_, site), load in model.measures.items()} == {
        f'h.{i}.mlp': 3 * tokens().numel() for i in range(2)}


def test_x5_the_balance_loss_is_1_when_uniform_and_more_otherwise():
    load = torch.full((8,), 5)
    assert balance_loss(torch.zeros(20, 8, dtype=torch.float64), load).item() == pytest.approx(1, abs=1e-12)
    one = torch.zeros(8).index_fill(0, torch.tensor([3]), 40)
    sure = torch.zeros(20, 8).index_fill(1, torch.tensor([3]), 50.0)
    assert balance_loss(sure, one).item() == pytest.approx(8, rel=1e-6)
    assert z_loss(torch.zeros(20, 8)).item() == pytest.approx(torch.tensor(8.0).log().item() ** 2)


def test_x5_the_gradient_of_the_balance_loss_takes_from_the_busy():
    logits = torch.zeros(6, 3, requires_grad=True)
    balance_loss(logits, torch.tensor([9, 2, 1])).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 2] < 0).all()


def test_ties_go_to_the_lower_expert_and_scores_are_in_fp32():
    assert route(torch.zeros(5, 8), 3)[1].tolist() == [[0, 1, 2]] * 5
    mlp = mixture('kron_moe(8)', torch.float32).bfloat16()
    assert mlp.router(torch.randn(4, 32).bfloat16()).dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16):
        assert mlp.float().router(torch.randn(4, 32)).dtype == torch.float32
        y = mlp(torch.randn(2, 9, 32), None)
    assert y.isfinite().all()


# ----------------------------------------------------------------------------------------------------
# losses, counts, tags

@pytest.mark.parametrize('recompute', [False, True])
def test_auxiliary_losses_join_the_training_loss_alone(recompute):
    model, x = small(mlp='kron_moe(4, top_k=2, balance=0.5, z=0.25)', recompute=recompute), tokens()
    plain = model.eval()(x, x)[1]
    assert {kind for kind, _ in model.measures} == {'load'}
    loss = model.train()(x, x)[1]
    parts = {kind: sum(v for (k, _), v in model.measures.items() if k == kind) for kind in ('balance_loss', 'z_loss')}
    assert parts['balance_loss'] >= 2 * 0.5 - 1e-9 and parts['z_loss'] > 0
    assert loss.item() == pytest.approx((plain + parts['balance_loss'] + parts['z_loss']).item(), abs=1e-12)
    assert not any(v.requires_grad for v in model.measures.values())
    loss.backward()
    assert copy.deepcopy(model)(x, x)[1].item() == loss.item()


def test_the_losses_reach_the_router_and_recomputation_gives_the_same_gradients():
    found = []
    for settings in (dict(), dict(recompute=True), dict(mlp='kron_moe(4, balance=0, z=0)')):
        model = small(**{'mlp': 'kron_moe(4, balance=0.5, z=0.25)', **settings})
        model(tokens(), tokens())[1].backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    router = 'transformer.h.0.mlp.router.weight'
    assert all(torch.equal(g, found[1][n]) for n, g in found[0].items())
    assert not close(found[0][router], found[2][router], 1e-3) and found[2][router].any()


@each_spec
def test_parameters_and_flops(spec):
    model = small(mlp=spec, bias=True)
    rows = {row['site']: row for row in model.site_table()}
    mlp = model.transformer.h[0].mlp
    for name in ('c_fc', 'c_proj'):
        part, row = getattr(mlp, name), rows[f'h.0.mlp.{name}']
        dense, E, k = part.weight is not None, part.experts, mlp.top_k
        a, m, n = part.factors[0].shape
        b, p, q = (0, 1, 1) if dense else part.B.shape
        assert row['parameters'] == a * m * n + b * p * q + part.out_features
        assert row['active'] == min(a, k) * m * n + min(b, k) * p * q + part.out_features
        ka, kb = min(a, k), min(b, k)
        orders = [2 * ka * m * n] if dense else [2 * (ka * m * n * q + kb * m * q * p),
                                                 2 * (kb * n * q * p + ka * n * m * p)]
        assert row['flops'] == min(orders) == part.flops(5) // 5
        # an even load: each expert gets T k / E tokens, and the counter sees no padding
        chosen = (torch.arange(2 * E)[:, None] + torch.arange(k)) % E
        slots, gates = Slots(chosen, E), torch.full(chosen.shape, 1 / k, dtype=torch.float64)
        with FlopCounterMode(display=False) as counter:
            part(torch.randn(2 * E, part.in_features, dtype=torch.float64), slots, gates)
        assert counter.get_total_flops() == part.flops(2 * E)
    assert rows['h.0.mlp.router']['parameters'] == 32 * mlp.c_fc.experts == rows['h.0.mlp.router']['flops'] // 2
    assert sum(row['parameters'] for row in rows.values() if '.mlp.' in row['site']) == sum(
        p.numel() for block in model.transformer.h for p in block.mlp.parameters())
    assert model.flops_per_token() == sum(r['flops'] for r in rows.values()) + 2 * 4 * 16 * 32 + 2 * 61 * 32


def test_no_dense_matrix_is_formed_forward_or_backward():
    mlp = mixture('kron_moe(8, 16, 8, top_k=2)', torch.float32)
    sizes, x = [], torch.randn(4, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        mlp(x, None).sum().backward()
    with torch.profiler.profile(record_shapes=True) as profile:
        mlp(x, None).sum().backward()
    shapes = [shape for event in profile.events() for shape in event.input_shapes or []]
    assert sizes and shapes and not [s for s in shapes if sorted(s)[-2:] == [32, 128]]
    with torch.profiler.profile(record_shapes=True) as profile:
        mlp.c_fc.dense_weight().sum()
    assert [s for e in profile.events() for s in e.input_shapes or [] if sorted(s)[-2:] == [32, 128]]


def test_tags_send_routers_to_adamw_and_stacks_to_muon():
    model = small(torch.float32, mlp='kron_moe(8, share=None)', bias=True)
    tags = tags_of(model)
    assert {tags[n] for n in tags if '.router.' in n} == {'vector'}
    assert {tags[n] for n in tags if n.endswith(('.A', '.B'))} == {'factor'}
    config = configurator.load(['--optimizer=muon', '--weight_decay=0.5'])
    adamw, muon = optim.build(model, config, 'cpu').parts
    router, A = model.transformer.h[0].mlp.router.weight, model.transformer.h[0].mlp.c_fc.A
    assert any(p is router for p in adamw.param_groups[1]['params']) and adamw.param_groups[1]['weight_decay'] == 0
    assert any(p is A for g in muon.param_groups for p in g['params']) and A.ndim == 3


def test_the_gated_sum_starts_with_the_standard_deviation_of_a_dense_matrix():
    config = GPTConfig(n_layer=8, n_head=4, n_embd=256, block_size=16, vocab_size=61, mlp='kron_moe(8, 64, 32, share=None)')
    torch.manual_seed(0)
    mlp = GPT(config).transformer.h[0].mlp
    for part, std in ((mlp.c_fc, 0.02), (mlp.c_proj, 0.02 / 4)):
        W = part.dense_weight()
        assert (W[0] + W[3]).div(2).std().item() == pytest.approx(std, rel=0.05)
        assert close(part.A.norm(dim=(1, 2)), part.B.norm(dim=(1, 2)), 1e-5)


@pytest.mark.parametrize('spec', ['kron_moe(8, top_k=2)', 'kron_moe(8, 16, 8, top_k=1, share=None)'])
def test_every_parameter_gets_a_gradient_or_zero_even_when_one_expert_takes_all(spec):
    model, x = small(mlp=spec), tokens()
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.router.weight.zero_()
    model(x, x)[1].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    idle = model.transformer.h[0].mlp.c_fc.A.grad[7]
    assert not idle.any()


# ----------------------------------------------------------------------------------------------------
# refusals

@pytest.mark.parametrize('spec, words', [
    ('kron_moe', 'missing a required argument'),
    ('kron_moe(0)', 'experts must be a whole number of at least 1, got 0'),
    ('kron_moe(4, top_k=5)', 'top_k can be at most experts (4), got 5'),
    ('kron_moe(4, top_k=True)', 'top_k must be a whole number'),
    ('kron_moe(4, 12, 8)', 'do not divide a matrix of 128 x 32; the nearest that do are 8 x 8'),
    ('kron_moe(4, 16, 7)', 'do not divide'),
    ("kron_moe(4, share='C')", "share is 'A', 'B' or None"),
    ('kron_moe(4, balance=-1)', 'balance is the weight of a loss'),
    ('kron_moe(4, z="much")', 'z is the weight of a loss'),
    ("kron_moe(4, approximate='erf')", 'approximate is'),
    ('kron_moe(4, capacity=1.25)', "unexpected keyword argument 'capacity'; it takes kron_moe(experts"),
])
def test_what_does_not_fit_is_refused_in_one_sentence(spec, words):
    with torch.device('meta'), pytest.raises(UserError) as error:
        GPT(GPTConfig(**SMALL, mlp=spec))
    assert words in str(error.value) and '\n' not in str(error.value) and 'h.0.mlp' in str(error.value)
    assert error.value.key == 'mlp'


def test_ngpt_and_linear_rules_are_refused():
    with pytest.raises(UserError, match="set ngpt='none'"):
        GPT(GPTConfig(**SMALL, mlp='kron_moe(4)', ngpt='full', rope=True, tie_weights=False))
    with pytest.raises(UserError, match='wins at no site'):             # its linears are no sites
        GPT(GPTConfig(**SMALL, mlp='kron_moe(4)', linear={'h.*.mlp.*': 'kron(8, 8)'}))


@pytest.mark.parametrize('width, sides', [(32, (16, 4)), (36, (24, 6)), (30, (20, 5)), (14, (8, 2))])
def test_the_default_factors_always_divide(width, sides):
    mlp = GPT(GPTConfig(**{**SMALL, 'n_embd': width, 'mlp': 'kron_moe(4)'})).transformer.h[0].mlp
    assert mlp.c_fc.A.shape[1:] == sides and mlp.c_proj.A.shape[1:] == sides[::-1]


# ----------------------------------------------------------------------------------------------------
# realise, growth, compile

@each_spec
def test_realised_experts_are_dense_and_the_same_function(spec):
    model, x = small(mlp=spec, bias=True).eval(), tokens()
    model.freeze_block(1)
    before, cached = model(x, x)[0], model.generate(x, 4, temperature=0)
    model.realise()
    mlp = model.transformer.h[0].mlp
    assert mlp.c_fc.B is None and mlp.c_fc.weight.shape == (mlp.c_fc.experts, 128, 32) and 'dense' in mlp.c_fc.spec
    assert close(model(x, x)[0], before) and torch.equal(model.generate(x, 4, temperature=0), cached)
    assert not any(p.requires_grad for p in model.transformer.h[1].parameters())
    assert all(p.requires_grad for p in mlp.parameters())
    again = GPT(model.config).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x, x)[0], model(x, x)[0])
    block = model.add_block()
    assert block.mlp.c_fc.B is None and torch.equal(model(x, x)[0], again(x, x)[0])


@each_spec
def test_a_new_block_moves_no_logit_and_learns(spec):
    model, x = small(mlp=spec).eval(), tokens()
    before = model(x, x)[0]
    block = model.add_block()
    assert torch.equal(model(x, x)[0], before)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(x, x.roll(1, 1))[1].backward()
        optimizer.step()
    assert all(p.grad.any() for p in block.parameters())


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_and_leaves_the_same_measures():
    model, x = small(torch.float32, mlp='kron_moe(4)'), tokens()
    torch._dynamo.reset()
    compiled, losses = torch.compile(model, backend='aot_eager', fullgraph=True), []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(x, x)[1]
        loss.backward()
        losses.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}, dict(model.measures)))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert all(close(g, losses[1][1][n], 1e-5) for n, g in losses[0][1].items())
    assert losses[0][2].keys() == losses[1][2].keys()


# ----------------------------------------------------------------------------------------------------
# upcycling

def dense(**settings):
    return small(bias=True, mlp="gelu(approximate='tanh')", **settings).eval()


def upcycled(source, spec, method='van_loan', **settings):
    model = GPT(dataclasses.replace(source.config, mlp=f"{spec[:-1]}, approximate='tanh')", **settings)).double().eval()
    report = initialise(model, source.config, source.state_dict(), method)
    return model, report


def static(source, terms, method='van_loan'):
    """The model of a static Kronecker sum of that many terms."""
    rules = {'h.*.mlp.c_fc': f'kron(16, 8, terms={terms})', 'h.*.mlp.c_proj': f'kron(8, 16, terms={terms})'}
    model = GPT(dataclasses.replace(source.config, linear=rules)).double().eval()
    initialise(model, source.config, source.state_dict(), method)
    return model


@pytest.mark.parametrize('method', ['van_loan', 'van_loan_normalised', 'prune'])
@pytest.mark.parametrize('experts, top_k', [(4, 4), (6, 2), (3, 1)])
def test_terms_become_experts_and_the_start_is_the_static_sum_of_top_k_terms(method, experts, top_k):
    source, x = dense(), tokens()
    model, report = upcycled(source, f'kron_moe({experts}, 16, 8, top_k={top_k}, share=None)', method)
    assert close(model(x, x)[0], static(source, top_k, method)(x, x)[0])
    assert not model.transformer.h[0].mlp.router.weight.any()
    row = next(row for row in report if row['site'] == 'h.0.mlp.c_fc')
    assert row['spec'] == f'{top_k} of {experts} kron(16, 8)' and 0 < row['error'] < 1.5
    if method == 'van_loan':                                # and all experts together are the sum of all terms
        part = model.transformer.h[0].mlp.c_fc
        whole = static(source, experts).transformer.h[0].mlp.c_fc.dense_weight()
        assert close(part.dense_weight().sum(0) / top_k, whole)


def test_as_many_terms_as_full_rank_give_the_dense_model_back():
    source, x = dense(), tokens()
    model, _ = upcycled(source, 'kron_moe(16, 4, 4, top_k=16, share=None)')
    assert close(model(x, x)[0], source(x, x)[0])
    other, _ = upcycled(source, 'kron_moe(15, 4, 4, top_k=15, share=None)')
    assert not close(other(x, x)[0], source(x, x)[0], 1e-3)


@pytest.mark.parametrize('share', ['A', 'B'])
def test_with_a_shared_factor_every_expert_is_the_one_term_whatever_the_router_says(share):
    source, x = dense(), tokens()
    model, _ = upcycled(source, f'kron_moe(4, 16, 8, top_k=2, share={share!r})')
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.router.weight.normal_()
    assert close(model(x, x)[0], static(source, 1)(x, x)[0])


def test_dense_experts_start_as_the_dense_model_whatever_the_router_says():
    source, x = dense(), tokens()
    model, report = upcycled(source, 'kron_moe(4, 128, 32, top_k=2)')
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.router.weight.normal_()
    assert close(model(x, x)[0], source(x, x)[0])
    assert max(row['error'] for row in report) < 1e-12


@pytest.mark.parametrize('method', ['als', 'als_sequential'])
def test_calibrated_methods_reach_experts(method):
    from decomposition.sites import Decomposition
    source, x = dense(), tokens(4, 16, seed=1)
    batches = [(tokens(16, 16, seed=s), tokens(16, 16, seed=s)) for s in range(2)]
    outputs = []
    for settings in (dict(mlp="kron_moe(4, 16, 8, top_k=2, share=None, approximate='tanh')"),
                     dict(linear={'h.*.mlp.c_fc': 'kron(16, 8, terms=2)', 'h.*.mlp.c_proj': 'kron(8, 16, terms=2)'})):
        model = GPT(dataclasses.replace(source.config, **settings)).double().eval()
        report = initialise(model, source.config, source.state_dict(), how=Decomposition(method, batches))
        outputs.append(model(x, x)[0])
    assert close(*outputs, 1e-8) and any('output_error' in row for row in report)


def test_a_mixture_is_copied_bit_by_bit_and_to_nothing_else():
    source = small(mlp='kron_moe(4)')
    model = GPT(dataclasses.replace(source.config)).double()
    initialise(model, source.config, source.state_dict())
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in model.state_dict().items())
    for mlp in ('gelu', 'kron_moe(8)'):
        other = GPT(dataclasses.replace(source.config, mlp=mlp)).double()
        with pytest.raises(UserError, match='is a mixture in the source'):
            initialise(other, source.config, source.state_dict())
    with pytest.raises(UserError, match='the linears are not those of the source'):
        swiglu = small(mlp='swiglu')
        initialise(model, swiglu.config, swiglu.state_dict())


# ----------------------------------------------------------------------------------------------------
# runs

MIXTURE = ['--linear=h.1.attn.c_v=lowrank(4)', '--mlp=kron_moe(4, top_k=2)', '--log_interval=1']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def run(data, out, *more):
    train.STOP.update(signal=None, time=0.0)
    train.main(configurator.load([*arguments(data, out), *more]))
    return checkpoint.load(out)


def log_of(out):
    return [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]


def test_the_log_has_the_losses_apart_and_the_load_at_evaluations(data, tmp_path):
    run(data, tmp_path / 'a', *MIXTURE)
    lines = log_of(tmp_path / 'a')
    steps, evals = [line for line in lines if 'loss' in line], [line for line in lines if 'val_loss' in line]
    assert len(steps) == 12 and all(0.02 <= s['balance_loss'] < 0.08 and s['z_loss'] > 0 for s in steps)
    assert all(len(e['expert_load']) == 2 and all(1 <= load <= 2 for load in e['expert_load']) for e in evals)
    heavy = log_of(run(data, tmp_path / 'b', *MIXTURE[:1], '--mlp=kron_moe(4, top_k=2, balance=100, z=10)',
                       '--log_interval=1', '--max_iters=1', '--lr_decay_iters=2') and tmp_path / 'b')
    first = next(line for line in heavy if 'loss' in line)
    assert first['balance_loss'] > 100 and first['loss'] == pytest.approx(steps[0]['loss'], abs=1e-4)       # not in it
    plain = log_of(run(data, tmp_path / 'c', '--log_interval=1') and tmp_path / 'c')
    assert not any('balance_loss' in line or 'expert_load' in line for line in plain)


def count(counts, module, inputs, logits):
    counts.add_(F.one_hot(logits.topk(2).indices, 4).sum((0, 1)))


def test_the_load_is_that_of_the_validation_split(data, tmp_path):
    """Against the router asked directly, over the whole split in order."""
    from data.loader import Loader, open_dataset
    run(data, tmp_path, *MIXTURE, '--eval_iters=0', '--dropout=0')
    logged = next(line for line in reversed(log_of(tmp_path)) if 'expert_load' in line)['expert_load']
    config, state, _ = read_folder(str(tmp_path))
    model, counts = build(config, config, state).eval(), [torch.zeros(4), torch.zeros(4)]
    for i, block in enumerate(model.transformer.h):
        block.mlp.router.register_forward_hook(functools.partial(count, counts[i]))
    loader = Loader(open_dataset(str(data / 'tiny'), print), 'val', 16, 4, seed=1337)
    with torch.no_grad():
        for x, y in loader.sequential(256):
            model(x, y)
    assert logged == pytest.approx([(c.max() / c.mean()).item() for c in counts], abs=0.02)


def test_a_run_resumes_to_the_same_bits_and_grows_and_finishes_dense(data, tmp_path):
    more = [*MIXTURE[1:], '--linear=h.0.attn.c_v=lowrank(4)', '--n_layer=3', '--grow_from=2', '--grow_every=4',
            '--finish_dense_at=0.75', '--optimizer=muon', '--save_interval=1', '--keep_checkpoints=20']
    whole = run(data, tmp_path / 'a', *more)
    assert whole['built']['dense'] and 'm=128' in str(whole['built']['model']['mlp'])
    assert not any(name.endswith('.mlp.c_fc.B') for name in whole['model'])
    for step in (3, 6, 10):
        (tmp_path / str(step)).mkdir()
        for file in (tmp_path / 'a').glob(f'ckpt_{step:08d}*'):
            (tmp_path / str(step) / file.name).write_bytes(file.read_bytes())
        train.main(configurator.load([f'--out_dir={tmp_path / str(step)}', '--init_from=resume', '--save_interval=0']))
        again = checkpoint.load(tmp_path / str(step))
        assert all(torch.equal(t, again['model'][n]) for n, t in whole['model'].items()), step
    config, state, _ = read_folder(str(tmp_path / 'a'))
    assert build(config, config, state).transformer.h[2].mlp.c_fc.B is None
    assert changes.model_config(configurator.load(more), whole['built']).n_layer == 3


def test_upcycling_from_a_run(data, tmp_path, capsys):
    run(data, tmp_path / 'dense', '--linear=h.1.attn.c_v=lowrank(4)')
    run(data, tmp_path / 'mixture', *MIXTURE, f'--init_from={tmp_path / "dense"}', '--eval_first=True')
    words = capsys.readouterr().out
    assert 'h.0.mlp.c_fc: 2 of 4 kron(16, 4), one B, relative error' in words
    assert checkpoint.load(tmp_path / 'mixture')['step'] == 12


def test_bench_measures_a_mixture_with_its_losses():
    from bench.modules import Settings
    from bench.subject import Subject
    settings = Settings(n_embd=32, n_head=4, block_size=16, device='cpu')
    subject = Subject('mlp', 'kron_moe(4)', settings)
    subject.step(2, 16)()
    mlp = subject.module
    assert subject.flops() == sum(part.flops(1) for part in (mlp.router, mlp.c_fc, mlp.c_proj))
    assert len(subject.apply(subject.inputs(2, 16))[1]) == 2


@pytest.mark.slow
@pytest.mark.parametrize('way', [[], ['--parallel=fsdp'], ['--parallel=fsdp', '--optimizer=muon', '--recompute=True']])
def test_two_ranks_equal_accumulation_on_one(data, tmp_path, way):
    from tests.reliability.test_processes import finish, start
    found = []
    for name, ranks, more in (('one', None, [a for a in way if 'parallel' not in a]), ('two', 2, way)):
        done = finish(start(data, tmp_path / name, *MIXTURE, *more, ranks=ranks))
        assert done.returncode == 0, done.stderr[-3000:]
        found.append((checkpoint.load(tmp_path / name)['model'], log_of(tmp_path / name)))
    assert all(close(t, found[1][0][n], 1e-5) for n, t in found[0][0].items())
    pairs = [[line.get('expert_load') or line['balance_loss'] for line in log] for _, log in found]
    assert all(a == pytest.approx(b, abs=1e-4) for a, b in zip(*pairs))


def test_it_learns_and_the_load_is_even():
    """Two kinds of tokens with a rule each: the mixture learns them, and no expert is left out."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, 'n_layer': 1, 'mlp': 'kron_moe(4, 16, 8, top_k=2)'}))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for step in range(150):
        x = tokens(16, 16, seed=step)
        y = torch.where(x < 30, (x * 7 + 3) % 61, (60 - x) % 61)
        losses.append(model(x, y)[1])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 2
    load = model.measures['load', 'h.0.mlp'].double()
    assert load.max() / load.mean() < 1.5


def test_the_class_takes_what_the_language_gives():
    with pytest.raises(ValueError, match='do not divide'):
        ExpertLinear(32, 128, True, 4, 12, 8)
    module = ExpertLinear(32, 128, True, 4, 16, 8)
    assert module.arguments() == {'experts': 4, 'm': 16, 'n': 8, 'top_k': 2, 'share': 'B'}
    assert Context(tokens(), torch.arange(16), GPTConfig(**SMALL)).measures == {}
