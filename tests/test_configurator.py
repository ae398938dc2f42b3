"""The configuration: nanoGPT's files, mistakes in one line, no torch, nothing executed."""
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import configurator
from configurator import Config, load
from variants import UserError

ROOT = Path(__file__).resolve().parent.parent

# every setting of nanoGPT's train.py (commit 3adf61e) with its default, where ours is the same
NANOGPT = dict(
    out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False, always_save_checkpoint=True,
    init_from='scratch', wandb_log=False, dataset='openwebtext',
    gradient_accumulation_steps=40, batch_size=12, block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0,
    bias=False, learning_rate=6e-4, max_iters=600000, weight_decay=1e-1, beta1=0.9, beta2=0.95, grad_clip=1.0,
    decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5, backend='nccl')


def test_defaults_are_nanogpts():
    config = configurator.as_dict(Config())
    assert {name: config[name] for name in NANOGPT} == NANOGPT
    assert {'device', 'dtype', 'compile'} <= set(config)        # fitted to the hardware instead
    assert (config['wandb_project'], config['wandb_run_name']) == ('nanokron', '')      # nanoGPT's: 'owt', 'gpt2'


def write(tmp_path, text):
    path = tmp_path / 'x.py'
    path.write_text(text)
    return str(path)


def test_reads_python_syntax(tmp_path):
    config = load([write(tmp_path, '"""Doc."""\nimport time\n_half = 3\nn_layer = 2 * _half\nwandb_run_name = "a-" + '
                         'str(time.time())\nlearning_rate = 1\nlinear = {"h.*": "lowrank(4)"}\ngrad_clip = -1 + 2.0\n')])
    assert (config.n_layer, config.learning_rate, config.grad_clip) == (6, 1.0, 1.0)
    assert isinstance(config.learning_rate, float)
    assert config.wandb_run_name.startswith('a-1') and config.linear == {'h.*': 'lowrank(4)'}
    assert config.sources['n_layer'].endswith('x.py:4')


def test_command_line_wins_and_splits_at_the_first_equals(tmp_path):
    config = load([write(tmp_path, 'n_layer = 2\n'), '--n_layer=3', '--out_dir=a=b', '--bias=True', '--compile=None',
                   '--linear=h.*.mlp.*=kron(8,8,terms=4); h.*.attn.c_v=lowrank(64)', '--attention=causal'])
    assert (config.n_layer, config.out_dir, config.bias, config.compile) == (3, 'a=b', True, None)
    assert config.linear == {'h.*.mlp.*': 'kron(8,8,terms=4)', 'h.*.attn.c_v': 'lowrank(64)'}
    assert load(['--out_dir=12']).out_dir == '12'               # a text setting takes any text


CONFIGS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / 'config').rglob('*.py')
                 if not {'ablation', 'compression'} & set(p.parts))             # which are other programs'


@pytest.mark.parametrize('path', CONFIGS)
def test_our_configs_are_read_and_say_how_to_launch_them(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    load([path])
    assert any(word in (ROOT / path).read_text() for word in ('Launch: bash run.sh', 'Launch: torchrun'))


# nanoGPT's config files, by the statements that matter to a reader (its own texts are not copied here)
NANOGPT_FILES = {
    'train_gpt2': "wandb_log = True\nwandb_run_name='gpt2-124M'\nbatch_size = 12\ngradient_accumulation_steps = 5 * 8\n"
                  'max_iters = 600000\nlr_decay_iters = 600000\neval_interval = 1000\nlog_interval = 10\n'
                  'weight_decay = 1e-1\n',
    'train_shakespeare_char': "out_dir = 'out-shakespeare-char'\neval_interval = 250\nalways_save_checkpoint = False\n"
                              'n_layer = 6\nn_head = 6\nn_embd = 384\ndropout = 0.2\nlearning_rate = 1e-3\n'
                              'max_iters = 5000\nlr_decay_iters = 5000\nmin_lr = 1e-4\nbeta2 = 0.99\nwarmup_iters = 100\n',
    'finetune_shakespeare': "import time\nwandb_run_name = 'ft-' + str(time.time())\ninit_from = 'gpt2-xl' # comment\n"
                            'batch_size = 1\ngradient_accumulation_steps = 32\nmax_iters = 20\nlearning_rate = 3e-5\n'
                            'decay_lr = False\n',
    'eval_gpt2': "batch_size = 8\neval_iters = 500 # comment\neval_only = True\nwandb_log = False\ninit_from = 'gpt2'\n",
}


@pytest.mark.parametrize('name', NANOGPT_FILES)
def test_nanogpt_configs_work(name, tmp_path):
    load([write(tmp_path, NANOGPT_FILES[name])])


def test_nanogpt_clone_configs_work_unchanged():
    """With NANOKRON_NANOGPT=FOLDER of a clone, every one of its own files."""
    clone = os.environ.get('NANOKRON_NANOGPT')
    if not clone:
        pytest.skip('NANOKRON_NANOGPT names no clone of nanoGPT')
    for path in Path(clone, 'config').glob('*.py'):
        load([str(path)])


BAD_FILES = [                                                   # (text, line, words of the one line)
    ('n_layr = 3', 1, "'n_layr', did you mean 'n_layer'"),
    ('\nn_head = 5', 2, 'n_head must divide n_embd (768), got 5'),
    ("bias = 'False'", 1, "bias takes True or False without quotes, got 'False'"),
    ('bias = 0', 1, 'bias takes True or False, got 0'),
    ('n_layer = 0', 1, 'n_layer must be at least 1, got 0'),
    ('batch_size = -4', 1, 'batch_size must be at least 1'),
    ('n_layer = 2.5', 1, 'n_layer takes a whole number, got 2.5'),
    ('n_layer = None', 1, 'n_layer takes a whole number'),
    ('dropout = 1.0', 1, 'dropout must be below 1'),
    ('learning_rate = 1e999', 1, 'learning_rate must be finite'),
    ('learning_rate = "1e-3"', 1, 'learning_rate takes a number without quotes'),
    ('lr_decay_iters = 10\nwarmup_iters = 20', 2, 'warmup_iters must not exceed lr_decay_iters (10), got 20'),
    ('min_lr = 1.0', 1, 'min_lr must not exceed learning_rate'),
    ('beta2 = 1', 1, 'beta2 must be below 1'),
    ('dtype = "fp16"', 1, "dtype must be one of auto, float32, bfloat16, float16, got 'fp16'"),
    ('device = "gpu"', 1, "device must be 'auto'"),
    ('keep_checkpoints = 1', 1, 'keep_checkpoints must be at least 2'),
    ('n_layer = ', 1, 'not Python syntax'),
    ('n_layer == 3', 1, 'is not read'),
    ('n_layer, n_head = 2, 2', 1, 'is not read'),
    ('import os', 1, 'is not read'),
    ('from os import system', 1, 'is not read'),
    ('n_layer = __import__("os").system("true")', 1, 'is not read in a config file, which is never run'),
    ('n_layer = open("/dev/null")', 1, 'is not read in a config file'),
    ('for i in range(3):\n    n_layer = i', 1, 'is not read'),
    ('n_layer = 1 / 0', 1, 'division by zero'),
    ('n_layer = 10 ** 10 ** 10', 1, 'too large'),
    ('out_dir = "a" * 1000000000', 1, 'arithmetic takes two numbers'),
    ('n_layer = n_head', 1, "'n_head' is not read"),
    ('linear = {"h.*": "kron(8"}', 1, 'is not a spec'),
    ('linear = {"h.*": "krom(8, 8)"}', 1, "'krom' is not one of dense, kron, kron_pivot, lowrank, pivot, abba, "
     "did you mean 'kron'?"),
    ('linear = {"h.*": 3}', 1, 'linear takes texts only'),
    ('linear = 3', 1, 'linear takes a dict of rules or a text'),
    ('attention = "casual"', 1, "did you mean 'causal'"),
    ('mlp = "gelu(open(1))"', 1, 'is not a spec'),
    ('out_dir = ""', 1, 'out_dir must not be empty'),
]


@pytest.mark.parametrize('text, line, words', BAD_FILES)
def test_a_mistake_in_a_file_is_one_line_with_file_line_and_key(tmp_path, text, line, words):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        load([path])
    assert f'{path}:{line}: ' in str(error.value) and words in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('argument, words', [
    ('--n_layr=3', "did you mean 'n_layer'"), ('--n_layer', 'write --n_layer=VALUE'), ('--n_head=5', 'must divide'),
    ('--bias=false', "takes True or False without quotes, got 'false'"), ('--n_layer=two', 'takes a whole number'),
    ('-n_layer=3', 'write --n_layer=VALUE'), ('--linear=h.*=', 'is not a rule'), ('--linear=h.*=krn(3)', "'krn'"),
    ('config/nothing_there.py', 'there is no such config file')])
def test_a_mistake_on_the_command_line(argument, words):
    with pytest.raises(UserError) as error:
        load([argument])
    assert words in str(error.value) and argument[:20] in str(error.value)


def test_a_mistake_leaves_with_2_before_torch_is_imported(tmp_path):
    path = write(tmp_path, 'n_head = 5')
    code = ('import runpy, sys; sys.argv = ["train.py", sys.argv[1]]\n'
            'try:\n    runpy.run_path("train.py", run_name="__main__")\n'
            'except SystemExit as error:\n    print(error.code, "torch" in sys.modules, "numpy" in sys.modules)\n')
    done = subprocess.run([sys.executable, '-c', code, path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ['2', 'False', 'False']
    assert done.stderr == f'train.py: {path}:1: n_head must divide n_embd (768), got 5\n'


def test_only_rank_0_says_it(tmp_path):
    done = subprocess.run([sys.executable, 'train.py', '--n_head=5'], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'RANK': '1', 'WORLD_SIZE': '2'})
    assert (done.returncode, done.stderr) == (2, '')


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as leave:
        load(['--help'])
    text = capsys.readouterr().out
    assert leave.value.code == 0
    assert all(f'--{name}=' in text for name in configurator.settings(Config))


@pytest.mark.parametrize('seed', range(4))
def test_random_bytes_and_mutated_files_never_escape(tmp_path, count, seed):
    """Any file either loads or raises UserError in one line."""
    rng, good = random.Random(seed), (ROOT / 'config/train_shakespeare_char.py').read_bytes()
    for case in range(250):
        text = bytearray(good)
        if case % 2:
            for _ in range(rng.randrange(1, 8)):
                text[rng.randrange(len(text))] = rng.randrange(256)
        else:
            text = bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
        path = tmp_path / 'm.py'
        path.write_bytes(text)
        with count():
            try:
                load([str(path)])
            except UserError as error:
                assert '\n' not in str(error) and 'm.py' in str(error)


def test_deep_nesting_and_huge_files_are_refused(tmp_path):
    for text in ('n_layer = ' + '(' * 5000 + '1' + ')' * 5000, 'n_layer = ' + '-' * 50000 + '1',
                 'linear = ' + '{"a": ' * 3000 + '1' + '}' * 3000):
        with pytest.raises(UserError):
            load([write(tmp_path, text)])
