"""Grids and studies that mean nothing, each refused in one line before anything is listed or trained."""
import time

import pytest

import ablate
import compress
from ablation import axes
from ablation import grid as grids
from variants import UserError

STUDY = dict(source='x', dataset='tiny', budgets={'half': 0.5}, variants={'a': {'linear': 'lowrank(4)'}}, select='val:0:64',
             test='val:64:128')


def read(tmp_path, **settings):
    path = tmp_path / 'x.py'
    path.write_text(''.join(f'{name} = {value!r}\n' for name, value in settings.items()))
    grid, _ = ablate.read([str(path)])
    axes.spread(grid)
    grids.check_size(grid, len(grid.variants))
    return grid


def read_study(tmp_path, **changes):
    path = tmp_path / 'x.py'
    path.write_text(''.join(f'{name} = {value!r}\n' for name, value in {**STUDY, **changes}.items()))
    return compress.chosen(compress.read([str(path)]))


@pytest.mark.parametrize('settings, words', [
    ({'variants': {'../../esc': {}}}, "variants: the name '../../esc' is with a character that no folder takes"),
    ({'variants': {5: {}}}, 'variants: the name 5 is a int'), ({'variants': {'': {}}}, "the name '' is empty"),
    ({'variants': {'a': {}}, 'tasks': {}}, 'tasks is empty'), ({'variants': {'a': {}}, 'tasks': {'..': {}}},
                                                               'a folder above'),
    ({'variants': {'a': {5: 1}}}, "variants: 'a': there is no setting 5"),
    ({'variants': {'a': {'n_layr': 1}}}, "did you mean 'n_layer'"),
    ({'variants': {'a': {'n_layer': 'x'}}}, 'n_layer takes a whole number'),
    ({'variants': {'a': {'linear': {'h.*': [1]}}}}, 'takes a text or a number'),
    ({'variants': {'a': {}}, 'search': {'data_dir': ['../x']}}, "the value 'data_dir=../x'"),
    ({'variants': {'a': {}}, 'search': {'linear': [{'h.*': 'dense'}]}}, 'takes plain values'),
    ({'variants': {'a': {}}, 'search': {'n_layer': [0]}}, 'n_layer must be at least 1'),
    ({'variants': {'a': {}}, 'search': {'seed': list(range(1025))}}, 'are 1025 runs; a grid has at most 1024'),
    ({'variants': {'a': {}}, 'search': {s: list(range(1, 101)) for s in ('seed', 'n_layer', 'max_iters')}}, '1000000 runs'),
    ({'axes': {f'a{i}': {'bias': True} for i in range(40)}}, '40 axes have 1099511627776 combinations'),
    ({'axes': {'a': {'bias': True}}, 'needs': {'a': [[]]}}, 'takes a list of names'),
    ({'axes': {'a': {'bias': True}}, 'exchange': {'a': {'dense': 5}}}, 'takes {spec: spec}'),
    ({'variants': {'a': {}}, 'record': '../x'}, 'record is the name of a folder'),
])
def test_grids_that_mean_nothing(tmp_path, settings, words):
    began = time.process_time()
    with pytest.raises(UserError) as error:
        read(tmp_path, base='x.py', **settings)
    assert words in str(error.value) and time.process_time() - began < 2


def test_grids_that_mean_something(tmp_path):
    """The negative controls: names, values and sizes just within the bounds."""
    grid = read(tmp_path, base='x.py', variants={'low rank 4': {'linear': {'h.*': 'lowrank({r})'}}}, ranks={'r': [1, 4]},
                tasks={'': {}}, search={'seed': list(range(1024))})
    assert len(grid.search['seed']) == 1024
    many = {f'a{i}': {'bias': True} for i in range(40)}
    part = {'few': {name: [i < 3] if i > 1 else [True, False] for i, name in enumerate(many)}}
    assert len(read(tmp_path, base='x.py', axes=many, grids=part, part='few').variants) == 4
    assert len(read(tmp_path, base='x.py', axes=dict(list(many.items())[:10])).variants) == 1024


@pytest.mark.parametrize('changes, words', [
    ({'variants': {'../esc': {}}}, 'with a character'), ({'variants': {'a': {'at': 5}}}, 'at takes {budget'),
    ({'variants': {'a': {'at': {'half': 5}}}}, 'at takes {budget'), ({'budgets': {'a/b': 0.5}}, 'with a character'),
    ({'heal': {5: 1}}, 'heal: there is no setting 5'), ({'heal': {'max_iters': -1}}, 'max_iters must be at least 0'),
    ({'variants': {'a': {'heal_settings': {'n_layr': 1}}}}, "did you mean 'n_layer'"),
    ({'variants': {'a': {5: 1}}}, 'there is no setting 5')])
def test_studies_that_mean_nothing(tmp_path, changes, words):
    with pytest.raises(UserError) as error:
        read_study(tmp_path, **changes)
    assert words in str(error.value)


def test_a_study_that_means_something(tmp_path):
    assert len(read_study(tmp_path, variants={'a b': {'at': {'half': {'decompose': 'als'}}}}, heal={'max_iters': 5})) == 2
