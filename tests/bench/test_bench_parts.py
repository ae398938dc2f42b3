"""The parts of bench.py that train, race and launch: results are whole, checks are right. No clock is asserted."""
import json
import math
import os
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch

import configurator
from bench import (
    aims,
    cases,
    check,
    checks,
    compiled,
    devices,
    gpu,
    ladder,
    parent,
    processes,
    races,
    ranks,
    recipe,
    rung,
    step,
    training,
)
from bench.steps import Steps
from model import GPT, CausalSelfAttention, GPTConfig
from training.parallel import start
from variants import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=2', '--device=cpu']
CHAR = 'config/train_shakespeare_char.py'
CPU = torch.device('cpu')
SPREAD = {'median', 'min', 'max'}


@pytest.fixture
def measured(run_program):
    """measured('ladder', '--rounds=1', ...) -> the result of a second process as --json prints it."""
    def measure(*arguments):
        done = run_program('bench.py', *arguments, '--json', env={'CUDA_VISIBLE_DEVICES': ''}, timeout=1200)
        return json.loads(done.stdout, parse_constant=pytest.fail)
    return measure


@pytest.fixture
def run(capsys, monkeypatch):
    """run('ladder', '--key=value', ...) -> (exit code, stdout, stderr) of bench.py in this process."""
    def program(*arguments):
        monkeypatch.setattr(sys, 'argv', ['bench.py', *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / 'bench.py'), run_name='__main__')
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()
    return program


def settings_of(part, *arguments):
    return configurator.load(arguments, part.Settings)


# ----------------------------------------------------------------------------------------------------
# mistakes

@pytest.mark.parametrize('arguments, sentence', [
    (['ladder', '--device=tpu'], 'device must be'),
    (['ladder', '--n_head=5', '--n_embd=32', '--checks=False'], 'n_head must divide n_embd'),
    (['ladder', '--rungs=3'], "there is no setting 'rungs'"),
    (['precision', '--sizes=4x3x128'], 'heads a divisor of width'),
    (['precision', '--sizes=small'], "got 'small'"),
    (['step'], '--config=config/X.py'),
    (['step', '--config=no/such.py'], 'there is no such config file'),
    (['step', f'--config={CHAR}', '--n_embed=4'], "did you mean 'n_embd'?"),
    (['step', f'--config={CHAR}', '--n_head=5'], 'n_head must divide n_embd'),
    (['step', f'--config={CHAR}', '--progress=1.5'], 'at most 1'),
    (['step', f'--config={CHAR}', '--init_from=gpt2'], "must be 'scratch'"),
    (['sample'], '--config=config/X.py'),
    (['sample', f'--config={CHAR}', '--prompt=256'], 'below block_size (256)'),
    (['optim', '--sizes=tiny'], "got 'tiny'"),
    (['loader', '--data=no/such'], "no folder 'no/such'"),
    (['devices'], '--config=config/X.py'),
    (['devices', f'--config={CHAR}', '--kinds=tp'], "got 'tp'"),
    (['devices', f'--config={CHAR}', '--out_dir=here'], 'set by this part itself'),
    (['recipe'], '--baseline=FOLDER'),
    (['recipe', '--baseline=tests'], "'tests' is not a clone of nanoGPT: it lacks train.py"),
    (['gpu', '--only=everything'], "got 'everything'"),
    (['gpu', '--only=nanogpt'], 'nanogpt wants --baseline=FOLDER'),
    (['gpu', '--baseline=tests'], "'tests' is not a clone of nanoGPT: it lacks model.py"),
    (['check', '--only=krom'], "did you mean 'kron'?"),
    (['check', '--device=tpu'], 'device must be'),
    (['ranks'], '--config=config/X.py'),
    (['ranks', f'--config={CHAR}', '--backend=nccl'], 'set by this part itself'),
    (['parent'], '--baseline=FOLDER'),
    (['parent', '--baseline=tests'], "'tests' is not a clone of nanoGPT: it lacks model.py"),
])
def test_a_mistake_is_one_line(arguments, sentence, run):
    code, out, err = run(*arguments)
    assert code == 2 and out == '' and err.count('\n') == 1 and err.startswith('bench.py: ') and sentence in err, err


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_gpu_without_one_is_one_line(run):
    code, out, err = run('gpu')
    assert (code, out) == (2, '') and err.count('\n') == 1 and '--device=cpu' in err


def test_help_names_every_setting(run):
    for part in (ladder, step, devices, recipe, gpu, check, ranks, parent):
        code, out, _ = run(part.__name__.removeprefix('bench.'), '--help')
        assert code == 0 and all(f'--{name}=' in out for name in configurator.settings(part.Settings))


def test_parts_import_no_torch():
    import ast
    for name in ('ladder', 'step', 'sampling', 'optimizing', 'loading', 'scaling', 'devices', 'rule', 'recipe', 'gpu',
                 'processes', 'aims', 'check', 'ranks', 'parent'):
        tree = ast.parse((ROOT / 'bench' / f'{name}.py').read_text())
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert 'torch' not in ' '.join(map(ast.unparse, top)), name


# ----------------------------------------------------------------------------------------------------
# the ladder

def test_the_ladder_of_a_cpu_as_json(measured):
    found = measured('ladder', *SMALL, '--rounds=2', '--round_s=0', '--check_tokens=char', '--check_iters=3')
    rungs = found['rungs']
    assert [row['name'] for row in rungs] == ['fp32', 'SDPA', 'fused AdamW', 'bf16 autocast', 'Muon',
                                              'chunked cross-entropy']
    assert [row['after'] for row in rungs] == [None, 'fp32', 'SDPA', 'fused AdamW', 'fused AdamW', 'Muon']
    assert [row['name'] for row in rungs if row['aside']] == ['bf16 autocast']
    for row in rungs:
        assert row['first_loss'] == pytest.approx(rungs[0]['first_loss'], abs=2e-2 if row['aside'] else 1e-5)
        assert row['ms'] > 0 and row['tokens_per_s'] > 0 and row['peak_memory'] > 0
        assert row['gain_min'] <= row['gain'] <= row['gain_max'] and row['gain_total'] > 0
    assert rungs[0]['gain'] == rungs[0]['gain_total'] == 1
    assert found['checks']['iters'] == 3 and found['left_out'] == [] and found['machine']['gpu'] is None


def test_rungs_of_a_gpu_stand_on_one_another():
    names, states, asides = zip(*ladder.rungs('cuda', True, True))
    assert names == ('fp32', 'TF32', 'bf16 autocast', 'torch.compile', 'SDPA', 'padded vocabulary', 'fused AdamW', 'Muon',
                     'chunked cross-entropy')
    assert not any(asides) and [sum(state) for state in states] == list(range(9))
    assert 'padded vocabulary' not in [name for name, *_ in ladder.rungs('cuda', True, False)]


def test_what_is_aside_carries_nothing_on():
    states = {name: state for name, state, _ in ladder.rungs('cpu', True, True)}
    assert states['bf16 autocast'].half and states['torch.compile'].compiled
    assert not states['Muon'].half and not states['Muon'].compiled and states['Muon'].fused


def test_open_attention_is_the_same_function():
    torch.manual_seed(0)
    config = GPTConfig(n_embd=16, n_head=4, n_layer=1, vocab_size=9, block_size=8)
    model = GPT(config).double()
    x = torch.randint(9, (2, 8))
    expected = model(x, x)[0]
    assert type(model.transformer.h[0].attn) is CausalSelfAttention
    model.transformer.h[0].attn.__class__ = rung.OpenAttention
    assert torch.allclose(model(x, x)[0], expected, rtol=0, atol=1e-12)


def test_a_rung_is_what_its_state_says():
    settings = ladder.filled(settings_of(ladder, *SMALL), 'cpu')
    tokens, size = torch.arange(200) % 50, 50
    every = {name: rung.Rung(name, state, aside, settings, tokens, size, CPU)
             for name, state, aside in ladder.rungs('cpu', False, True)}
    attention = {name: type(one.model.transformer.h[0].attn) for name, one in every.items()}
    assert attention.pop('fp32') is rung.OpenAttention and set(attention.values()) == {CausalSelfAttention}
    assert every['SDPA'].optimizer.param_groups[0]['fused'] is False
    assert [type(part).__name__ for part in every['fused AdamW'].optimizer.parts] == ['AdamW']
    assert [type(part).__name__ for part in every['Muon'].optimizer.parts] == ['AdamW', 'Muon']
    assert every['Muon'].model.config.loss_chunk == 0 and every['chunked cross-entropy'].model.config.loss_chunk == 4
    assert every['bf16 autocast'].kind == torch.bfloat16 and every['Muon'].kind == torch.float32


def test_gains_are_ratios_within_a_round():
    class Fake:
        memory = first_s = first_loss = 0.0             # nothing of this is asked for here

        def __init__(self, name, aside):
            self.name, self.aside = name, aside
    built = [Fake('a', False), Fake('b', True), Fake('c', False)]
    rounds = [[10.0, 20.0, 5.0], [100.0, 400.0, 25.0], [10.0, 10.0, 10.0]]
    rows = ladder.table(built, rounds, ladder.filled(settings_of(ladder, *SMALL), 'cpu'))
    assert [row['gain'] for row in rows] == [1, 0.5, 2] and rows[1]['gain_min'] == 0.25
    assert rows[2]['after'] == 'a' and rows[2]['tokens_per_s'] == pytest.approx(32 / 10e-3)


# ----------------------------------------------------------------------------------------------------
# the checks before a long run

@pytest.fixture(scope='module')
def checked():
    chosen = settings_of(ladder, *SMALL, '--check_tokens=char', '--check_iters=120', '--block_size=32')
    return checks.notes_checks(ladder.filled(chosen, 'cpu'), CPU)


def test_the_loss_at_init_is_that_of_spread_logits(checked):
    assert checked['rows'] == 128 and checked['expected'] == pytest.approx(math.log(128) + 32 * 0.0004 / 2)
    assert checked['init_loss'] == pytest.approx(checked['expected'], abs=0.03)


def test_the_spread_is_felt_in_a_wide_model():
    chosen = ladder.filled(settings_of(ladder, '--n_layer=1', '--n_head=2', '--n_embd=1024', '--block_size=32'), 'cpu')
    model = rung.make_model(chosen, 1024, 0, CPU)
    x, y = (torch.randint(1024, (64, 32)) for _ in range(2))
    expected = math.log(1024) + 1024 * 0.0004 / 2
    assert checks.mean_loss(model, x, y) == pytest.approx(expected, abs=0.03)
    assert abs(math.log(1024) - expected) > 0.2                         # which ln V alone would miss


def test_one_batch_is_learned_and_padding_rows_lose(checked):
    assert checked['overfit'] < checked['tied']['loss'] < checked['init_loss'] - 0.3
    for name in ('tied', 'untied'):
        assert checked[name]['padding_before'] == pytest.approx(0.5, abs=0.02)
        assert checked[name]['padding_after'] < 0.4
    assert checked['untied']['parameters'] - checked['tied']['parameters'] == 128 * 32
    assert str(checked['tied']['parameters'] // 1000) in checks.sentences(checked)


# ----------------------------------------------------------------------------------------------------
# step, sample, optim, loader

def test_a_step_as_json(measured):
    found = measured('step', '--config=config/train_gpt2.py', *SMALL, '--rounds=1', '--vocabulary=300',
                     '--random_tokens=True')
    assert found['data'] == 'random tokens' and found['micro_steps'] == 40 and found['tokens'] == 40 * 2 * 16
    assert list(found['parts']) == ['data', 'forward', 'backward', 'optimizer']
    assert sum(found['shares'].values()) == pytest.approx(1) and sum(found['forward_shares'].values()) == pytest.approx(1)
    assert found['tokens_per_s'] == pytest.approx(1e3 * found['tokens'] / found['ms'])
    assert found['mfu_measured'] == pytest.approx(found['flops_per_token'] * found['tokens_per_s'] / found['measured_peak'])
    assert found['mfu_sheet'] is None and found['peak_memory'] > 4 * 3 * found['parameters']     # weights, Adam's moments


def test_settings_stand_above_the_config():
    config = step.chosen(settings_of(step, f'--config={CHAR}', '--n_layer=2', '--batch_size=3', '--rounds=1'))
    assert (config.n_layer, config.batch_size, config.n_embd, config.beta2) == (2, 3, 384, 0.99)


def test_the_step_that_is_measured_is_that_of_training(tmp_path):
    """Loss and weights after one step are those of the same operations written out."""
    from data.loader import open_dataset
    step.random_data(tmp_path, 60, 16)
    config = step.chosen(settings_of(step, f'--config={CHAR}', *SMALL, '--dropout=0.0', '--grad_clip=0.5'))
    dataset = open_dataset(str(tmp_path), notice=lambda text: None)
    steps = Steps(config, start(config), dataset, 0.0)
    other = GPT(configurator.model_config(steps.config))
    other.load_state_dict(steps.model.state_dict())
    optimizer = torch.optim.AdamW(other.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.1)
    x, y = steps.loader.batch(1)
    loss = other(x, y)[1]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
    optimizer.step()
    steps.split(steps.loader)
    weights = dict(steps.model.named_parameters())
    for name, p in other.named_parameters():
        if p.ndim > 1:
            assert torch.allclose(weights[name], p, atol=1e-5), name


def test_memory_counts_weights_gradients_and_moments_at_least():
    model = torch.nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())

    def call():
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    call()
    size = 4 * 64 * 64
    assert 3 * size <= training.state_bytes(model, optimizer) < 3.1 * size
    assert training.step_memory(call, model, optimizer, CPU) >= 4 * size


def test_the_peak_of_matrix_products_is_no_dream():
    assert 1e9 < training.matmul_peak(CPU, torch.float32, 0.01) < 1e14


def test_sampling_as_json(measured):
    found = measured('sample', f'--config={CHAR}', *SMALL, '--prompt=4', '--new_tokens=100', '--rounds=1', '--vocab_size=50')
    assert found['new_tokens'] == 12 and found['same_tokens'] == 1.0 and set(found['gain']) == SPREAD
    assert found['tokens_per_s'] > 0 and found['tokens_per_s_without'] > 0 and 'static_gain' not in found
    both = measured('sample', f'--config={CHAR}', *SMALL, '--prompt=4', '--static=True', '--rounds=1', '--vocab_size=50')
    assert both['same_tokens_static'] == 1.0 and set(both['static_gain']) == SPREAD and both['tokens_per_s_static'] > 0


def test_optim_and_loader(run, tmp_path):
    path = tmp_path / 'found.json'
    assert run('optim', '--sizes=char,6x384 lowrank', '--rounds=1', '--round_ms=0', '--device=cpu', f'--json={path}')[0] == 0
    found, options = json.loads(path.read_text())['sizes'], {'convergent, 12 steps', 'row_beta', 'look_ahead'}
    assert set(found['char']['ms']) == {'batched', 'loop', 'torch', *options}
    assert set(found['6x384 lowrank']['ms']) == {'batched', 'loop', 'torch', 'product', *options}
    step.random_data(tmp_path / 'data', 60, 16)
    code, out, _ = run('loader', f'--data={tmp_path / "data"}', '--block_size=16', '--seconds=0', '--device=cpu', '--json')
    assert code == 0 and json.loads(out)['tokens_per_s'] > 0


# ----------------------------------------------------------------------------------------------------
# second processes

def test_a_process_is_timed_and_what_it_said_last_is_kept():
    code = 'import sys, time; t = time.process_time()\nwhile time.process_time() - t < 0.2: pass\nsys.exit("so it ends")'
    done = processes.timed([sys.executable, '-c', code], threads=1)
    assert done['code'] == 1 and done['wall_s'] >= done['cpu_s'] * 0.5 and done['cpu_s'] >= 0.2
    assert processes.last_line(done) == 'exit code 1: so it ends'


def test_a_process_that_takes_too_long_is_killed_with_its_children():
    code = 'import subprocess, sys; subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])'
    done = processes.timed([sys.executable, '-c', code], timeout=0.5)
    assert done['code'] is None and done['wall_s'] < 30 and 'stopped after' in processes.last_line(done)


def test_a_process_is_watched_and_its_words_are_not_lost():
    looks = []
    done = processes.timed([sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(1.5); print(2)'],
                           watch=lambda: looks.append(1))
    assert looks and done['code'] == 0 and done['out'] == '1\n2\n'
    done = processes.timed([sys.executable, '-c', 'import time; time.sleep(60)'], timeout=0.2, watch=lambda: None)
    assert done['code'] is None


def test_threads_reach_the_process():
    code = 'import os; print(os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"])'
    assert processes.timed([sys.executable, '-c', code], threads=3)['out'].split() == ['3', '3']


def test_rank_counts():
    assert [devices.rank_counts(n) for n in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8]]


@pytest.mark.slow
def test_devices_as_json(measured):
    found = measured('devices', f'--config={CHAR}', *SMALL, '--max_ranks=2', '--steps=3', '--vocabulary=60')
    assert [(row['parallel'], row['ranks']) for row in found['rows']] == [('ddp', 1), ('ddp', 2), ('fsdp', 1), ('fsdp', 2)]
    assert all(row['tokens_per_s'] > 0 and row['efficiency'] > 0 for row in found['rows'])


def test_a_run_that_fails_is_a_row_too(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, 'timed', lambda *given, **more: {'wall_s': 1.0, 'code': 2, 'out': '', 'err': 'a\nb\n'})
    chosen = settings_of(devices, f'--config={CHAR}', '--device=cpu', '--threads=1')
    row = devices.measure(chosen, 'ddp', 1, str(tmp_path))
    assert row == {'parallel': 'ddp', 'ranks': 1, 'error': 'exit code 2: b'}


# ----------------------------------------------------------------------------------------------------
# the GPU suite

def test_every_job_of_the_gpu_suite_is_one_that_its_part_takes(monkeypatch, clone):
    """Both argument lists of every job are read and checked as bench.py would."""
    import importlib
    parts = runpy.run_path(str(ROOT / 'bench.py'))['PARTS']
    monkeypatch.chdir(ROOT)
    for job in gpu.jobs(str(clone / 'nano')):
        module = importlib.import_module(parts[job.part])
        for arguments in (job.arguments, job.tiny):
            module.check(configurator.load(arguments, module.Settings), job.part)
    assert sum(job.seconds for job in gpu.first_jobs(str(clone))) < 60 * 13         # a machine lent for 15 minutes
    assert 'nanogpt' not in [job.name for job in gpu.jobs()]


def test_groups_are_chosen_by_name_and_shown():
    names = [job.name for job in gpu.wanted(settings_of(gpu, '--only=second, dense'))]
    assert names == ['dense', *(job.name for job in gpu.second_jobs())]
    found = gpu.run(settings_of(gpu, '--list=True', '--only=first'), 'gpu')
    assert [row['job'] for row in found['plan']] == [job.name for job in gpu.first_jobs('')]
    assert f'{sum(row["seconds"] for row in found["plan"]) / 60:.1f}' in gpu.text(found).splitlines()[-1]


def test_what_a_job_has_measured_is_kept_while_it_runs_and_when_it_is_stopped(monkeypatch, tmp_path):
    path, during = tmp_path / 'gpu.json', []

    def timed(command, timeout, watch):
        file = Path(command[-1].removeprefix('--json='))
        watch()
        for rows in ([1], [1, 2]):
            file.write_text(json.dumps({'part': 'linear', 'rows': rows}))
            os.utime(file, (len(rows), len(rows)))
            watch()
            during.append(json.loads(path.read_text())['jobs']['linear'])
        return {'wall_s': 75.0, 'code': None, 'out': '', 'err': ''}
    monkeypatch.setattr(gpu, 'timed', timed)
    found = gpu.run(settings_of(gpu, '--device=cpu', '--only=linear', f'--json={path}'), 'gpu')
    assert [job['result']['rows'] for job in during] == [[1], [1, 2]] and during[0]['error'] == 'not done'
    job = found['jobs']['linear']
    assert job['result']['rows'] == [1, 2] and job['error'] == 'stopped after 75 s' and 'measured in part' in gpu.text(found)
    assert json.loads(path.read_text()) == found


@pytest.mark.slow
def test_a_suite_that_is_killed_leaves_whole_json_with_every_case_that_was_done(tmp_path, start_program):
    path = tmp_path / 'gpu.json'
    process = start_program('bench.py', 'gpu', '--device=cpu', '--only=check', f'--json={path}',
                            env={'CUDA_VISIBLE_DEVICES': '', 'TMPDIR': str(tmp_path)})
    rows, end = [], time.monotonic() + 120
    while not rows and time.monotonic() < end:
        time.sleep(0.05)
        if path.exists():
            rows = json.loads(path.read_text())['jobs']['check'].get('result', {}).get('rows', [])
    process.kill()
    process.wait()
    left = json.loads(path.read_text())['jobs']['check']
    assert left['result']['rows'][0]['name'] == 'kron' and left['error'] == 'not done'


def test_aims_are_met_missed_or_not_measured():
    rate = {'part': 'step', 'tokens_per_s': 1000.0}
    clauses = [{'clause': f'dense over chosen, 768x768x1, forward at {tokens}', 'worst': x}
               for tokens, x in ((8192, 1.9), (32768, 1.7))]
    results = {'check': {'wrong': 0, 'failed': ['ddp kron'], 'breaks': 0, 'recompiled': 1},
               'train_gpt': {**rate, 'tokens_per_s': 5e5}, 'dense': rate, 'windows': rate,
               'kron rule': {**rate, 'tokens_per_s': 1119.0},
               'kron measured': {**rate, 'tokens_per_s': 1121.0},
               'nanogpt': {'x': {'median': 1.3}}, 'plans': {'clauses': clauses}, 'two ranks': {'failed': []}}
    rows = aims.judged({name: {'result': result} for name, result in results.items()})
    assert [row['met'] for row in rows] == [True, False, False, True, False, True, False, True, True, False, True]
    assert {row['met'] for row in aims.judged({'plans': {'result': {'clauses': []}}, 'dense': {'error': 'x'}})} == {None}
    lines = aims.text(rows).splitlines()
    assert lines[2].split('|')[-2].strip() == 'met' and lines[3].split('|')[-2].strip() == 'missed'
    assert 'at least 500,000' in lines[5] and aims.text(aims.judged({})).count('not measured') == len(aims.AIMS)


def test_a_failing_job_is_recorded_and_the_others_go_on(monkeypatch, tmp_path):
    jobs = [gpu.Job('bad', 'optim', [], ['--sizes=none'], 60), gpu.Job('slow', 'optim', [], ['--sizes=char'], 0),
            gpu.Job('optim', 'optim', [], ['--device=cpu', '--sizes=char', '--rounds=1', '--round_ms=0'], 60)]
    monkeypatch.setattr(gpu, 'jobs', lambda baseline: jobs)
    path = tmp_path / 'gpu.json'
    found = gpu.run(settings_of(gpu, '--device=cpu', f'--json={path}'), 'gpu')
    assert "exit code 2: bench.py: --sizes=none: sizes takes" in found['jobs']['bad']['error']
    assert 'stopped after' in found['jobs']['slow']['error'] and 'result' in found['jobs']['optim']
    assert json.loads(path.read_text()) == found and found['summary']['muon_ms'] > 0
    assert 'stopped after' in gpu.text(found)


def test_without_time_nothing_is_started(monkeypatch):
    found = gpu.run(settings_of(gpu, '--device=cpu', '--minutes=0'), 'gpu')
    assert {job['error'] for job in found['jobs'].values()} == {'no time was left'} and list(found['summary']) == ['aims']


def test_muons_share_is_of_a_step_of_half_a_million_tokens():
    plain = {'part': 'step', 'tokens_per_s': 524_288.0}
    sizes = {'124M': {'ms': {'batched': 15.0}, 'speedup': {'torch': {'median': 4.0}}}}
    found = aims.summary({'train_gpt': {'result': plain}, 'optim': {'result': {'sizes': sizes}}})
    assert found['muon_share'] == pytest.approx(0.015) and found['muon_speedup'] == 4.0


@pytest.mark.slow
def test_every_job_of_the_gpu_suite_runs_at_a_tiny_size(measured):
    found = measured('gpu', '--device=cpu', '--minutes=30')
    assert {name: job['error'] for name, job in found['jobs'].items() if 'error' in job} == {}
    assert list(found['jobs']) == [job.name for job in gpu.jobs()]
    assert found['summary']['windows']['tokens_per_s'] > 0 and found['summary']['ladder']['Muon'] > 0
    judged = {row['aim']: row['met'] for row in found['summary']['aims']}
    assert judged['check: wrong gradients of compiled models'] and judged['two ranks: runs that fail or differ']


# ----------------------------------------------------------------------------------------------------
# compiled beside eager, ranks on one device, the parent's step

TINY_CHECK = [word for word in gpu.TINY_CHECK if word != '--device=cpu']


def test_a_compiler_that_is_right_passes_and_a_crooked_one_does_not():
    settings = settings_of(check, *TINY_CHECK)
    case = cases.cases(settings)['train_gpt']
    row = compiled.compare('train_gpt', case, settings, CPU)
    assert row['passed'] and row['wrong'] == 0 and row['gradients'] == 20 and row['same_bits'] and row['recompiled'] == 0

    def crooked(graph, inputs):
        return lambda *given: [1.5 * y for y in graph.forward(*given)]
    settings.backend = crooked
    row = compiled.compare('train_gpt', case, settings, CPU)
    assert not row['passed'] and row['wrong'] == 20 and row['worst'] == pytest.approx(0.5, abs=0.1)
    settings.backend = 'eager'


def test_a_gradient_is_wrong_beyond_its_limit_and_twice_its_rounding():
    expected = {'a': torch.ones(4), 'b': torch.ones(4), 'c': torch.ones(4), 'd': torch.ones(4)}
    found = {'a': torch.ones(4) * 1.1, 'b': torch.ones(4) * 1.3, 'c': torch.ones(4) * math.nan}
    far = compiled.distances(found, expected)
    assert far == {'a': pytest.approx(0.1), 'b': pytest.approx(0.3), 'c': math.inf, 'd': math.inf}
    judged = compiled.verdict(far, {'b': 0.16}, 0.2)
    assert judged['wrong_names'] == ['c', 'd'] and judged['gradients'] == 4 and judged['worst'] is None
    assert compiled.verdict({'a': 0.1, 'b': 0.3}, {'b': 0.14}, 0.2)['wrong_names'] == ['b']


def test_check_as_text_and_what_a_case_raises(run, monkeypatch, tmp_path):
    path, real = tmp_path / 'check.json', compiled.compare

    def compare(name, *given):
        if name == 'windows':
            raise RuntimeError('no kernel\nmore')
        return real(name, *given)
    monkeypatch.setattr(compiled, 'compare', compare)
    code, out, _ = run('check', '--only=kron,windows,getter', *gpu.TINY_CHECK, f'--json={path}')
    found = json.loads(path.read_text())
    assert code == 0 and [row['name'] for row in found['rows']] == ['kron', 'windows', 'getter']
    assert found['failed'][-1] == 'windows' and found['rows'][1]['error'] == 'RuntimeError: no kernel'
    assert 'windows: FAIL; RuntimeError: no kernel' in out and "getter: PASS; fp32 precision" in out


def test_ranks_that_fail_or_differ_are_named():
    good = {'name': 'together', 'val_loss': 2.0, 'from': 0, 'kept': 0}
    rows = [good, {**good, 'name': 'resumed', 'from': 2, 'kept': 2}, {**good, 'name': 'one', 'val_loss': 2.01}]
    assert ranks.failed(rows, 0.01) == []
    assert ranks.failed(rows, 0.001) == ['one'] and ranks.failed([*rows, {'name': 'x', 'error': 'y'}], 0.01) == ['x']
    assert ranks.failed([good, {**rows[1], 'kept': 0}], 0.01) == ['resumed']        # began anew
    assert ranks.failed([{**good, 'val_loss': math.nan}], 0.01) == ['together']


@pytest.mark.slow
def test_two_ranks_their_resumption_and_one_rank(measured):
    job = next(job for job in gpu.jobs() if job.name == 'two ranks')
    found = measured('ranks', *job.tiny)
    assert found['failed'] == [] and [row['kept'] for row in found['rows']] == [0, 2, 0]
    assert len({row['val_loss'] for row in found['rows'][:2]}) == 1


# stands for nanoGPT's model.py: its names, one matrix
THEIRS = '''
from dataclasses import dataclass
import torch
import torch.nn as nn
@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
    def forward(self, idx, targets=None):
        logits = self.lm_head(self.wte(idx))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
'''


def test_the_parents_step_beside_ours(run, tmp_path):
    (tmp_path / 'model.py').write_text(THEIRS)
    path = tmp_path / 'parent.json'
    code, out, err = run('parent', f'--baseline={tmp_path}', *SMALL, '--micro_steps=2', '--rounds=2', '--vocabulary=300',
                         f'--json={path}')
    found = json.loads(path.read_text())
    assert code == 0 and found['tokens'] == 2 * 2 * 16 and set(found['x']) == SPREAD and 'nanoGPT' in out, err
    assert found['x']['min'] <= found['x']['median'] <= found['x']['max'] and found['parent_tokens_per_s'] > 0


# ----------------------------------------------------------------------------------------------------
# the race

OURS = """n_layer = 2
n_head = 2
n_embd = 32
block_size = 32
batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 1e-2
warmup_iters = 2
max_iters = 40
lr_decay_iters = 40
eval_interval = 20
"""
# stands for nanoGPT: the same files and names, ASCII numbers for tokens, weights that are not trained
PARENT = {
    'model.py': '', 'configurator.py': '', 'config/train_shakespeare_char.py': '',
    'data/shakespeare_char/prepare.py': '''
import os
import requests
import numpy as np
here = os.path.dirname(__file__)
text = open(os.path.join(here, 'input.txt')).read()
chars, cut = sorted(set(text)), int(len(text) * 0.9)
for name, part in (('train', text[:cut]), ('val', text[cut:])):
    np.array([chars.index(c) for c in part], np.uint16).tofile(os.path.join(here, name + '.bin'))
''',
    'train.py': '''
import os, sys
import torch
flags = dict(a[2:].split('=', 1) for a in sys.argv[2:])
seed_offset = 0
torch.manual_seed(1337 + seed_offset)
V, C = len(set(open('data/shakespeare_char/input.txt').read())), int(flags['n_embd'])
state = {'transformer.wte.weight': torch.randn(V, C) / 50, 'transformer.wpe.weight': torch.zeros(64, C),
         'transformer.ln_f.weight': torch.ones(C)}
for i in range(4):
    shapes = {'attn.c_attn': (3 * C, C), 'attn.c_proj': (C, C), 'mlp.c_fc': (4 * C, C), 'mlp.c_proj': (C, 4 * C)}
    for name, shape in shapes.items():
        state[f'transformer.h.{i}.{name}.weight'] = torch.zeros(shape)
    for name in ('ln_1', 'ln_2'):
        state[f'transformer.h.{i}.{name}.weight'] = torch.ones(C)
state['lm_head.weight'] = torch.zeros(V, C)
args = dict(n_layer=4, n_head=4, n_embd=C, block_size=64, bias=False, vocab_size=V, dropout=0.0)
os.makedirs(flags['out_dir'])
torch.save({'model': state, 'model_args': args, 'iter_num': int(flags['max_iters'])}, flags['out_dir'] + '/ckpt.pt')
print('step 8: train loss 4.1, val loss 4.25')
'''}


@pytest.fixture
def clone(tmp_path):
    for name, text in PARENT.items():
        path = tmp_path / 'nano' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / 'ours.py').write_text(OURS)
    (tmp_path / 'text.txt').write_text('the cat sat on the mat and saw a dog; ' * 300)
    return tmp_path


def race_arguments(clone, *more):
    return ['recipe', f'--baseline={clone / "nano"}', f'--config={clone / "ours.py"}', f'--text={clone / "text.txt"}',
            '--baseline_iters=8', '--seeds=1', '--threads=1', f'--json={clone / "race.json"}', *more]


@pytest.mark.slow
def test_a_race_from_start_to_end_and_its_resumption(clone, run_program):
    before = sorted(os.listdir(clone / 'nano'))
    run_program('bench.py', *race_arguments(clone), timeout=1200)
    found = json.loads((clone / 'race.json').read_text())
    (row,) = found['rounds']
    theirs, ours = row['parent'], row['ours']
    assert theirs['tokens'] == 8 * 12 * 64 and theirs['estimate'] == 4.25 and theirs['own_seed'] and theirs['step'] == 8
    assert theirs['val_loss'] == pytest.approx(math.log(14), abs=1e-4)          # of a head that says nothing
    assert row['reached'] and ours['val_loss'] <= theirs['val_loss'] and ours['tokens'] in (20 * 256, 40 * 256)
    assert row['wall_ratio'] == pytest.approx(theirs['wall_s'] / ours['wall_s'])
    assert row['tokens_ratio'] == pytest.approx(theirs['tokens'] / ours['tokens'])
    assert row['full']['evaluations'] == 2 and row['full']['steps'] >= 10
    assert row['threads'] == 1 and found['summary']['1']['full_val_loss'] == row['full']['val_loss']
    assert sorted(os.listdir(clone / 'nano')) == before                         # the clone is left alone
    again = run_program('bench.py', *race_arguments(clone, '--resume=True'))
    assert 'nanoGPT, 8 steps' not in again.stderr and json.loads((clone / 'race.json').read_text()) == found
    other = run_program('bench.py', *race_arguments(clone, '--resume=True', '--threads=2'), code=2)
    assert 'is not of this race' in other.stderr


def test_seeds_reach_the_parent_and_its_failure_is_one_line(clone, monkeypatch):
    (clone / 'nano' / 'train.py').write_text(f'{recipe.SEED}\n')
    seen = []

    def run_or_stop(what, command, settings, **more):
        seen.append((clone / 'nano' / 'train_seeded.py').read_text())
        raise UserError(f'{what} failed')
    monkeypatch.setattr(recipe, 'run_or_stop', run_or_stop)
    with pytest.raises(UserError, match='nanoGPT failed'):
        recipe.train_parent(settings_of(recipe), clone / 'nano', 1339)
    assert seen == ['torch.manual_seed(1339 + seed_offset)\n']


def test_other_tokens_are_refused(clone):
    prepare = clone / 'nano' / 'data' / 'shakespeare_char' / 'prepare.py'
    prepare.write_text(prepare.read_text().replace('chars.index(c)', '(chars.index(c) + 1) % len(chars)'))
    (clone / 'scratch').mkdir()
    with pytest.raises(UserError, match='different tokens'):
        recipe.prepare(settings_of(recipe, *race_arguments(clone)[1:]), clone / 'scratch')


def test_the_whole_time_becomes_steps(monkeypatch):
    asked = []
    monkeypatch.setattr(recipe, 'train_ours', lambda *given, **changes: asked.append(changes) or {'wall_s': 99.0})
    ours = {'other_s': 15.0, 'step_s': 0.5, 'steps': 20}
    found = recipe.train_full(settings_of(recipe), None, 1337, 100.0, ours)
    assert asked[0]['max_iters'] == asked[0]['lr_decay_iters'] == 160 and asked[0]['target_val_loss'] == 0.0
    assert found['within'] and found['given_s'] == 100.0


@pytest.mark.parametrize('given, cores, asked', [(0, 2, [1, 0]), (0, 1, [0]), (2, 4, [2]), (1, 2, [1])])
def test_the_race_leaves_the_last_number_of_threads_to_either_side(given, cores, asked, monkeypatch):
    """0: no OMP_NUM_THREADS is set, so that the default of a user is measured."""
    seen = []
    monkeypatch.setattr(torch, 'get_num_threads', lambda: cores)
    monkeypatch.setattr(recipe, 'prepare', lambda settings, folder: folder)
    monkeypatch.setattr(recipe, 'race', lambda settings, *rest: seen.append(settings.threads) or {'seed': rest[-1]})
    monkeypatch.setattr(recipe.races, 'summaries', lambda rounds: [row['threads'] for row in rounds])
    found = recipe.run(settings_of(recipe, f'--threads={given}', '--seeds=1'), None)
    assert seen == asked and found['summary'] == ([given] if given else sorted({1, cores}))


def test_the_summary_is_medians():
    side = {'wall_s': 1.0, 'cpu_s': 1.0, 'tokens': 5, 'val_loss': 2.0}
    rounds = [{'wall_ratio': r, 'cpu_ratio': r, 'tokens_ratio': r, 'parent': side, 'ours': side, 'reached': r != 9}
              for r in (9, 2, 3)]
    found = races.summary(rounds)
    assert found['wall_ratio'] == 3 and found['reached'] is False and 'full_val_loss' not in found


def test_the_table_of_a_race_names_processor_and_threads():
    side = {'wall_s': 8.0, 'cpu_s': 8.0, 'tokens': 5, 'val_loss': 2.0}
    rounds = [{'threads': n, 'seed': 1337, 'wall_ratio': 8.0 / n, 'cpu_ratio': 8.0, 'tokens_ratio': 1.0, 'parent': side,
               'ours': side, 'reached': True} for n in (1, 2)]
    result = {'rounds': rounds, 'summary': races.summaries(rounds), 'machine': {'processor': 'A 1', 'torch': '2.13'}}
    text = recipe.text(result)
    assert text.startswith('A 1, torch 2.13\n')
    assert '1 threads: ours takes 1/8.0' in text and '2 threads: ours takes 1/4.0' in text
    assert races.processor()


# ----------------------------------------------------------------------------------------------------
# precision

def test_precision_times_every_kind_beside_fp32(run, tmp_path):
    path = tmp_path / 'p.json'
    code, out, err = run('precision', '--sizes=1x2x32, 1x1x16', '--batch_size=2', '--block_size=16', '--rounds=2',
                         '--round_s=0', '--device=cpu', f'--json={path}')
    assert code == 0, err
    result = json.loads(path.read_text())
    assert [model['size'] for model in result['models']] == ['1x2x32', '1x1x16']
    for model in result['models']:
        names = [row['name'] for row in model['rows']]
        assert names[0] == 'fp32' and 'TF32' not in names and 'fp16 weights' in names and len(set(names)) == 7
        assert model['rows'][0]['x'] == model['rows'][0]['x_min'] == 1.0
        assert all(row['x_min'] <= row['x'] <= row['x_max'] and row['ms'] > 0 for row in model['rows'])
    assert 'fp16 weights, fp32 masters' in out


def test_precision_trains_in_the_precision_it_names():
    import tempfile

    from bench import precisions
    from data.loader import open_dataset
    with tempfile.TemporaryDirectory() as folder:
        step.random_data(folder, 64, 16)
        dataset = open_dataset(folder, notice=lambda text: None)
        settings = settings_of(precisions, '--device=cpu')
        made = {name: precisions.make((1, 1, 16), 2, 16, settings, kind, dataset, CPU)
                for name, kind in precisions.KINDS.items() if name != 'TF32'}
    dtypes = {name: next(steps.model.parameters()).dtype for name, steps in made.items()}
    assert dtypes['fp16 weights'] == dtypes['fp16 weights, fp32 masters'] == torch.float16
    assert dtypes['bf16 autocast'] == torch.float32 and dtypes['bf16 weights'] == torch.bfloat16
    assert made['bf16 autocast'].job.dtype == torch.bfloat16 and made['fp16 autocast'].scaler.is_enabled()
    masters = [any('master' in entries for entries in made[name].optimizer.state.values())
               for name in ('fp16 weights, fp32 masters', 'fp16 weights')]
    assert masters == [True, False]
