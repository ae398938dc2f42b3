"""What is too large is refused at once and in one line; the negative controls are what is just within each bound."""
import time

import pytest

import configurator
from commandline import bounds
from configurator import load
from optimizers import schedules
from variants import UserError, parse_spec, saving_size

DOUBLED = ''.join(f'_a = _a + _a  # {i}\n' for i in range(40))
TEN = ', '.join(['_a'] * 10)


def written(tmp_path, text):
    path = tmp_path / 'x.py'
    path.write_text(text, encoding='utf-8')
    return str(path)


def refusal(arguments):
    began = time.process_time()
    with pytest.raises(UserError) as error:
        load(arguments)
    assert time.process_time() - began < 2 and len(str(error.value)) <= bounds.MESSAGE and str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize('text, words', [
    ('_a = 1000000**64\n' + '_a = _a*_a\n' * 24, 'bits'),
    ('_a = 2**64\n_a = _a*_a*_a*_a*_a\nn_layer = 2', 'bits'),
    ('n_layer = ' + '9' * 4000, 'bits'), ('n_layer = ' + '9' * 5000, 'digits'),
    (f'_a = "{"x" * 1000}"\n{DOUBLED}', 'characters'),
    (f'_a = "{"x" * 30000}"\nout_dir = str([_a, _a, _a])', 'characters'),
    ('_a = [1, 1]\n' + f'_a = [{TEN}]\n' * 12, 'elements'), ('_a = {0: 1}\n' + '_a = {0: _a, 1: _a}\n' * 40, 'elements'),
    ('_a = [1]\n' + '_a = [_a]\n' * 1000, 'deep'),
    ('_a = [' + '1, ' * 4000 + ']\n' + '_b = [_a]\n' * 1000, 'more than 200000 elements'),
    ('n_layer = 2\n' * 10_000, 'parts of Python syntax'),
    ('#' + 'x' * (1 << 20) + '\nn_layer = banana', 'too long for a config file'),
    ('#' + 'x' * (1 << 20), 'too long for a config file'),
])
def test_bombs_in_config_files(tmp_path, text, words):
    assert words in refusal([written(tmp_path, text)])


def test_what_is_within_the_bounds_is_read(tmp_path):
    """The negative control of each bound."""
    text = (f'"""{"x" * 200_000}"""\n_a = 2**64\n_a = _a * _a * _a * (_a // 2)\n_t = "{"x" * 1000}"\n'
            + '_t = _t + _t\n' * 6 + f'_l = [{TEN}]\n'.replace('_a', '1') + '_l = [_l, _l]\n' * 9
            + '_d = 1\n' + '_d = [_d]\n' * 20 + 'n_layer = 3\n' * 3000 + 'out_dir = _t\n')
    config = load([written(tmp_path, text)])
    assert config.n_layer == 3 and len(config.out_dir) == 64_000


@pytest.mark.parametrize('value, words', [
    (1 << 256, 'bits'), ('x' * 65_537, 'characters'), ([0] * 10_000, 'elements'), ([[0] * 100] * 101, 'elements')])
def test_each_bound_of_a_value(value, words):
    assert words in bounds.fault(value)
    within = value >> 1 if isinstance(value, int) else value[:-2]
    assert not bounds.fault(within)


def test_a_pipe_is_no_config_file(tmp_path):
    import os
    os.mkfifo(tmp_path / 'x.py')                        # opening it waits for a writer
    assert 'a pipe' in refusal([str(tmp_path / 'x.py')])


@pytest.mark.parametrize('argument, words', [
    ('--n_layer=1000000000', 'n_layer must be at most 2000'), ('--n_embd=1000000000000', 'n_embd must be at most'),
    ('--n_layer=' + '9' * 400, 'bits'), ('--learning_rate=' + '9' * 400, 'bits'),
    ('--n_layer=' + '9' * 5000, 'whole number'),
    ('--learning_rate=1e400', 'must be finite'), ('--max_iters=' + '9' * 17, 'max_iters must be at most 1e+15'),
    ('--muon_steps=13', 'muon_steps must be at most 12, got 13'), ('--linear={[]:1}', 'is not a dict'),
    ('--linear={1, 2}', 'takes a dict of rules'), ('--linear=' + 'dense+' * 5000 + 'dense', 'too long for a spec'),
    ('--linear=lowrank(' + '9' * 300 + ')', 'its numbers are at most'),
    ('--linear=lowrank(1e300)', 'its numbers are at most'),
    ('--device=cpu:x', 'device must be'), ('--device=auto:3', 'device must be'), ('--device=cuda:', 'device must be'),
    ('--attention=h.12=window(4)', "attention: the pattern 'h.12' wins at no block"),
    ('--mlp=h.*=gelu; h.3=swiglu', "mlp: the pattern 'h.3' wins at no block"),
    ('--block_schedule={0: 1, 0.5: 0.3}', 'which do not divide block_size'), ('--batch_schedule=0=' + '9' * 400, 'takes'),
    ('--out_dir=a\0b', 'a zero byte'), ('--out_dir=a\ud800', 'half a character'), ('--n_layer=\x1b[31m\n', 'whole number'),
    ('--' + 'x' * 5000 + '=3', 'there is no setting')])
def test_plain_values_are_refused_in_one_line(argument, words):
    assert words in refusal([argument])


@pytest.mark.parametrize('argument', [
    '--n_layer=2000', '--muon_steps=3', '--device=cuda:3', '--device=mps', '--attention=h.11=window(4)',
    '--mlp=h.3=swiglu; h.*=gelu', '--block_schedule={0: 1, 0.5: 0.25}', '--out_dir=ä b', '--max_iters=999999999999999'])
def test_what_means_something_is_taken(argument):
    load([argument])


def test_a_model_from_elsewhere_has_its_own_blocks():
    """n_layer is the source's, so patterns are only checked once it is known."""
    assert load(['--init_from=gpt2-xl', '--attention=h.30=window(4)']).n_layer == 12


def test_a_schedule_is_checked_whole():
    config = configurator.Config(block_schedule={0: 1, 0.5: 0.3})
    with pytest.raises(UserError, match='do not divide'):
        schedules.check(config)
    assert schedules.block_size(0, config) == 1024      # the first step alone would not tell


def test_sizes_are_found_by_arithmetic():
    from lowrank.linear import LowRankLinear

    class Counted(LowRankLinear):
        calls = 0

        @classmethod
        def weight_numel(cls, *args, **kwargs):
            cls.calls += 1
            return super().weight_numel(*args, **kwargs)

    found = saving_size(Counted, 768, 3072, {'rank': 1_000_000_000}, 768 * 3072)
    assert found == 'rank=614 is the largest that saves some'           # 614 * 3840 < 768 * 3072 < 615 * 3840
    assert Counted.calls < 40
    assert saving_size(Counted, 768, 3072, {'rank': 9}, 1) == ''


@pytest.mark.parametrize('text', ['sum(3) + dense', 'sum(3)', 'sum([])', 'sum([1]) + sum(2)'])
def test_a_sum_of_no_specs_is_a_text_still(text):
    assert 'sum' in str(parse_spec(text))


def test_messages_are_short_and_printable():
    said = str(UserError('a\x1b[31mb\nc\ud800' + 'x' * 1000 + 'remedy'))
    assert said.startswith('a\\x1b[31mb c\\ud800x') and said.endswith('remedy') and len(said) == bounds.MESSAGE - 1
    assert str(UserError('ä' * 400)) == 'ä' * 400


@pytest.mark.parametrize('name, words', [
    ('../../esc', 'character'), ('a/b', 'character'), ('a\\b', 'character'), ('..', 'above'), ('.', 'above'), ('', 'empty'),
    ('a\nb', 'character'), ('x' * 101, 'longer'), (5, 'int'), (None, 'NoneType')])
def test_names_of_folders(name, words):
    assert words in bounds.name_fault(name)


def test_names_that_are_folders():
    assert not any(bounds.name_fault(name) for name in ('dense', 'narrow 96', 'a+b', 'kron(8, 8)', 'x' * 100, '..a', 'ä'))
