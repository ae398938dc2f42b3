"""Pictures, by what must hold of any: colours apart in grey, names that cover no point, axes that begin where it matters."""
import itertools
import json
import random

import pytest

import configurator
from ablation import plots
from ablation.grid import Grid
from compression.study import Study
from reporting import labels, losses, palette
from tests.test_setup import ROOT


def test_colours_stay_apart_in_grey():
    light = [palette.lightness(colour) for colour in palette.COLOURS]
    assert [palette.lightness(c) for c in ('#ffffff', '#777777')] == pytest.approx([100, 50], abs=0.6)
    assert max(light) < 75                              # readable on white
    assert min(abs(a - b) for a, b in itertools.combinations(light[:3], 2)) > 20
    assert min(abs(a - b) for a, b in zip(light, light[1:])) > 6.5
    looks = [tuple(palette.style(i).values()) for i in range(7)]
    assert all(len({look[part] for look in looks}) == 7 for part in range(3))


@pytest.mark.parametrize('matrix', [
    ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),        # deuteranopia (Machado et al. 2009)
    ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),       # protanopia
])
def test_the_colour_blind_tell_the_first_four_apart(matrix):
    def seen(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return [sum(m * c for m, c in zip(row, linear)) for row in matrix]
    for one, two in itertools.combinations(palette.COLOURS[:4], 2):
        assert sum((a - b) ** 2 for a, b in zip(seen(one), seen(two))) ** 0.5 > 0.15


def test_every_program_with_pictures_has_the_same_setting():
    fields = [configurator.settings(cls)['figures'] for cls in (configurator.Config, Grid, Study)]
    assert {field.default for field in fields} == {'png'}
    assert {tuple(field.metadata['choices']) for field in fields} == {palette.KINDS}


def test_a_picture_becomes_the_files_that_are_asked_for(tmp_path):
    picture = palette.figure(3, 2)
    picture.subplots().plot([1, 2], [3, 4], **palette.style(1))
    assert palette.save(picture, str(tmp_path / 'a.png'), 'png,pdf,svg') == 'a.png'
    assert (tmp_path / 'a.png').read_bytes()[:4] == b'\x89PNG' and (tmp_path / 'a.pdf').read_bytes()[:4] == b'%PDF'
    assert '<text' in (tmp_path / 'a.svg').read_text()
    palette.save(picture, str(tmp_path / 'b.png'))
    assert sorted(path.name for path in tmp_path.glob('b.*')) == ['b.png']


# ----------------------------------------------------------------------------------------------------
# names beside points

def rows_of(count, seed=0):
    rng, rows = random.Random(seed), []
    for i in range(count):
        name = ('dense', 'narrow', 'narrow 75%', 'narrow 50%')[i] if i < 4 else f'variant {i} with abba'
        losses = {seed: 2 + 0.03 * (i % 7) + rng.gauss(0, 0.01) for seed in (1, 2, 3)}
        rows.append({'variant': name, 'parameters': rng.choice([1, 2, 3]) * 100_000 + rng.randrange(20_000),
                     'loss': sum(losses.values()) / 3, 'losses': losses})
    return rows


@pytest.mark.parametrize('count', [6, 30, pytest.param(78, marks=pytest.mark.slow)])
def test_controls_and_the_front_have_names_that_cover_no_point(count):
    rows = rows_of(count)
    figure = plots.front(rows, 'parameters', 'title')
    axes = figure.axes[0]
    figure.draw_without_rendering()
    texts = {text.get_text() for text in axes.texts}
    best = [rows[i]['variant'] for i in plots.pareto([(row['parameters'], row['loss']) for row in rows])]
    assert {*best, *(row['variant'] for row in rows[:4])} <= texts <= {row['variant'] for row in rows}
    assert count > 6 or len(texts) == count             # none is crowded
    places = [axes.transData.transform((row['parameters'], row['loss'])) for row in rows]
    for words in map(text_box, axes.texts):
        assert not any(words[0] < x < words[2] and words[1] < y < words[3] for x, y in places)
        assert labels.inside(words, axes.get_window_extent().extents)
    for one, two in itertools.combinations(axes.texts, 2):
        assert not labels.overlap(text_box(one), text_box(two))


def text_box(text):
    """The box of an annotation's words alone, without its line."""
    from matplotlib.text import Text
    return Text.get_window_extent(text).extents


def test_a_crowded_point_has_no_name():
    places = [(100 + i % 8, 2 + 1e-3 * (i // 8)) for i in range(80)] + [(200, 3), (300, 4)]
    rows = [{'variant': f'v{i}', 'parameters': x, 'loss': y, 'losses': {1: y}} for i, (x, y) in enumerate(places)]
    named = {text.get_text() for text in plots.front(rows, 'parameters', 'x').axes[0].texts}
    assert {'v80', 'v81'} <= named and len(named) < 30


# ----------------------------------------------------------------------------------------------------
# effects, ranks

def test_a_cut_interval_is_marked_and_says_where_it_ends():
    found = [{'axes': ('a', 'b'), 'mean': -0.01, 'over_pairs': 0.005, 'over_seeds': 0.3},
             {'axes': ('a', 'c'), 'mean': 0.02, 'over_pairs': 0.004, 'over_seeds': 0.005}]
    figure = plots.effect_plot(found, 'x')
    axes = figure.axes[0]
    marks = [line for line in axes.lines if line.get_marker() in ('<', '>') and len(line.get_xdata())]
    assert [line.get_marker() for line in marks] == ['<', '>']
    assert [abs(line.get_xdata()[0]) for line in marks] == [axes.get_xlim()[1]] * 2
    assert {text.get_text() for text in axes.texts} == {'to -0.31', 'to +0.29'}
    assert 'the interval goes on' in [text.get_text() for text in figure.legends[0].get_texts()]
    found[0]['over_seeds'] = 0.006
    figure = plots.effect_plot(found, 'x')
    assert not figure.axes[0].texts
    assert 'the interval goes on' not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_legend_of_a_rank_search_covers_no_axes():
    grid = Grid(ranks={'v': [1, 64], 'mlp': [1, 64]})
    run = {'evals': [{'val_loss': 2.0}], 'config': {}}
    found = {('', name): {(('v', v), ('mlp', 2 * v)): [{**run, 'evals': [{'val_loss': 2 + 0.01 * v}]}] for v in (1, 4, 16)}
             for name in ('low rank', 'abba')}
    found['', 'dense'] = {(): [run]}
    figure = plots.trial_plot(grid, found, [], '')
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['low rank', 'abba']
    assert all(not axes.get_legend() and not labels.overlap(legend.extents, axes.get_window_extent().extents)
               for axes in figure.axes)


# ----------------------------------------------------------------------------------------------------
# loss.png

def a_run(steps=400, spike=None):
    lines = [{'step': s, 'loss': 1.5 + 2.7 * 0.97 ** s + (9 if s == spike else 0)} for s in range(steps)]
    return lines + [{'step': s, 'train_loss': 1.4 + 2.7 * 0.97 ** s, 'val_loss': 1.6 + 2.7 * 0.97 ** s}
                    for s in range(0, steps + 1, 100)]


@pytest.mark.parametrize('spike', [None, 200])
def test_the_first_steps_and_a_spike_do_not_flatten_the_rest(spike, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(palette, 'save', lambda picture, path, figures, dpi: kept.append(picture))
    losses.draw(str(tmp_path / 'kron'), a_run(spike=spike))
    axes = kept[0].axes[0]
    low, high = axes.get_ylim()
    assert low < 1.4 and 1.6 + 2.7 * 0.97 ** 100 < high < 2.6           # ln(vocab_size) is 4.2
    assert axes.get_xlabel() == 'training step' and axes.get_title() == 'kron'
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "loss of the step's own batch", 'train loss', 'val loss']
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}
    assert len(looks) == 3 and axes.texts[0].get_text() == 'from 4.20'


def test_short_and_odd_runs_are_shown_whole():
    assert losses.limits(a_run()[:5], []) is None and losses.limits([], []) is None
    assert losses.limits([{'step': s, 'loss': float('nan')} for s in range(50)], []) is None


def test_a_record_s_log_is_drawn(tmp_path):
    path = ROOT / 'records' / '2026-11-21_kron_mlp' / 'log.jsonl'
    lines = [line for line in map(json.loads, path.read_text().splitlines()) if line['run'] == 'out/kron_mlp_1']
    losses.draw(str(tmp_path), lines, 'png,pdf')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['loss.pdf', 'loss.png']
