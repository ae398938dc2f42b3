"""Two models on one text: the difference, its standard error against numpy, and what is refused."""
import json
import math

import numpy as np
import pytest
import torch

from data import prepare_text
from evaluation import pairs, windows
from tests.test_evaluate import META, drawn, make, random_model, refusal, run, save, source_of  # noqa: F401

CPU = torch.device('cpu')


def scores(model, tokens, window=16):
    return windows.score(model, source_of(tokens), window, window, 3, CPU, torch.float32, by_window=True)


def test_equal_windows_are_numpy_s_paired_standard_error():
    ours, theirs = (scores(random_model(seed), drawn(16 * 30 + 1)) for seed in (0, 1))
    found = pairs.difference(ours, theirs)
    gaps = (np.array(ours['window_nats']) - np.array(theirs['window_nats'])) / 16
    assert len(gaps) == found['windows'] == 30
    assert found['difference'] == pytest.approx(gaps.mean(), rel=1e-12)
    assert found['standard_error'] == pytest.approx(gaps.std(ddof=1) / math.sqrt(30), rel=1e-12)
    assert found['high'] - found['difference'] == pytest.approx(1.959964 * found['standard_error'])
    assert found['difference'] == pytest.approx((ours['nats'] - theirs['nats']) / 480, rel=1e-6)


def test_unequal_windows_are_a_ratio():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 20, 200)
    a, b = rng.normal(2, 1, 200) * counts, rng.normal(1.9, 1, 200) * counts
    found = pairs.difference({'window_nats': a, 'window_scored': counts}, {'window_nats': b, 'window_scored': counts})
    d = (a - b).sum() / counts.sum()
    residual = (a - b) - d * counts
    assert found['difference'] == pytest.approx(d)
    assert found['standard_error'] == pytest.approx(np.sqrt(200 / 199 * (residual ** 2).sum()) / counts.sum())


def test_the_standard_error_covers_the_truth():
    """Of 400 pairs of texts with a true difference of 0.1 about 95% of the intervals hold it."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(400):
        shared = rng.normal(0, 5, 60)                   # hard and easy windows, for both models
        a, b = shared + rng.normal(1.6, 1, 60), shared + rng.normal(0, 1, 60)
        found = pairs.difference({'window_nats': a, 'window_scored': [16] * 60},
                                 {'window_nats': b, 'window_scored': [16] * 60})
        held += found['low'] <= 0.1 <= found['high']
    assert 0.92 < held / 400 < 0.98


def test_the_program_compares_two_models(tmp_path, run):         # noqa: F811
    save(tmp_path / 'a', random_model(0))
    save(tmp_path / 'b', random_model(1))
    save(tmp_path / 'c', random_model(1), {**META, 'chars': META['chars'][::-1]})
    make(tmp_path / 'd', drawn(99), drawn(400, seed=2))
    words = f'--data_dir={tmp_path}', '--dataset=d', '--stride=16'
    code, out, err = run(tmp_path / 'a', tmp_path / 'b', *words, '--json')
    assert code == 0 and err == ''
    found = json.loads(out)
    alone = [json.loads(run(tmp_path / name, *words, '--json')[1])['loss'] for name in 'ab']
    assert [found['loss'], found['against']['loss']] == pytest.approx(alone, rel=1e-6)
    assert found['compared']['difference'] == pytest.approx(alone[0] - alone[1], abs=2e-6)
    assert found['compared']['windows'] == 25 and found['compared']['standard_error'] > 0
    code, out, _ = run(f'--out_dir={tmp_path}/a', f'--against={tmp_path}/b', *words)
    assert code == 0 and 'paired' in out and f'{found["compared"]["difference"]:+.4f}' in out
    same = json.loads(run(tmp_path / 'a', tmp_path / 'a', *words, '--json')[1])['compared']
    assert same['difference'] == same['standard_error'] == 0
    assert 'mean other things' in refusal(run(tmp_path / 'a', tmp_path / 'c', *words))
    assert 'at least two windows' in refusal(run(tmp_path / 'a', tmp_path / 'b', f'--data_dir={tmp_path}', '--dataset=one',
                                                 *one(tmp_path)))


def one(folder):
    prepare_text.write_dataset(folder / 'one', META, {'train': drawn(9), 'val': drawn(9)})
    return ['--stride=16']
