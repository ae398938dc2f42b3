"""Block-local refinement: a reference by autograd on whole models, convergence, what stays as it was, resuming."""
import copy

import pytest
import torch

from decomposition import refine as refining
from decomposition.refine import Refinement, refine, roots, windows
from decomposition.sequential import Streams
from model import GPT
from tests.decomposition.test_calibrate import random_model
from variants import UserError

KINDS = {
    'gpt2': {},
    'llama': {'bias': False, 'mlp': 'swiglu', 'norm': 'rmsnorm', 'rope': True, 'n_kv_head': 2, 'value_residual': True},
    'ngpt': {'bias': False, 'ngpt': 'full'},
    'mixture': {'mlp': 'kron_moe(experts=4, top_k=2)'},
}


def text(windows=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(23, (4, 16), generator=g) for _ in range(2)) for _ in range(windows // 4)]


def damaged(dense, seed=1, size=0.3):
    """A copy of a model with noise on every parameter of its blocks."""
    torch.manual_seed(seed)
    model = GPT(dense.config).to(next(dense.parameters()).dtype)
    model.load_state_dict(dense.state_dict())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if '.h.' in name:
                p.add_(size * p.square().mean().sqrt() * torch.randn_like(p))
        model.normalise_weights()
    return model


def pair(kind, **more):
    dense = random_model(dtype=torch.float32, **KINDS[kind], **more)
    with torch.no_grad():
        dense.normalise_weights()
    return dense, damaged(dense)


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def changed(before, model):
    return {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(refining, 'STEP_TOKENS', 32)


def plain_errors(dense, model, batches):
    """E||block(x') - y||^2 over E||y - x||^2 on the held-out windows, by whole passes and hooks of our own."""
    x = torch.cat([x for x, _ in batches])[-max(1, sum(len(x) for x, _ in batches) // 10):]
    seen = {}
    for which in (dense, model):
        handles = [block.register_forward_hook(lambda _, args, out, key=(which, i): seen.update({key: (args[0], out)}))
                   for i, block in enumerate(which.transformer.h)]
        with torch.no_grad():
            which.eval()(x)
        for handle in handles:
            handle.remove()
    found = []
    for i in range(len(dense.transformer.h)):
        (x, y), (_, out) = seen[dense, i], seen[model, i]
        found.append(((out - y).square().mean() / (y - x).square().mean()).item())
    return found


@pytest.mark.parametrize('parameters', ['mlp', 'block'])
@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_block_learns_and_is_reported_as_whole_passes_see_it(kind, parameters):
    dense, model = pair(kind)
    first, batches = plain_errors(dense, model, text())[0], text()
    rows = refine(dense, model, batches, Refinement(60, 0.02, parameters))
    assert [row['block'] for row in rows] == [0, 1]
    assert rows[0]['before'] == pytest.approx(first, rel=1e-4)
    assert [row['after'] for row in rows] == pytest.approx(plain_errors(dense, model, batches), rel=1e-4)
    assert all(row['after'] < row['before'] for row in rows)
    assert sum(row['after'] for row in rows) < 0.9 * sum(row['before'] for row in rows)


def test_a_block_that_can_be_the_dense_one_becomes_it():
    model = random_model(dtype=torch.float32, linear={'h.*.mlp.*': 'lowrank(8)'})
    dense = copy.deepcopy(model)
    dense.realise()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if '.mlp.' in name:
                p.add_(0.3 * p.square().mean().sqrt() * torch.randn_like(p))
    rows = refine(dense, model, text(160), Refinement(500, 0.03))
    assert rows[0]['before'] > 0.01 and all(row['after'] < 0.03 * row['before'] for row in rows)


@pytest.mark.parametrize('rate', [1e-9, 10.0])
def test_the_held_out_error_never_rises(rate):
    dense, model = pair('llama')
    before = plain_errors(dense, model, text())[0]
    rows = refine(dense, model, text(), Refinement(20, rate))
    assert all(row['after'] <= row['before'] for row in rows) and rows[0]['before'] == pytest.approx(before, rel=1e-4)
    assert plain_errors(dense, model, text()) == pytest.approx([row['after'] for row in rows], rel=1e-4)
    if rate == 10.0:
        assert [row['step'] for row in rows] == [0, 0]


@pytest.mark.parametrize('parameters, parts', [('mlp', ('mlp',)), ('block', ('mlp', 'attn', 'ln_1', 'ln_2'))])
def test_only_the_named_part_changes_and_frozen_parameters_stay(parameters, parts):
    dense, model = pair('gpt2')
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    before, other, flags = state(model), state(dense), [p.requires_grad for p in model.parameters()]
    refine(dense, model, text(), Refinement(20, 0.02, parameters))
    found = changed(before, model)
    assert {name.split('.')[3] for name in found} == set(parts)
    assert 'transformer.h.0.mlp.c_fc.weight' not in found and 'transformer.h.1.mlp.c_fc.weight' in found
    assert not changed(other, dense)
    assert flags == [p.requires_grad for p in model.parameters()] and all(p.grad is None for p in model.parameters())
    assert model.training and dense.training


def test_a_parameter_of_two_modules_stays():
    dense, model = pair('gpt2')
    model.transformer.h[1].mlp.c_fc.weight = model.transformer.h[0].mlp.c_fc.weight
    before = state(model)
    refine(dense, model, text(), Refinement(20, 0.02))
    assert not [name for name in changed(before, model) if 'c_fc.weight' in name]


def test_equal_models_are_left_alone():
    dense, _ = pair('gpt2')
    model = damaged(dense, size=0.0)
    before = state(model)
    rows = refine(dense, model, text(), Refinement(20, 0.02, 'block'))
    assert not changed(before, model) and [row['before'] for row in rows] == [0.0, 0.0]


def test_ngpts_matrices_stay_of_unit_length():
    dense, model = pair('ngpt')
    refine(dense, model, text(), Refinement(20, 0.02, 'block'))
    before = state(model)
    model.normalise_weights()
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, before[name], rtol=1e-5, atol=1e-6)


def test_the_curvature_is_that_of_the_loss_at_the_blocks_end():
    dense = random_model(dtype=torch.float64).eval()
    batches = text(4)
    (x, y), = batches
    outs = []
    handles = [block.register_forward_hook(lambda _, args, out: outs.append(out)) for block in dense.transformer.h]
    loss = dense(x, y)[1] * y.numel()
    for handle in handles:
        handle.remove()
    for out, R in zip(outs, roots(dense, batches)):
        g, = torch.autograd.grad(loss, out, retain_graph=True)
        H = g.flatten(0, 1).T @ g.flatten(0, 1) / y.numel()
        low = H.diagonal()
        H = H + 0.1 * min(low.mean(), 3 * low.median()) * torch.eye(16)
        torch.testing.assert_close(R @ R.T, H / H.diagonal().mean())


def test_the_curvature_weighs_the_error():
    dense, model = pair('gpt2')
    again = damaged(dense)
    plain = refine(dense, model, text(), Refinement(20, 0.02))
    rows = refine(dense, again, text(), Refinement(20, 0.02, error='curvature'))
    R = roots(dense, text())[0]
    streams = Streams(dense, damaged(dense), windows(text())[1])
    x = streams.streams[0][0][0]
    with torch.no_grad():
        streams.move(0)
        streams.move(1)
    y, out = (stream[0][0] for stream in streams.streams)
    error = ((out - y) @ R).square().mean() / ((y - x) @ R).square().mean()
    assert rows[0]['before'] == pytest.approx(error.item(), rel=1e-4) and rows[0]['before'] != plain[0]['before']
    assert all(row['after'] < row['before'] for row in rows) and changed(state(model), again)


# ---------------------------------------------------------------------------------------------------
# resuming

class Killed(Exception):
    pass


@pytest.mark.parametrize('error', ['mse', 'curvature'])
def test_a_refinement_that_was_killed_goes_on_with_equal_bits(tmp_path, monkeypatch, error):
    how = Refinement(20, 0.02, 'block', error)
    dense, whole = pair('llama')
    rows = refine(dense, whole, text(), how)

    def interrupted(folder, kill_at, model):
        own = refining.fit

        def fit(block, *rest):
            calls.append(block.streams.index)
            if block.streams.index == kill_at:
                raise Killed
            return own(block, *rest)
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(refining, 'fit', fit)
            return refine(dense, model, text(), how, folder), calls
    with pytest.raises(Killed):
        interrupted(tmp_path, 1, damaged(dense))
    model = damaged(dense)
    assert interrupted(tmp_path, None, model) == (rows, [1])            # block 0 came from its file
    assert not changed(state(whole), model)
    assert interrupted(tmp_path, 0, damaged(dense)) == (rows, [])
    with pytest.raises(Killed):                                         # another model's files are none
        interrupted(tmp_path, 0, damaged(dense, seed=2))
    (tmp_path / 'h.1.safetensors').write_bytes(b'cut')
    assert interrupted(tmp_path, None, damaged(dense)) == (rows, [1])
    (tmp_path / 'h.0.safetensors').unlink()             # what was fitted behind another block 0 counts no more
    assert interrupted(tmp_path, None, damaged(dense)) == (rows, [0, 1])


def test_other_settings_text_or_frozen_parts_are_another_refinement(tmp_path):
    dense, model = pair('gpt2')
    how, mark = Refinement(5, 0.02), refining.identity
    first = mark(dense, model, text(), how)
    assert mark(dense, model, text(), how) == first
    assert mark(dense, model, text(), Refinement(5, 0.03)) != first
    assert mark(dense, model, text(seed=1), how) != first
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    assert mark(dense, model, text(), how) != first


def test_a_folder_of_another_rank_is_read_and_not_written(tmp_path):
    dense, model = pair('gpt2')
    refine(dense, model, text(), Refinement(5, 0.02), tmp_path / 'x', write=False)
    assert not (tmp_path / 'x').exists()


# ---------------------------------------------------------------------------------------------------
# the text

def test_a_tenth_is_held_out_in_whole_windows():
    train, held = windows([(x, None) for x in torch.arange(640).view(40, 16).split(4)])
    assert [len(x) for x, _ in train] == [2] * 18 and [len(x) for x, _ in held] == [2, 2]
    assert torch.equal(torch.cat([x for x, _ in train + held]), torch.arange(640).view(40, 16))


def test_too_little_text_is_refused_in_one_line():
    dense, model = pair('gpt2')
    with pytest.raises(UserError, match='whole windows of 16 tokens, and got 1 of them; raise calibration_tokens') as found:
        refine(dense, model, [(torch.zeros(1, 16, dtype=torch.int64), None)], Refinement(5, 0.02))
    assert '\n' not in str(found.value)
