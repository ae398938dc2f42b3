"""--help: every program names itself, every setting stands once, sections, at most 100 columns."""
import re
from dataclasses import dataclass

import pytest

import configurator
from bench import modules
from commandline import help
from configurator import Config, key
from variants import UserError

TITLES = ['model', 'data', 'optimizer', 'schedule', 'precision', 'memory and ranks', 'evaluation and logging', 'growth',
          'drop-in', 'decomposition', 'distillation', 'safety']


def shown(capsys, *arguments, cls=Config):
    with pytest.raises(SystemExit) as leave:
        configurator.load(arguments, cls, 'python x.py')
    assert leave.value.code == 0
    return capsys.readouterr().out


def names(text):
    return re.findall(r'^  --(\w+)=', text, re.M)


def test_all_settings_stand_once_in_sections_in_100_columns(capsys):
    text = shown(capsys, '--help')
    assert names(text) == list(configurator.settings(Config))           # the dataclass has the order of --help
    assert re.findall(r'^([a-z- ]+): [A-Z]', text, re.M) == TITLES == list(configurator.SECTIONS)
    assert max(map(len, text.splitlines())) <= help.WIDTH and text.startswith('usage: python x.py\n')
    rows = [line for line in text.splitlines() if line.startswith(' ')]
    assert sum(line.startswith('  --') for line in rows) > 0.8 * len(rows)         # most settings take one line


def test_every_setting_belongs_to_one_section():
    found = [name for _, keys in configurator.sections(Config).values() for name in keys]
    assert sorted(found) == sorted(configurator.settings(Config)) and len(found) == len(set(found))


@pytest.mark.parametrize('wanted, title', [('growth', 'growth'), ('drop_in', 'drop-in'), ('Ranks', 'memory and ranks'),
                                           ('logging', 'evaluation and logging'), ('memory and ranks', 'memory and ranks')])
def test_one_section(wanted, title, capsys):
    text = shown(capsys, f'--help={wanted}')
    assert names(text) == configurator.sections(Config)[title][1]
    assert f'\n\n{title}: ' in text and text.startswith('usage: python x.py\n')


@pytest.mark.parametrize('wanted', ['grwth', '', 'and', 'n_layer'])
def test_a_section_that_is_not_there(wanted):
    with pytest.raises(UserError) as error:
        configurator.load([f'--help={wanted}'])
    assert f'{wanted!r}; sections are {", ".join(TITLES)}' in str(error.value)


@dataclass
class Small:
    """Settings without sections, one of them too long for a line."""
    short: int = key(3, 'a number')
    rules: dict = key({}, ' '.join(['word'] * 40))
    a_long_name_with_a_long_default: str = key('as long as it may be', 'at the end')


def test_settings_without_sections_are_wrapped_in_their_column(capsys):
    text = shown(capsys, '--help', cls=Small)
    assert text == ('usage: python x.py\n\n  --short=3   a number\n' + f'  --rules={{}}  {" ".join(["word"] * 17)}\n'
                    + f'              {" ".join(["word"] * 17)}\n              {" ".join(["word"] * 6)}\n'
                    + "  --a_long_name_with_a_long_default='as long as it may be'\n              at the end\n")
    with pytest.raises(UserError, match='no sections'):
        configurator.load(['--help=growth'], Small)


def test_settings_of_ones_own_stand_before_the_models_with_defaults_of_ones_own(capsys):
    text = shown(capsys, '--help', cls=modules.Settings)
    assert text.index('--batch_size=4 ') < text.index('\nmodel: ') < text.index('--n_embd=384 ')
    assert sorted(names(text)) == sorted(configurator.settings(modules.Settings))


@pytest.mark.parametrize('words', [
    'train.py', 'sample.py', 'evaluate.py', 'export.py', 'compare.py', 'compare.py recovery', 'ablate.py',
    'ablate.py report x', 'compress.py', 'compress.py report x', 'bench.py attention', 'bench.py step', 'configurator.py'])
def test_every_program_names_itself(words, run_program):
    done = run_program(*words.split(), '--help', env={'PYTHONPATH': None})
    assert done.stdout.startswith(f'usage: python {words.removesuffix(" x")}') and done.stderr == ''
    assert 'PROGRAM' not in done.stdout and max(map(len, done.stdout.splitlines())) <= help.WIDTH


def test_a_wrong_section_ends_with_2(run_program):
    done = run_program('train.py', '--help=grwth', code=2)
    assert done.stdout == '' and done.stderr.startswith("train.py: there is no section 'grwth'; sections are model, data, ")
    assert done.stderr.count('\n') == 1
