"""The site language: parsing, matching, and refusals that say what would work."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import variants
from model import GPT, GPTConfig
from variants import Spec, UserError, idle_rules, match, parse_rules, parse_spec

SMALL = dict(block_size=16, vocab_size=65, n_layer=2, n_head=4, n_embd=64)


def test_parse_spec():
    assert parse_spec('dense') == Spec('dense')
    assert parse_spec(' kron( 8,8 ,terms=4) ') == Spec('kron', (8, 8), {'terms': 4})
    assert str(parse_spec('kron(8,8,terms=4)')) == 'kron(8, 8, terms=4)'
    assert parse_spec("gelu(approximate='tanh')").kwargs == {'approximate': 'tanh'}


@pytest.mark.parametrize('text', ['', 'kron(', 'a.b(1)', 'kron(x)', 'kron(*[1])', 'kron(**{})', '1', 'a b', 'kron()()',
                                  'lambda: 1', '(' * 300, 'kron(' + '[' * 300])
def test_what_is_no_spec_is_refused(text):
    with pytest.raises(UserError, match='is not a spec'):
        parse_spec(text)


def test_parse_rules():
    assert parse_rules('h.*.mlp.*=kron(8,8,terms=4); h.1.*=dense') == {'h.*.mlp.*': 'kron(8,8,terms=4)', 'h.1.*': 'dense'}
    assert parse_rules('kron(8,8,terms=4)') == {'*': 'kron(8,8,terms=4)'}
    assert parse_rules(" {'h.*.mlp.*': 'kron(8, 8)', 'h.1.*': 'dense'}") == {'h.*.mlp.*': 'kron(8, 8)', 'h.1.*': 'dense'}
    for text in ('a=', '=dense', 'a=dense; a=dense', ';', "{'a': kron(8)}"):
        with pytest.raises(UserError):
            parse_rules(text)


def test_first_match_wins_and_star_crosses_dots():
    rules = {'h.0.*': 'dense', 'h.*.mlp.*': 'lowrank(4)', 'h.[0-1].attn.c_v': 'lowrank(2)'}
    assert match(rules, 'h.0.mlp.c_fc', '?') == ('h.0.*', 'dense')
    assert match(rules, 'h.11.mlp.c_fc', '?') == ('h.*.mlp.*', 'lowrank(4)')
    assert match(rules, 'h.1.attn.c_q', '?') == (None, '?')
    assert idle_rules(rules, ['h.0.attn.c_v', 'h.2.mlp.c_fc']) == ['h.[0-1].attn.c_v']


def test_rules_reach_the_sites_of_the_model():
    model = GPT(GPTConfig(**SMALL, linear={'h.0.*': 'dense', '*.c_v': 'lowrank(4)', '*.mlp.*': 'kron(8, 8)'}))
    specs = {site: module.spec for site, module in model.sites().items()}
    assert len(specs) == 12
    assert {specs[s] for s in specs if s.startswith('h.0')} == {'dense'}
    assert (specs['h.1.attn.c_v'], specs['h.1.mlp.c_proj'], specs['h.1.attn.c_q']) == ('lowrank(4)', 'kron(8, 8)', 'dense')
    assert 'transformer.h.1.mlp.c_fc.A' in model.state_dict()


@pytest.mark.parametrize('linear, words', [
    ({'h.9.*': 'dense'}, "the pattern 'h.9.*' wins at no site"),
    ({'h.*': 'dense', 'h.0.*': 'lowrank(2)'}, "'h.0.*' wins at no site"),
    ({'*.mlp.*': 'kron(7, 8)'}, 'the nearest that do are 8 x 8'),
    ({'*.c_v': 'lowrank(32)'}, 'saves nothing: 4,096 parameters where dense has 4,096; rank=31 is the largest that saves'),
    ({'*.c_fc': 'kron(8, 8, terms=60)'}, 'terms=51 is the largest'),
    ({'*.c_fc': 'kron(1, 1)'}, 'choose other factor sizes'),
    ({'*.c_v': 'lowrank(1000000000)'}, 'rank=31 is the largest'),
    ({'*.c_v': 'lowrank(0)'}, 'rank=0'),
    ({'*.c_v': 'lowrank()'}, 'it takes lowrank(rank)'),
    ({'*.c_v': 'lowrank(4, 5)'}, 'it takes lowrank(rank)'),
    ({'*.c_v': 'lowrank(True)'}, 'rank=True'),
    ({'*.c_v': 'lowrank("4")'}, "rank='4'"),
    ({'*.c_v': 'dense(3)'}, 'it takes dense()')])
def test_a_spec_that_does_not_fit_is_refused_in_one_sentence(linear, words):
    with torch.device('meta'), pytest.raises(UserError) as error:
        GPT(GPTConfig(**SMALL, linear=linear))
    assert words in str(error.value) and '\n' not in str(error.value) and error.value.key == 'linear'


@pytest.mark.parametrize('key, table', [('attention', variants.ATTENTIONS), ('mlp', variants.MLPS)])
def test_attention_and_mlp_specs_are_refused_likewise(key, table):
    for spec, words in ((f'{next(iter(table))}(nothing=1)', 'it takes'), ('nothing', 'is not one of')):
        with torch.device('meta'), pytest.raises(UserError, match=words):
            GPT(GPTConfig(**SMALL, **{key: spec}))


def test_tables_yield_classes_and_import_when_used():
    code = ("import sys, variants; print('kron' in variants.LINEARS, 'torch' in sys.modules, "
            "variants.LINEARS['kron'].__name__, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, '-c', code], cwd=Path(variants.__file__).parent, capture_output=True, text=True)
    assert done.stdout.split() == ['True', 'False', 'KroneckerLinear', 'True'], done.stderr
