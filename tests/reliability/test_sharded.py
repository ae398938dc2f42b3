"""Checkpoints of shards, restarts by torchrun, and evaluation where ranks have different numbers of batches."""
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, distribute_tensor

import configurator
from checkpoints import checkpoint, sharded, torchfile
from decomposition import initialise
from tests.reliability.disks import Full, Hasty, Killed, in_child
from tests.reliability.ranks import CONTEXT, free_port, grouped, together, trained
from tests.reliability.test_parallel import distance
from tests.reliability.test_processes import catch_a_save, fingerprint, finish, wait_for
from tests.tiny import ROOT, arguments, make_data
from training import restart
from variants import UserError

FSDP = ['--parallel=fsdp', '--sharded_checkpoints=True']
MUON = ['--optimizer=muon', '--ema_decay=0.9', '--linear=h.*.mlp.*=kron(8,8); h.1.attn.c_v=lowrank(4)']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def run(data, out, *more, ranks=2, code=0):
    text = trained(ranks, out, *arguments(data, out, *more), code=code)
    return (text, checkpoint.load(out)) if code == 0 else (text, None)


@pytest.fixture(scope='module')
def saved(data, tmp_path_factory):
    """A run of two ranks with sharded checkpoints at steps 4 and 8, of 12, and the state after 12."""
    out = tmp_path_factory.mktemp('saved')
    _, state = run(data, out, *FSDP, *MUON, '--save_interval=4', '--eval_interval=12')
    return out, state


@pytest.fixture
def copy(saved, tmp_path):
    """The folder of `saved`, to be damaged."""
    return shutil.copytree(saved[0], tmp_path / 'copy')


def back_to(out, step):
    """Take the checkpoints after `step` away."""
    for path in out.glob('ckpt_*'):
        if int(path.name[5:13]) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# ----------------------------------------------------------------------------------------------------
# what a sharded checkpoint is

def test_shards_hold_the_bits_of_a_gathered_checkpoint(data, saved, tmp_path):
    _, gathered = run(data, tmp_path / 'g', '--parallel=fsdp', *MUON, '--save_interval=4', '--eval_interval=12')
    assert gathered.keys() == saved[1].keys()
    gathered['config'].update(sharded_checkpoints=True, out_dir=saved[1]['config']['out_dir'])
    assert fingerprint(tmp_path / 'g') == fingerprint(saved[0])
    for name, value in gathered.items():
        if name not in ('model', 'optimizer', 'average', 'seconds'):
            assert saved[1][name] == value
    assert all(saved[1]['average'][name].equal(t) for name, t in gathered['average'].items())


def test_every_rank_writes_its_part_and_the_manifest_covers_all(saved):
    out = saved[0]
    names = sorted(path.name for path in (out / 'ckpt_00000008').iterdir())
    assert [name[:11] for name in names] == ['shard-00001', 'shard-00002', 'state.pt'] and names[0].endswith('.safetensors')
    assert checkpoint.steps(out) == [4, 8, 12] and not list(out.glob('*.tmp'))
    sizes = [path.stat().st_size for path in (out / 'ckpt_00000008').iterdir()]
    assert json.loads((out / 'ckpt_00000008.json').read_text())['size'] == sum(sizes)
    _, tensors = sharded.split({'model': {}})
    stored = dcp.HuggingFaceStorageReader(out / 'ckpt_00000008').read_metadata().state_dict_metadata
    assert 'model/lm_head.weight' in stored or 'model/transformer.wte.weight' in stored
    assert not {'model/lm_head.weight', 'model/transformer.wte.weight'} <= stored.keys()         # tied: once
    assert tensors == {}


def test_other_programs_read_it(saved):
    config, state, info = initialise.read_folder(saved[0])
    model = initialise.build(config, config, state)
    averaged = saved[1]['average']['transformer.wte.weight']
    assert info['step'] == 12 and model.lm_head.weight.equal(averaged) and model.transformer.wte.weight.equal(averaged)


@pytest.mark.parametrize('ranks', [2, 1, 3])
def test_it_goes_on_with_any_number_of_ranks(data, saved, copy, ranks):
    back_to(copy, 8)
    more = ['--gradient_accumulation_steps=3', '--max_iters=9'] if ranks == 3 else []
    _, state = run(data, copy, '--init_from=resume', *FSDP, *MUON, *more, ranks=ranks)
    assert (copy / f'ckpt_{state["step"]:08d}').is_dir() == (ranks > 1)
    if ranks == 2:
        assert distance(saved[1], state) == 0 and fingerprint(copy)[0] == fingerprint(saved[0])[0]
    if ranks == 1:
        assert distance(saved[1], state) < 1e-6 and checkpoint.steps(copy) == [4, 8, 12]         # a file among folders


def test_sharded_needs_fsdp():
    with pytest.raises(UserError, match="needs parallel='fsdp', got 'ddp'"):
        configurator.load(['--sharded_checkpoints=True'])


# ----------------------------------------------------------------------------------------------------
# damage

def flip(folder):
    path = sorted(folder.iterdir())[1]
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


DAMAGE = {
    'a flipped bit': flip,
    'a cut shard': lambda folder: os.truncate(sorted(folder.iterdir())[0], 500),
    'a missing shard': lambda folder: sorted(folder.iterdir())[1].unlink(),
    'no state.pt': lambda folder: (folder / 'state.pt').unlink(),
    'a file more': lambda folder: (folder / 'more.safetensors').write_bytes(b''),
    'shards swapped': lambda folder: swap(*sorted(folder.glob('shard*'))),
    'an empty folder': lambda folder: [path.unlink() for path in folder.iterdir()],
    'a folder in it': lambda folder: (folder / 'x').mkdir(),
}


def swap(a, b):
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_folder_costs_one_line_and_the_older_one_is_taken(copy, capsys, damage):
    DAMAGE[damage](copy / 'ckpt_00000012')
    assert checkpoint.load(copy)['step'] == 8 and checkpoint.newest(copy).name == 'ckpt_00000008'
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'taking the next older' in err
    shutil.rmtree(copy / 'ckpt_00000008')
    (copy / 'ckpt_00000004.json').unlink()
    with pytest.raises(UserError, match='no usable checkpoint'):
        checkpoint.load(copy)


def vouch(folder):
    """A manifest for whatever lies in the folder, as an attacker would write it."""
    from checkpoints import manifest
    sha256, size = manifest.measure(folder)
    folder.with_suffix('.json').write_text(json.dumps({'sha256': sha256, 'size': size, 'step': 12, 'schema': 1}))


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_folder_is_run_and_dcps_own_index_would_be(copy, tmp_path):
    """Why DCP's usual files are not used, and that ours are not open to it, even with a manifest that fits."""
    import pickle
    folder = copy / 'ckpt_00000012'
    (folder / '.metadata').write_bytes(pickle.dumps(Canary(str(tmp_path / 'ran'))))
    vouch(folder)
    assert checkpoint.load(copy)['step'] == 12 and not (tmp_path / 'ran').exists()
    with pytest.raises(Exception, match='NoneType'):
        dcp.FileSystemReader(folder).read_metadata()
    assert (tmp_path / 'ran').exists()


@pytest.mark.parametrize('hole', ['a missing shard', 'no list', 'a wrong place', 'text for a shard'])
def test_folders_that_lie_are_refused_whatever_their_manifest_says(copy, capsys, hole):
    folder = copy / 'ckpt_00000012'
    state = torchfile.load(folder / 'state.pt')
    if hole == 'a missing shard':
        sorted(folder.iterdir())[1].unlink()
    elif hole == 'text for a shard':
        sorted(folder.iterdir())[1].write_text('no shard')
    else:
        state['sharded'] = None if hole == 'no list' else [[['model', 'x'], 'nowhere', [1]]]
        (folder / 'state.pt').write_bytes(torchfile.dumps(state))
    vouch(folder)
    assert checkpoint.load(copy)['step'] == 8
    assert capsys.readouterr().err.count('\n') == 1


# ----------------------------------------------------------------------------------------------------
# saves that are stopped, in one process that is a group of its own

def parts(step, flavour=0):
    mesh = dist.device_mesh.init_device_mesh('cpu', (1,))
    draw = torch.Generator().manual_seed(step + 1000 * flavour)
    weight = distribute_tensor(torch.randn(6, 4, generator=draw), mesh, [Shard(0)])
    return {'step': step, 'model': {'a': weight, 'tied': weight}, 'flavour': flavour}


def alone():
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    dist.init_process_group('gloo', rank=0, world_size=1)


def save(folder, step, flavour, ops):
    alone()
    checkpoint.save(folder, parts(step, flavour), 2, ops, group=dist.group.WORLD)


def save_all(folder, *steps):
    alone()
    for step in steps:
        checkpoint.save(folder, parts(step), 3, Hasty(), group=dist.group.WORLD)


@pytest.mark.slow
@pytest.mark.parametrize('case', ['next', 'again', 'after a file'])
def test_a_save_of_a_folder_killed_after_any_operation_leaves_the_old_or_the_new(tmp_path, count, case):
    first = tmp_path / 'first'
    assert in_child(save_all, first, 1, 2, 3) == 0
    if case == 'after a file':
        shutil.rmtree(first / 'ckpt_00000003')
        checkpoint.save(first, {'step': 3, 'model': {'a': torch.ones(2)}, 'flavour': 0}, ops=Hasty())
    step, k, seen = 4 if case == 'next' else 3, 0, set()
    while True:
        k, folder = k + 1, shutil.copytree(first, tmp_path / str(k + 1))
        with count():
            status = in_child(save, folder, step, 1, Killed(k))
            state = checkpoint.load(folder)
            assert (state['step'], state['flavour']) in ((3, 0), (step, 1))
            seen.add((state['step'], state['flavour']))
            if status == 0 or k % 5 == 0:                   # and the next save works
                assert in_child(save, folder, 5, 1, Hasty()) == 0 and checkpoint.load(folder)['step'] == 5
                assert not [p for p in folder.iterdir() if p.suffix == '.tmp']
        if status == 0:
            break
    assert k > 6 and len(seen) == 2


def fill(folder, ops):
    alone()
    try:
        checkpoint.save(folder, parts(9), 2, ops, group=dist.group.WORLD)
    except OSError as error:
        assert 'the checkpoints before it are intact' in str(error)
        os._exit(7)


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_leaves_no_half_folder(tmp_path):
    assert in_child(save_all, tmp_path, 1) == 0
    for k in range(1, 30):
        status = in_child(fill, tmp_path, Full(k))
        if status == 0:
            break
        assert os.waitstatus_to_exitcode(status) == 7
        step = checkpoint.load(tmp_path)['step']
        assert not list(tmp_path.glob('*.tmp'))
        if step == 9:                                       # all was there, but the last sync failed
            break
        assert step == 1
    assert k > 8


def disagree(group):
    def action():
        if dist.get_rank() == 1:
            raise OSError(28, 'No space left on device')
    try:
        sharded.together(group, action)
    except OSError as error:
        print('told', error.errno, error)


def test_an_error_of_one_rank_is_raised_on_all(tmp_path):
    for code, text in together(2, tmp_path, grouped, disagree):
        assert code == 0 and 'told 28' in text and '(rank 1)' in text


def test_kinds_share_a_folder_and_its_rules(tmp_path):
    assert in_child(save_all, tmp_path, 1, 2, 3, 4) == 0
    assert checkpoint.steps(tmp_path) == [2, 3, 4]
    checkpoint.set_best(tmp_path, 2, 1.0)
    for step in (5, 6):
        checkpoint.save(tmp_path, {'step': step, 'model': {'a': torch.ones(2)}}, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 5, 6] and checkpoint.load(tmp_path, 'best')['step'] == 2
    checkpoint.set_aside(tmp_path)
    assert checkpoint.steps(tmp_path) == [] and checkpoint.steps(tmp_path / 'previous') == [2, 5, 6]


# ----------------------------------------------------------------------------------------------------
# torchrun restarts

LONG = ['--max_iters=30', '--lr_decay_iters=30', '--eval_interval=15', '--save_interval=5']


def torchrun(data, out, *more):
    words = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--max-restarts=1', '--standalone',
             'train.py', *arguments(data, out, *LONG, *more)]
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}
    return subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_a_worker(process):
    workers = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)


@pytest.mark.parametrize('more, moment', [
    ([], '"step": 12, "loss"'),
    pytest.param(FSDP, '.tmp', marks=pytest.mark.slow),
    pytest.param([], '"step": 1, "loss"', marks=pytest.mark.slow),
], ids=['mid-run', 'in a sharded save', 'before any checkpoint'])
def test_a_killed_worker_is_restarted_and_the_run_ends_in_the_same_bits(data, tmp_path, more, moment):
    run(data, tmp_path / 'whole', *LONG, *more)
    old = tmp_path / 'killed' / 'ckpt_00000099.json'            # what lies there from before must not be taken
    checkpoint.save(old.parent, {'step': 99, 'model': {}}, ops=Hasty())
    process = torchrun(data, tmp_path / 'killed', *more)
    if moment == '.tmp':                                        # not the first, before which there is nothing to go on from
        wait_for(tmp_path / 'killed' / 'log.jsonl', '"step": 6, "loss"', process, 120)
        catch_a_save(tmp_path / 'killed', 120)
    else:
        wait_for(tmp_path / 'killed' / 'log.jsonl', moment, process, 120)
    kill_a_worker(process)
    done = finish(process)
    assert done.returncode == 0, done.stderr[-3000:]
    assert fingerprint(tmp_path / 'whole') == fingerprint(tmp_path / 'killed')
    assert ('resuming from step' in done.stdout) == ('"step": 1,' not in moment)
    assert checkpoint.steps(tmp_path / 'killed' / 'previous') == [99]


def meet(rank, count, port, delay, fixed):
    """A rank as torchrun's agent starts it after `count` restarts; it meets the other, and dies without a goodbye."""
    import time

    from training import parallel
    os.environ.update(TORCHELASTIC_RESTART_COUNT=str(count), TORCHELASTIC_USE_AGENT_STORE='True', RANK=str(rank),
                      LOCAL_WORLD_SIZE='2' if fixed else '1', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    if rank:
        time.sleep(delay)
    job = parallel.start(configurator.load(['--device=cpu', '--dist_timeout=20']))
    os._exit(0 if job.agree(rank) == 1 else 3)


@pytest.mark.slow
@pytest.mark.parametrize('fixed', [True, False], ids=['keys of its own', 'control'])
def test_a_restarted_rank_does_not_dial_the_dead(fixed):
    """torchrun's store holds the addresses of the first ranks; the second rank comes late and has not replaced its own."""
    store = dist.TCPStore('127.0.0.1', 0, None, True, wait_for_workers=False)
    for count, delay, codes in ((0, 0, [0, 0]), (1, 4, [0, 0] if fixed else [1, 1])):
        ranks = [CONTEXT.Process(target=meet, args=(rank, count, store.port, delay, fixed)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(120)
            rank.kill()
        assert [rank.exitcode for rank in ranks] == codes or not fixed and any(rank.exitcode for rank in ranks)


class Job:
    """One rank."""
    main, rank, world_size = True, 0, 1

    def agree(self, value, op=None):
        return value

    def say(self, text):
        pass


@pytest.mark.parametrize('restarts, mark, resumes', [
    ('0', 'this', False), ('1', 'this', True), ('1', 'another', False), ('1', None, False), (None, 'this', False)])
def test_only_a_restart_of_this_launch_goes_on(tmp_path, monkeypatch, restarts, mark, resumes):
    config = configurator.load([f'--out_dir={tmp_path}'])
    checkpoint.save(tmp_path, {'step': 7, 'model': {}}, ops=Hasty())
    for name, value in {'TORCHELASTIC_RESTART_COUNT': restarts, 'TORCHELASTIC_RUN_ID': restarts and 'this',
                        'LOCAL_WORLD_SIZE': '1', 'WORLD_SIZE': '2'}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    if mark:
        (tmp_path / '.launch').write_text(f'{mark} ')
    assert (restart.state(config, Job()) is not None) == resumes
    restart.set_aside(config)
    assert checkpoint.steps(tmp_path) == ([7] if resumes else [])
    assert checkpoint.steps(tmp_path / 'previous') == ([] if resumes else [7])


# ----------------------------------------------------------------------------------------------------
# evaluation, and what FSDP refuses

def test_ranks_with_fewer_batches_do_not_hang_an_evaluation(data, tmp_path):
    """596 characters of validation in windows of 256: two whole ones and a rest, for two and three ranks."""
    more = ['--block_size=256', '--batch_size=1', '--eval_iters=0', '--max_iters=0', '--gradient_accumulation_steps=6']
    losses = []
    for ranks in (1, 2, 3):
        run(data, tmp_path / str(ranks), *more, '--parallel=fsdp', ranks=ranks)
        losses.append(json.loads((tmp_path / str(ranks) / 'log.jsonl').read_text().splitlines()[0]))
    for other in losses[1:]:
        assert abs(other['val_loss'] - losses[0]['val_loss']) < 1e-6
        assert abs(other['train_loss'] - losses[0]['train_loss']) < 1e-6


def test_half_precision_weights_are_refused_in_one_sentence(data, tmp_path):
    text, _ = run(data, tmp_path, '--parallel=fsdp', '--weights=bfloat16', code=2)
    assert text.count('\n') == 1 and "weights='bfloat16' does not go with parallel='fsdp'" in text


@pytest.mark.slow
@pytest.mark.parametrize('more', [
    ['--ngpt=full', '--linear=dense'], ['--ngpt=simple', '--linear=h.*.mlp.*=kron(8,8); h.1.attn.c_v=lowrank(4)'],
    ['--tie_weights=False', '--grad_clip=0'], ['--grad_clip=0.05', '--attention=dint'], ['--orthograd=True']])
def test_fsdp_is_the_optimisation_of_one_rank_for_other_models(data, tmp_path, more):
    _, one = run(data, tmp_path / 'one', *more, ranks=1)
    _, two = run(data, tmp_path / 'two', *more, '--parallel=fsdp')
    assert distance(one, two) < 1e-5


@pytest.mark.slow
def test_fsdp_with_a_loss_scaler(data, tmp_path):
    _, one = run(data, tmp_path / 'one', '--dtype=float16', ranks=1)
    _, two = run(data, tmp_path / 'two', '--dtype=float16', '--parallel=fsdp')
    assert distance(one, two) < 1e-3 and one['scaler'] == two['scaler']


@pytest.mark.slow
def test_a_model_that_grows_under_fsdp_is_that_of_one_rank_and_resumes_in_the_same_bits(data, tmp_path):
    grow = ['--grow_from=1', '--grow_every=4', '--n_layer=3', '--save_interval=3', '--eval_interval=12']
    _, one = run(data, tmp_path / 'one', *grow, ranks=1)
    _, two = run(data, tmp_path / 'two', *grow, *FSDP)
    assert distance(one, two) < 1e-6
    whole = fingerprint(tmp_path / 'two')
    back_to(tmp_path / 'two', 6)                                # between the two growths
    run(data, tmp_path / 'two', *grow, *FSDP, '--init_from=resume')
    assert fingerprint(tmp_path / 'two')[0] == whole[0]


@pytest.mark.slow
def test_compile_under_fsdp_is_the_same_optimisation(data, tmp_path):
    _, one = run(data, tmp_path / 'one', '--dropout=0', ranks=1)             # compiled dropout draws other masks
    _, two = run(data, tmp_path / 'two', '--dropout=0', '--parallel=fsdp', '--compile=True')
    assert distance(one, two) < 1e-4
