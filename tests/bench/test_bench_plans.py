"""bench.py plans: the list, what it refuses, that its result is whole, and its verdicts. No clock is asserted."""
import ast
import json

import pytest

import configurator
from bench import plans, verdicts
from tests.tiny import ROOT
from variants import UserError


def settings_of(*arguments):
    return configurator.load(arguments, plans.Settings)


def test_the_list_holds_every_shape_both_ways_and_each_divides():
    found = plans.matrices()
    assert len(found) == len(set(found)) == 2 * (sum(map(len, plans.KRONY.values())) + len(plans.SMALL))
    assert all(out % m == 0 and inputs % n == 0 for _, out, inputs, m, n, _ in found)
    assert ('81M', 3072, 768, 768, 768, 1) in found and ('92M-4', 768, 3072, 256, 1024, 4) in found
    assert all((name, b, a, n, m, terms) in found for name, a, b, m, n, terms in found)


@pytest.mark.parametrize('argument, word', [('--only=82M', "got '82M'"), ('--tokens=1,two', "'1,16,512'")])
def test_a_mistake_is_one_line(argument, word):
    with pytest.raises(UserError, match=word):
        plans.check(settings_of(argument), 'plans')


def test_no_torch_at_the_top():
    for name in ('plans', 'verdicts'):
        tree = ast.parse((ROOT / 'bench' / f'{name}.py').read_text())
        assert 'torch' not in ' '.join(ast.unparse(n) for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)))


def test_a_result_is_whole(monkeypatch):
    monkeypatch.setattr(plans, 'matrices', lambda: [('tiny', 8, 6, 4, 3, 1), ('tiny', 6, 8, 3, 4, 1)])
    result = plans.run(settings_of('--tokens=1,16,512', '--cell_s=0', '--device=cpu'), 'plans')
    assert [(c['phase'], c['tokens']) for c in result['cells'][:4]] == [('forward', 1), ('forward', 16), ('forward', 512),
                                                                        ('training', 512)]
    for c in result['cells']:
        assert {'dense', c['chosen']} <= set(c['ms']) and all(ms > 0 for ms in c['ms'].values())
        assert plans.text(result).count(c['matrix']) >= 4
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def cell(phase, tokens, flops, **ms):
    return {'name': 'x', 'matrix': '3072x768 by 768x768x1', 'phase': phase, 'tokens': tokens, 'flops': flops, 'chosen': 'a',
            'ms': ms}


@pytest.mark.parametrize('found, clause, met', [
    (cell('forward', 16, 0.5, a=10.0, b=8.9, dense=20.0), 'best plan', False),
    (cell('forward', 16, 0.5, a=10.0, b=9.1, dense=20.0), 'best plan', True),
    (cell('forward', 16, 0.5, a=10.0, dense=8.9), 'FLOPs below', False),
    (cell('forward', 16, 0.5, a=1.0, dense=0.89), 'FLOPs below', None),              # dense takes too little to bind
    (cell('training', 512, 1.3, a=10.0, dense=7.4), 'FLOPs above', False),
    (cell('training', 512, 1.3, a=10.0, dense=7.6), 'FLOPs above', True),
    (cell('forward', 512, 0.25, a=10.0, dense=24.0), '768x768x1, forward at 512', False),
    (cell('training', 512, 0.25, a=10.0, dense=23.0), '768x768x1, training at 512', True)])
def test_a_verdict(found, clause, met):
    verdict = [c['met'] for c in verdicts.clauses([found]) if clause in c['clause']]
    assert verdict == ([] if met is None else [met])
