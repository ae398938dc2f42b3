"""Secrets in command lines, diffs and records: masked, while plain code and numbers stay readable."""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reporting import hardware, masking, records

ROOT = Path(__file__).parents[2]
LONG = 'Zq7' * 8                        # shapes are put together here, so that no scanner takes this file for a leak
SHAPES = ['hf' + f'_{LONG}', 'sk' + f'-proj-{LONG}', 'ghp' + f'_{LONG}', 'AKIA' + 'Q7' * 8, 'glpat' + f'-{LONG}']
LINES = [
    '+API_KEY = "{}"', "+    api_key='{}',", "-    wandb.login(key='{}')", "+os.environ['HF_TOKEN'] = '{}'",
    "+os.environ.setdefault('WANDB_API_KEY', '{}')", '+  "password": "{}",', '+export HF_TOKEN={}', '+WANDB_API_KEY={}',
    '+  api_key: {}', '+    secret: str = f"{}"', '+DB_PASSWORD = ("{}")', "+url = 'https://me:{}@example.org/x'",
    "+get('https://example.org/?api_key={}&a=1')", "+headers = 'Authorization: Bearer {}'", '+clientSecret = "{}"',
    '+hub_token = """{}"""']
PLAIN = [
    '+vocab tokens', '--calibration_tokens=32768', "+    device: str = key('auto', 'a password or a secret')",
    "+    key = 'n_layer'", '+pad_token = "<|pad|>"', '+    token = tokens[position]',
    "+sorted(rows, key=lambda r: r['loss'])",
    '+token: int = 50257', '+key=0.001', '+    api_key=os.environ["API_KEY"])', '+password = getpass()',
    '+    api_key: str,',
    '+def login(password, token=None):', '+    key = transformer.h.0.attn.c_q', '+monkey = "banana123456"',
    "+if token == 'a1b2c3d4':",
    '+tokens = "a1b2c3d4e5"', '+flops_per_token": 1851392', '+EOT_TOKEN = 50256', "+open('password_file', 'r')",
    '+HF_TOKEN=$HF_TOKEN', '+head -2 https://example.org:8080/a@b', '+key: c_attn',
    "+    return {'key': 'h.0.mlp.c_fc.weight'}"]


@pytest.mark.parametrize('line', LINES)
@pytest.mark.parametrize('value', ['hunter2x', '9f8e7d6c5b4a39f8e7d6', *SHAPES])
def test_a_secret_in_a_line_of_the_diff_is_masked(line, value):
    shown = masking.text(f'+before\n{line.format(value)}\n+after')
    assert value not in shown and masking.MASK in shown and masking.text(shown) == shown
    assert shown.startswith('+before\n') and shown.endswith('\n+after')


@pytest.mark.parametrize('line', ['+MY_TOKEN = "{}"', '+MY_TOKEN={}', "+password = '{}'", "+hf_token='{}'",
                                  '+SIGNING_KEY: "{}"'])
def test_a_plain_word_is_a_secret_where_the_name_says_so(line):
    assert 'correcthorse' not in masking.text(line.format('correcthorse'))


@pytest.mark.parametrize('line', PLAIN)
def test_plain_code_and_numbers_are_no_secrets(line):
    assert masking.text(line) == line and masking.command([line]) == [line]


def test_our_own_source_stays_readable():
    """Every line of the repository, as a diff that adds it: key('...') calls, tokens, passwords in docs; not this file."""
    listed = subprocess.run(['git', 'ls-files', '*.py', '*.md', '*.sh', '*.toml'], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split()
    assert not names or len(names) > 100
    for name in names:
        if name != 'tests/reporting/test_masking.py':
            lines = (ROOT / name).read_text(encoding='utf-8', errors='replace').splitlines()
            added = ''.join(f'+{line}\n' for line in lines)
            assert masking.text(added) == added, name


def test_a_private_key_is_masked_whole_and_cut():
    key = '+-----BEGIN RSA PRIVATE' + ' KEY-----\n+MIIabc\n+defghi\n'
    whole = masking.text(f'{key}+-----END RSA PRIVATE' + ' KEY-----\n+code()\n')
    assert 'MII' not in whole and 'defghi' not in whole and '+code()' in whole
    assert 'MII' not in masking.text(key) and 'defghi' not in masking.text(key)


@pytest.mark.parametrize('given, shown', [
    (['--wandb_api_key=hunter2'], ['--wandb_api_key=***']), (['WANDB_API_KEY=hunter2'], ['WANDB_API_KEY=***']),
    (['--password=1234'], ['--password=***']), (['--api-key', 'word', 'x'], ['--api-key', '***', 'x']),
    (['--token=hello'], ['--token=***']), (['--token=50256'], ['--token=50256']), (['--key', '3'], ['--key', '3']),
    (['--data_dir=s3://me:word@host/x'], ['--data_dir=s3://me:***@host/x']), ([f'--x={SHAPES[0]}'], ['--x=***']),
    (['--calibration_tokens=32768', '--l=*.c_fc=lowrank(4)'], ['--calibration_tokens=32768', '--l=*.c_fc=lowrank(4)']),
    (['--password_file=/run/x', '--out_dir=out/key=1'], ['--password_file=/run/x', '--out_dir=out/key=1'])])
def test_words_of_a_command(given, shown):
    assert masking.command(given) == shown == masking.command(shown)
    assert masking.line(' '.join(given)) == ' '.join(shown) or "'" in masking.line(' '.join(given))


def test_env_json_is_written_without_secrets(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['/x/train.py', '--wandb_api_key=hunter2', '--seed=1'])
    monkeypatch.setattr(hardware, 'git', lambda *words: f'+API_KEY = "{LONG}"\n+n_layer = 4' if 'diff' in words else 'abc')
    env = hardware.environment(torch.device('cpu'))
    assert env['command'][1:] == ['train.py', '--wandb_api_key=***', '--seed=1']
    assert env['diff'] == '+API_KEY = "***"\n+n_layer = 4'


def test_a_record_of_an_older_run_is_masked_and_listed(tmp_path):
    """env.json of an earlier version holds them; every file of the record is said."""
    env = {'command': ['python', 'train.py', '--wandb_api_key=hunter2'], 'diff': f'+API_KEY = "{LONG}"\n+n = 4', 'cpus': 2}
    run = {'folder': 'out/x', 'config': {'seed': 1, 'data_dir': 's3://me:hunter2@host'}, 'env': env,
           'lines': [{'step': 0, 'val_loss': 1.0, 'tokens': 5}]}
    records.write_record(tmp_path, 'title', 'note', [run], text='a table')
    records.write_record(tmp_path, 'title', 'note', [run], text='a table',
                         lines=['python ablate.py --hf_token=hunter2 "a b"'])
    for name in os.listdir(tmp_path):
        content = (tmp_path / name).read_text()
        assert 'hunter2' not in content and LONG not in content, name
    assert json.loads((tmp_path / 'env.json').read_text())['out/x']['diff'] == '+API_KEY = "***"\n+n = 4'
    assert "    python ablate.py '--hf_token=***' 'a b'" in (tmp_path / 'README.md').read_text()
    said = records.listing(tmp_path)
    assert all(f'  {name}, ' in said for name in ('README.md', 'config.json', 'env.json', 'log.jsonl'))
    assert 'uncommitted changes of the code, secrets masked: 2' in said and env['command'][-1] == '--wandb_api_key=hunter2'


def test_a_command_line_is_one_that_a_shell_reads():
    words = ['python', 'compress.py', '--only=dense,hidden 128*,a: b', '--wandb_key=abcdef0123456789abcdef']
    shown, = records.commands([{'env': {'command': words}}])
    assert shlex.split(shown)[:3] == words[:3] and 'abcdef' not in shown
    assert masking.shell(['python', 'train.py', '--seed=1']) == 'python train.py --seed=1'
