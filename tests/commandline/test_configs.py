"""config/README.md is what the docstrings say."""
import subprocess
import sys

import pytest

from commandline import configs
from tests.tiny import ROOT
from variants import UserError


def test_config_readme_is_what_the_command_prints():
    done = subprocess.run([sys.executable, 'configurator.py', 'configs'], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == (ROOT / 'config/README.md').read_text(encoding='utf-8'), (
        'python configurator.py configs > config/README.md')


def test_every_config_is_listed_with_all_four():
    rows = [line for line in configs.text().splitlines() if line.startswith('| [')]
    files = list((ROOT / 'config').rglob('*.py'))
    assert len(rows) == len(files) and {path.parent.name for path in files} == {'config', *filter(None, configs.FOLDERS)}
    for path in files:
        (row,) = [line for line in rows if f']({path.relative_to(ROOT / "config").as_posix()})' in line]
        assert all(cell.strip() for cell in row.strip('|').split(' | ')) and row.count(' | ') == 4


DOC = '"""For a test.\n\nMore words: none.\n\nLaunch: bash run.sh x\nHardware: 2 cores,\n  or 3\nTime: one | two\n' \
      'Result: 1.5 (records/2026-01-01_x)\nand more\n\nTime enough.\n"""\nn_layer = 2\n'


def test_a_field_goes_on_to_the_next_one_or_a_blank_line(tmp_path):
    assert configs.described(DOC, 'x.py') == {
        'purpose': 'For a test.', 'Launch': 'bash run.sh x', 'Hardware': '2 cores, or 3', 'Time': 'one | two',
        'Result': '1.5 (records/2026-01-01_x) and more'}
    (tmp_path / 'x.py').write_text(DOC)
    row = '| [x.py](x.py) | For a test. | 2 cores, or 3 | one \\| two | 1.5 ([record](../records/2026-01-01_x)) and more |'
    assert row in configs.text(tmp_path)


@pytest.mark.parametrize('old, new, words', [('Time: one', 'Tme: one', 'no line `Time: ...`'), ('Launch: ', '', 'Launch'),
                                             (DOC.partition('n_layer')[0], '', 'no docstring')])
def test_what_is_missing_is_named_with_its_file(old, new, words):
    with pytest.raises(UserError) as error:
        configs.described(DOC.replace(old, new), 'config/x.py')
    assert words in str(error.value) and str(error.value).startswith('config/x.py: ')
