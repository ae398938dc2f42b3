"""The training loop on a GPU: one transfer per step, float16's scaler, deterministic runs, the residual stream."""
import json
import math
import os

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import configurator
import train
from checkpoints import checkpoint
from model import GPT, Block, GPTConfig
from reporting import hardware, runlog
from tests.tiny import arguments, make_data
from training import precision
from variants import UserError


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(autouse=True)
def as_it_was():
    train.STOP.update(signal=None, time=0.0)
    yield
    precision.deterministic(False)


def run(data, out, *more):
    train.main(configurator.load(arguments(data, out, *more)))
    return checkpoint.load(out)


def equal(a, b):
    """Whether two checkpoints hold the same bits of weights and optimizer state."""
    return all(torch.equal(t, b['model'][n]) for n, t in a['model'].items()) and all(
        torch.equal(t, b['optimizer'][n][k]) for n, entries in a['optimizer'].items() for k, t in entries.items())


# ---- one transfer per step ----

class Transfers(TorchFunctionMode):
    """The tensors that item(), tolist(), bool() and their like were asked of, which waits for their device."""
    NAMES = ('item', 'tolist', 'cpu', 'numpy', '__bool__', '__float__', '__int__', '__index__', '__array__')

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, '__name__', '')
        if name in self.NAMES:
            self.found.append((name, args[0]))
        return function(*args, **(kwargs or {}))


class Reads(TorchDispatchMode):
    """The tensors of which C++ code read a number."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if 'local_scalar_dense' in str(function):
            self.found.append((str(function), args[0]))
        return function(*args, **(kwargs or {}))


WAYS = {'plain': [], 'accumulation': ['--gradient_accumulation_steps=4'], 'muon': ['--optimizer=muon'],
        'float16': ['--dtype=float16'], 'half weights': ['--weights=float16'], 'outliers': ['--skip_zscore=3.0'],
        'average': ['--ema_decay=0.9', '--orthograd=True'],
        'products': ['--optimizer=muon', '--muon_product=spectron', '--look_ahead=0.6', '--look_ahead_from=0'],
        'rows': ['--optimizer=muon', '--muon_row_beta=0.9'], 'chunks': ['--loss_chunk=16', '--recompute=True'],
        'ngpt': ['--ngpt=full', '--rope=True', '--tie_weights=False', '--linear=h.*=dense'],
        'window': ["--attention=window(128, schedule='linear')"], 'guides': ['--self_guided=0.5'],
        'mixture': ['--mlp=kron_moe(4, top_k=2)', '--linear=h.*.attn.*=dense']}


@pytest.mark.parametrize('way', WAYS)
def test_a_step_waits_for_the_device_once(data, tmp_path, monkeypatch, way):
    """Muon's counters of steps lie on the CPU wherever the model is."""
    real, counted = train.train_step, []

    def watched(run, *rest):
        with Transfers() as calls, Reads() as reads:
            result = real(run, *rest)
        own = {id(entries['step']) for entries in run.optimizer.parts[-1].state.values()}
        counted.append([name for name, tensor in calls.found + reads.found if id(tensor) not in own])
        return result
    monkeypatch.setattr(train, 'train_step', watched)
    run(data, tmp_path, *WAYS[way], '--max_iters=3', '--eval_interval=3')
    assert counted == [['tolist']] * 3


def test_the_numbers_of_a_step_are_those_that_were_summed():
    from types import SimpleNamespace
    job = SimpleNamespace(world_size=2, agree=lambda values, op: [2 * value for value in values])      # two equal ranks
    sums = {}
    for loss, extra in ((1.5, 0.25), (2.5, 0.5)):
        measures = {('balance_loss', 'h.0'): torch.tensor(extra), ('load', 'h.0'): torch.ones(4),
                    ('balance_loss', 'h.1'): torch.tensor(1.0)}
        train.add_losses(sums, torch.tensor(loss, requires_grad=True), measures)
    assert train.arrived(sums, torch.tensor(7.0), 2, job) == (2.0, {'balance_loss': 1.375}, 7.0)


class Event:
    """torch.cuda.Event on a clock that ticks once a record, in milliseconds."""
    now = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now = self.time = Event.now + 1

    def elapsed_time(self, end):
        return float(end.time - self.time)


def test_parts_are_timed_on_a_gpu_without_waiting_for_it(monkeypatch):
    """The optimizer's time stands in the next line: when its own is written the device is still at it."""
    from types import SimpleNamespace

    def refuse(*args):
        raise AssertionError('the device was waited for')
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'synchronize', refuse)
    log = object.__new__(runlog.RunLog)
    log.parts, log.late, log.job = [], [], SimpleNamespace(device=torch.device('cuda'))
    lines = []
    for step in range(3):
        if step == 1:
            with log.part('eval'):
                pass
        log.begin()
        for name in ('data', 'forward_backward', 'data', 'forward_backward', 'optimizer'):
            with log.part(name):
                pass
        lines.append(log.spent())
    both = {'data_ms': 2.0, 'forward_backward_ms': 2.0}
    assert lines == [both, {'eval_ms': 1.0, 'optimizer_ms': 1.0, **both}, {'optimizer_ms': 1.0, **both}]


def test_on_a_cpu_a_line_has_all_of_its_parts(data, tmp_path):
    run(data, tmp_path, '--max_iters=4', '--eval_interval=2')
    lines = [json.loads(line) for line in open(tmp_path / 'log.jsonl')]
    steps = [line for line in lines if 'loss' in line]
    assert all({'data_ms', 'forward_backward_ms', 'optimizer_ms'} <= set(line) for line in steps)
    assert [line['step'] for line in steps if 'eval_ms' in line] == [0, 2]
    assert all(line['optimizer_ms'] <= line['ms'] for line in steps)


# ---- float16 ----

def scales(data, out, monkeypatch, spoil, *more):
    """[(scale, growth tracker) after each step] of a float16 run whose fourth step is spoilt by `spoil(run)`."""
    real, seen, calls = train.train_step, [], []

    def spoilt(run, *rest):
        calls.append(1)
        undo = spoil(run) if len(calls) == 4 else None
        result = real(run, *rest)
        if undo:
            undo()
            assert not result['applied']
        state = run.scaler.state_dict()
        seen.append((state['scale'], state['_growth_tracker']))
        return result
    monkeypatch.setattr(train, 'train_step', spoilt)
    state = run(data, out, '--dtype=float16', '--max_iters=7', '--eval_interval=7', *more)
    assert state['step'] == 7 and all(t.isfinite().all() for t in state['model'].values())
    return seen


def outlier(run):
    real = run.outliers.check
    run.outliers.check = lambda **values: True
    return lambda: setattr(run.outliers, 'check', real)


def overflow(run):
    return next(run.model.parameters()).register_hook(lambda g: g * math.inf).remove


def lost(run):
    """A loss that is not a number."""
    return run.model.transformer.ln_f.register_forward_hook(lambda module, args, y: y * math.nan).remove


def test_a_step_passed_over_as_an_outlier_counts_as_one_without_overflow(data, tmp_path, monkeypatch):
    seen = scales(data, tmp_path, monkeypatch, outlier)
    assert seen == [(65536.0, step) for step in range(1, 8)]


@pytest.mark.parametrize('spoil, more', [(overflow, []), (lost, ['--nonfinite=skip'])])
def test_an_overflow_halves_the_scale_also_where_the_loss_is_lost(data, tmp_path, monkeypatch, spoil, more):
    seen = scales(data, tmp_path, monkeypatch, spoil, *more)
    assert seen == [(65536.0, 1), (65536.0, 2), (65536.0, 3), (32768.0, 0), (32768.0, 1), (32768.0, 2), (32768.0, 3)]


# ---- the same bits every time ----

SORTS = {'plain': [], 'mixture': ['--mlp=kron_moe(4, top_k=2)', '--linear=h.*.attn.*=dense'],
         'window and muon': ["--attention=window(128, schedule='linear')", '--optimizer=muon'],
         'linformer': ['--attention=linformer(4, chunk=8)'], 'chunks': ['--loss_chunk=16', '--recompute=True'],
         'dint, columns': ['--attention=dint', '--linear=h.*.mlp.*=kron(8, 8, exact_columns=2)']}


@pytest.mark.parametrize('sort', SORTS)
def test_deterministic_changes_no_bit_on_a_cpu(data, tmp_path, sort):
    plain = run(data, tmp_path / 'a', *SORTS[sort])
    assert not torch.are_deterministic_algorithms_enabled()
    assert equal(plain, run(data, tmp_path / 'b', *SORTS[sort], '--deterministic=True'))
    assert torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_such_an_algorithm_is_said_in_one_line(data, tmp_path, monkeypatch, capsys):
    def raises(*args):
        torch.zeros(4).put_(torch.tensor([0]), torch.ones(1))
    monkeypatch.setattr(train, 'train_step', raises)
    with pytest.raises(SystemExit) as leave:
        run(data, tmp_path, '--deterministic=True')
    err = capsys.readouterr().err
    assert leave.value.code == 2 and 'put_' in err and 'set deterministic=False' in err and err.count('\n') == 1


@pytest.mark.parametrize('sort', SORTS)
def test_no_memory_is_read_before_it_is_written(data, tmp_path, monkeypatch, sort):
    """With NaN in all fresh memory the numbers are the same, so that a deterministic run need not fill it."""
    plain = run(data, tmp_path / 'a', *SORTS[sort])
    real = precision.deterministic

    def filling(wanted):
        real(wanted)
        torch.utils.deterministic.fill_uninitialized_memory = True
    monkeypatch.setattr(precision, 'deterministic', filling)
    assert equal(plain, run(data, tmp_path / 'b', *SORTS[sort], '--deterministic=True'))
    assert torch.empty(3).isnan().all()


def test_the_environment_is_set_before_a_device_is_looked_for(data, tmp_path, monkeypatch):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    def look(*args):
        seen.append((os.environ.get('CUBLAS_WORKSPACE_CONFIG'), torch.are_deterministic_algorithms_enabled(),
                     torch.backends.cuda.cudnn_sdp_enabled(), torch.utils.deterministic.fill_uninitialized_memory))
        return torch.device('cpu')
    monkeypatch.setattr(hardware, 'device', look)
    for wanted, expected in ((True, (':4096:8', True, False, False)), (False, (':4096:8', False, True, True))):
        seen = []
        train.parallel.start(configurator.load([f'--deterministic={wanted}']))
        assert seen == [expected]


def test_a_resumed_run_stays_deterministic(data, tmp_path):
    run(data, tmp_path, '--deterministic=True', '--max_iters=2')
    precision.deterministic(False)
    train.main(configurator.load([f'--out_dir={tmp_path}', '--init_from=resume', '--max_iters=3']))
    assert torch.are_deterministic_algorithms_enabled()


# ---- the residual stream ----

STREAMS = {'gpt2': {}, 'bias': dict(bias=True), 'llama': dict(rope=True, norm='rmsnorm', mlp='swiglu', qk_norm='standard'),
           'ngpt': dict(ngpt='full', rope=True, tie_weights=False), 'mixture': dict(mlp='kron_moe(4, top_k=2)'),
           'dint': dict(attention='dint', value_residual=True), 'latent': dict(mlp='latent(16)'),
           'structured': dict(linear={'*.attn.*': 'lowrank(4)', '*.c_fc': 'kron(8, 8, terms=2)', '*.c_proj': 'abba(2, 2)'}),
           'mla': dict(attention='mla(8, qk_rope_head_dim=4)'), 'linformer': dict(attention='linformer(4, chunk=8)')}


def streamed(name, residual, **more):
    """(types of what blocks receive and ln_f gets, loss, {name: gradient}) under bf16 autocast."""
    torch.manual_seed(0)
    settings = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=61)
    model, seen = GPT(GPTConfig(**{**settings, **STREAMS[name], 'residual': residual, **more})), []
    for module in (*model.transformer.h, model.transformer.ln_f):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    x = torch.randint(61, (3, 16))
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(x, x.roll(-1, 1))[1]
    loss.backward()
    return seen, loss.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize('name', STREAMS)
def test_the_residual_stream_has_the_type_that_was_asked_for(name):
    wide, loss, gradients = streamed(name, 'float32')
    narrow, near, rounded = streamed(name, 'bfloat16')
    assert wide == [torch.float32] * 3 and narrow == [torch.bfloat16] * 3
    assert abs(loss - near) < 1e-2 * loss
    a, b = (torch.cat([g[n].flatten() for n in gradients]) for g in (gradients, rounded))
    assert 0 < (a - b).norm() / a.norm() < 0.05 and all(g.dtype == torch.float32 for g in rounded.values())


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_recomputed_and_chunked_it_is_the_same(name):
    _, loss, gradients = streamed(name, 'bfloat16')
    _, again, recomputed = streamed(name, 'bfloat16', recompute=True)
    assert torch.equal(loss, again) and all(torch.equal(recomputed[n], g) for n, g in gradients.items())
    _, near, chunked = streamed(name, 'bfloat16', loss_chunk=16)
    assert abs(near - loss) < 1e-3
    assert all((chunked[n] - g).norm() < 0.05 * g.norm() + 1e-6 for n, g in gradients.items())


def test_without_autocast_the_setting_changes_nothing():
    model, x = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=61)), torch.randint(61, (2, 8))
    plain = model(x, x)[1]
    model.config.residual = 'bfloat16'
    assert torch.equal(model(x, x)[1], plain)
    with torch.autocast('cpu', torch.float16):                      # float16 would overflow, and bf16 would not help it
        model.transformer.h[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
        seen = []
        model(x, x)
    assert seen == [torch.float32] and isinstance(model.transformer.h[0], Block)


def test_a_residual_stream_that_nothing_computes_in_is_refused(data, tmp_path, capsys):
    for more in (['--dtype=float32'], ['--dtype=float16'], ['--weights=bfloat16']):
        with pytest.raises(SystemExit) as leave:
            run(data, tmp_path, '--residual=bfloat16', *more)
        err = capsys.readouterr().err
        assert leave.value.code == 2 and "set residual='float32'" in err and err.count('\n') == 1
    run(data, tmp_path / 'auto', '--residual=bfloat16', '--max_iters=0')
    assert 'needs a GPU with bf16' in capsys.readouterr().out


def test_it_trains_grows_and_is_free_to_change_on_resume(data, tmp_path):
    grown = ['--dtype=bfloat16', '--grow_from=1', '--grow_every=4', '--linear=h.0.*=dense']
    run(data, tmp_path, *grown, '--residual=bfloat16', '--max_iters=6')
    state = run(data, tmp_path, *grown, '--residual=float32', '--init_from=resume')
    assert state['step'] == 12 and state['config']['residual'] == 'float32' and state['best_val_loss'] < 2.9
    with pytest.raises(UserError, match='residual must be one of'):
        configurator.load(['--residual=bf16'])
