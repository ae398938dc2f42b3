"""config/compression/llama_wikitext2.py on tiny made-up models: perplexities by transformers, half precision, the report."""
import json
import random

import pytest
import torch
from datasets import load_dataset

import compress
from ablation import runner
from compression import published, study
from data import prepare_documents
from data.prepare_documents import Recipe
from tests.test_setup import ROOT
from tests.tiny import WORDS

STUDY, LENGTH = 'config/compression/llama_wikitext2.py', 32
COUNTS = {'train': 2500, 'valid': 300, 'test': 300}
SIZES = {'vocab_size': 300, 'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4,
         'num_key_value_heads': 2, 'max_position_embeddings': 64}


def made(kind, folder):
    """A folder of transformers with a tokenizer.json that puts <s> in front, but for GPT-2's."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    torch.manual_seed(0)
    if kind == 'gpt2':
        config = transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    else:
        name = {'llama': 'LlamaConfig', 'mistral': 'MistralConfig', 'qwen2': 'Qwen2Config'}[kind]
        config = getattr(transformers, name)(**SIZES, **({'sliding_window': None} if kind == 'mistral' else {}))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.to(torch.bfloat16).save_pretrained(folder)
    kept = Tokenizer(models.BPE())
    kept.pre_tokenizer, kept.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    kept.train_from_iterator([' '.join(WORDS)], trainers.BpeTrainer(
        vocab_size=300, special_tokens=['<s>'], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if kind != 'gpt2':
        kept.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
    kept.save(str(folder / 'tokenizer.json'))
    return folder


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with four models, each with its data set by prepare.py's own program, and the text."""
    folder, rng = tmp_path_factory.mktemp('protocol'), random.Random(0)
    (folder / 'text').mkdir()
    for split, count in COUNTS.items():
        lines = (' '.join(rng.choice(WORDS) for _ in range(rng.choice((0, 9, 15)))) for _ in range(count // 5))
        (folder / 'text' / f'wiki.{split}.raw').write_text(''.join(f' {line} \n' for line in lines))
    recipe = Recipe(ROOT / 'data/wikitext', load_dataset, 'x', ('y',), 1e6, joined='y',
                    splits={'train': 'train', 'val': 'validation', 'test': 'test'})
    for kind in ('llama', 'mistral', 'qwen2', 'gpt2'):
        prepare_documents.main(recipe, [f'--tokenizer={made(kind, folder / kind)}', f'--out={folder / "data" / kind}',
                                        f'--input={folder / "text"}'])
    return folder


@pytest.fixture
def run(monkeypatch, place, tmp_path):
    """run(kind, *arguments) -> {(variant, budget): line of the results}."""
    monkeypatch.setattr(compress, 'stop_on_signals', lambda: None)
    monkeypatch.setattr(runner, 'STOP', type(runner.STOP)())
    threads = torch.get_num_threads()

    def start(kind, *more, out='out'):
        compress.main_run([STUDY, f'--source={place / kind}', f'--data_dir={place / "data"}', f'--dataset={kind}',
                           f'--out_dir={tmp_path / out}', f'--block_size={LENGTH}', '--device=cpu', '--gradient_tokens=512',
                           '--calibration_tokens=2048', '--budgets={"80%": 0.8}', *more])
        lines = [json.loads(line) for line in (tmp_path / out / 'results.jsonl').read_text().splitlines()]
        return {(line['variant'], line['budget']): line for line in lines}
    yield start
    torch.set_num_threads(threads)


def by_transformers(folder, text):
    """(mean loss over windows, scored tokens) as published: one encoding, whole windows, each shifted inside."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    rows = [line + '\n' if line.strip() else '' for line in text.split('\n')[:-1]]
    tokens = PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'))('\n\n'.join(rows)).input_ids
    windows = torch.tensor(tokens[:len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.double() for window in windows]
    assert len(tokens) % LENGTH                         # there is a rest, which is not scored
    return torch.stack(losses).mean().item(), len(windows) * (LENGTH - 1)


@pytest.mark.parametrize('kind', ['llama', 'mistral', 'qwen2', 'gpt2'])
def test_perplexity_is_that_of_transformers_and_methods_fill_the_budget(place, run, kind):
    found = run(kind, '--only=dense,SVD-LLM*,neurons and heads')
    loss, count = by_transformers(place / kind, (place / 'text' / 'wiki.test.raw').read_text())
    dense = found['dense', '']
    assert dense['test']['tokens'] == count and abs(dense['test']['loss'] - loss) < 1e-5 * loss
    for name in ('SVD-LLM: svd_whitened', 'neurons and heads'):
        assert 0.7 < found[name, '80%']['share'] <= 0.8 and found[name, '80%']['test']['tokens'] == count


def test_weights_in_half_precision_change_little(run):
    half = run('llama')
    full = run('llama', '--weights=float32', out='full')
    assert half.keys() == full.keys() and len(half) == 8
    for key, line in half.items():
        assert line['signature'] != full[key]['signature']
        assert abs(line['test']['loss'] - full[key]['test']['loss']) < (1e-5 if key[0] == 'dense' else 0.02), key
        assert abs(line['share'] - full[key]['share']) < 0.01


def test_an_interrupted_calibration_goes_on_with_what_it_lacks(run, tmp_path, monkeypatch):
    from decomposition import calibrate
    only = '--only=pivot curvature*'
    first = run('llama', only)
    files = sorted((tmp_path / 'out' / 'calibration').rglob('*.safetensors'))
    assert len(files) == 2 * 14                         # inputs and gradients of seven matrices in two blocks
    for path in files[:3]:
        path.unlink()
    (tmp_path / 'out' / 'results.jsonl').unlink()
    seen, passes = [], calibrate.passes
    monkeypatch.setattr(calibrate, 'passes', lambda *given: [seen.append(given[1]), passes(*given)][1])
    again = run('llama', only)
    assert sorted({path.name.split('.safetensors')[0].removesuffix('.gradient') for path in files[:3]}) == sorted(
        {site for sites in seen for site in sites})
    for key, line in again.items():
        assert abs(line['test']['loss'] - first[key]['test']['loss']) < 1e-6


def test_a_missing_data_set_says_the_command(place, run):
    with pytest.raises(compress.UserError) as caught:
        run('llama', '--dataset=nowhere')
    folder = place / 'data' / 'nowhere'
    assert str(caught.value) == (f'there is no data set {folder}; make it: python data/wikitext/prepare.py '
                                 f'--tokenizer={place / "llama"} --out={folder}')


@pytest.mark.parametrize('argument, words', [
    ('--block_size=64 --test=test:0:50', "test=test:0:50 has 50 tokens, and score='inside' takes whole windows of 64"),
    ('--memory_gb=0.001', 'the study takes about 0.5 GB, and its device has 0.0'),
    ('--weights=float32 --memory_gb=3', "memory_gb=3 is for weights='bfloat16'"),
    ('--select=test', 'overlap, and test must be fresh text')])
def test_mistakes(run, argument, words):
    with pytest.raises(compress.UserError) as caught:
        run('llama', *argument.split())
    assert words in str(caught.value) and '\n' not in str(caught.value)


def test_the_report_has_published_figures_with_their_sources(run, tmp_path):
    found = run('llama', '--only=dense,SVD-LLM*')
    report = (tmp_path / 'out' / 'report.md').read_text().split('### Published')[1]
    own = [line for line in report.splitlines() if line.endswith('| **this study** |')]
    assert len(own) == 2 and f'{found["dense", ""]["test"]["perplexity"]:,.2f}'[:4] in own[0].replace(',', '')
    assert '| Llama-1-7B | SVD-LLM |  | 7.88 |' in report and '**not measured here**' in report
    rows = [line for line in report.splitlines() if line.startswith('| ') and '**this study**' not in line][1:]
    assert len(rows) == len(published.WIKITEXT2)        # the separator begins with |-
    assert all(source and line.split('|')[-2].strip() == source for line, (*_, source) in zip(rows, published.WIKITEXT2))


def test_the_dry_run_plans_the_memory(place, run, tmp_path, capsys):
    with pytest.raises(FileNotFoundError):              # no results
        run('llama', '--dry_run=True', '--memory_gb=2')
    shown = capsys.readouterr().out
    assert 'weights 0.00 GB, one block in float32' in shown and 'of 2.00 GB, which fits' in shown
    assert '1 passes over the text for inputs alone, 1 with gradients' in shown


def test_results_from_before_the_new_settings_stay_valid():
    trial = study.Trial('a', 'b', 0, 1337)
    old = study.Study(source='x', budgets={'b': 0.5}, variants={'a': {}})
    shared = json.loads(study.signature(old, trial))[2]
    assert not {'score', 'weights', 'gradient_tokens', 'memory_gb', 'published', 'prepare'} & shared.keys()
