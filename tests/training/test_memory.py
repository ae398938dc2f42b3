"""What saves memory must not change the numbers: chunked loss, recomputed blocks; and branches that start at zero."""
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from layers.losses import ChunkedCrossEntropy, cross_entropy
from model import GPT, GPTConfig, UserError
from training import evaluation
from training.parallel import Job

SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=61)
BLOCKS = {'gpt2': {}, 'llama': dict(rope=True, norm='rmsnorm', mlp='swiglu', tie_weights=False, softcap=15.0),
          'ngpt': dict(ngpt='full', rope=True, tie_weights=False), 'value residual': dict(value_residual=True, dropout=0.2),
          'dint': dict(attention='dint', value_residual=True), 'mla': dict(attention='mla(8, qk_rope_head_dim=4)')}


def gradients(dtype=torch.float64, targets=None, **settings):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **settings})).to(dtype)
    x = torch.randint(61, (3, 16))
    torch.manual_seed(1)
    logits, loss = model(x, x.roll(-1, 1) if targets is None else targets)
    loss.backward()
    return logits, loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize('chunk', [1, 7, 48, 1000])
@pytest.mark.parametrize('name', BLOCKS)
def test_the_chunked_loss_and_its_gradients_are_the_whole_ones(name, chunk):
    logits, loss, whole = gradients(**BLOCKS[name])
    none, chunked, pieces = gradients(**BLOCKS[name], loss_chunk=chunk)
    assert logits is not None and none is None and abs(chunked - loss) < 1e-12
    assert all((pieces[n] - g).abs().max() < 1e-12 for n, g in whole.items())


def test_ignored_targets_count_for_nothing():
    targets = torch.randint(61, (3, 16))
    targets[:, ::3] = -1
    _, loss, whole = gradients(targets=targets)
    _, chunked, pieces = gradients(targets=targets, loss_chunk=5)
    assert abs(chunked - loss) < 1e-12 and all((pieces[n] - g).abs().max() < 1e-12 for n, g in whole.items())


@pytest.mark.parametrize('softcap', [0.0, 2.0])
def test_the_chunked_gradient_against_finite_differences(softcap):
    torch.manual_seed(0)
    x, w = (torch.randn(rows, 4, dtype=torch.float64, requires_grad=True) for rows in (5, 7))
    targets = torch.tensor([0, 6, -1, 3, 3])
    assert torch.autograd.gradcheck(lambda x, w: ChunkedCrossEntropy.apply(x, w, targets, softcap, 2), (x, w))


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch):
    from layers import losses
    seen = []
    monkeypatch.setattr(losses, 'cross_entropy', lambda z, *rest: seen.append(z.shape) or cross_entropy(z, *rest))
    x, w = torch.randn(20, 4, requires_grad=True), torch.randn(7, 4)
    ChunkedCrossEntropy.apply(x, w, torch.randint(7, (20,)), 0.0, 8)
    assert seen == [(8, 7), (8, 7), (4, 7)]


def test_in_bfloat16_the_chunked_loss_is_summed_in_fp32():
    torch.manual_seed(0)
    x, w, y = torch.randn(512, 16), torch.randn(61, 16), torch.randint(61, (512,))
    exact = F.cross_entropy(x @ w.T, y)
    with torch.autocast('cpu', torch.bfloat16):
        loss = ChunkedCrossEntropy.apply(x, w, y, 0.0, 32)
    assert loss.dtype == torch.float32 and abs(loss - exact) < 5e-3
    assert ChunkedCrossEntropy.apply(x.bfloat16(), w.bfloat16(), y, 0.0, 32).dtype == torch.float32


def test_evaluation_still_gives_logits():
    model, x = GPT(GPTConfig(**SMALL, loss_chunk=4)).eval(), torch.randint(61, (3, 16))
    logits, loss = model(x, x)
    assert logits.shape == (3, 16, 61) and loss.isfinite()


class Sizes(TorchDispatchMode):
    """The largest number of elements of a tensor that an operation makes."""
    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.numel())
        return out


def scored(chunk, name='gpt2'):
    """(mean_loss of training/evaluation.py on two batches, one with targets that do not count, largest tensor made)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, 'vocab_size': 997, **BLOCKS[name]}, loss_chunk=chunk)).eval()
    x = torch.randint(997, (3, 6, 16))
    y = x.roll(-1, 2)
    y[2, :, :9] = -1
    job = Job(0, 1, torch.device('cpu'), torch.float32)
    with Sizes() as sizes:
        found = evaluation.mean_loss(model, model, zip(x[:2], y[:2]), job)
        with torch.no_grad():
            found = (*found[:2], model(x[2], y[2], guess=True)[1].item())
    return found, sizes.most


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'ngpt'])
def test_evaluation_makes_a_chunk_of_logits_at_a_time(name):
    """As many logits as the weights of the head are always there; 96 tokens have three times as many."""
    whole, most = scored(0, name)
    assert most == 96 * 997
    for chunk in (32, 7):
        pieces, less = scored(chunk, name)
        assert less <= 32 * 997 and pieces == pytest.approx(whole, rel=1e-6) and pieces[1] == whole[1]


def test_stablemax_has_no_chunks():
    import configurator
    with pytest.raises(UserError, match='loss_chunk=0'):
        configurator.load(['--loss=stablemax', '--loss_chunk=64'])


@pytest.mark.parametrize('name', BLOCKS)
def test_recomputed_blocks_give_the_same_bits(name):
    _, loss, kept = gradients(torch.float32, **BLOCKS[name])
    _, again, recomputed = gradients(torch.float32, **BLOCKS[name], recompute=True)
    assert torch.equal(loss, again) and all(torch.equal(recomputed[n], g) for n, g in kept.items())


def test_recomputing_keeps_less():
    def saved(recompute):
        model, x, kept = GPT(GPTConfig(**SMALL, recompute=recompute)), torch.randint(61, (3, 16)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            model(x, x)
        return sum(kept)
    assert saved(True) < saved(False) / 2


@pytest.mark.parametrize('linear', [{}, {'*': 'kron(4, 4)'}, {'*': 'lowrank(4)'}])
def test_zero_init_makes_every_block_the_identity_and_every_site_learns(linear):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, zero_init=True, linear=linear))
    x = torch.randn(2, 16, 32)
    from model import Context
    ctx = Context(torch.zeros(2, 16, dtype=torch.long), torch.arange(16), model.config)
    assert torch.equal(model.transformer.h[0](x, ctx), x)
    optimizer, idx = torch.optim.SGD(model.parameters(), lr=1.0), torch.randint(61, (2, 16))
    for _ in range(2):                                      # the first step moves c_proj, the second everything
        optimizer.zero_grad()
        model(idx, idx)[1].backward()
        optimizer.step()
    assert all(p.grad.any() for p in model.parameters())
