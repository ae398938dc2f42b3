"""Perplexities that others published for methods and models of their own, as a table beside a study's. Measured elsewhere.

A row: model, method, {share of the parameters that is kept: perplexity}, where the figure stands. Shares count what each
source counts; its text, windows and precision are its own where it does not follow the common protocol.
"""
from ablation.tables import markdown

ARENA, LEMS = 'LowRankArena (Zishan-Shao/lowrankarena, README)', 'LEMS (lems-svd/lems, README)'
IO, MAS = 'IO-SVD (arXiv 2605.15626, by a review)', 'MAS-SVD (README)'
SLICE = 'SliceGPT (Zephyr271828/llm-pruning-collection-fork)'
AUDIT = 'LowRankArena, audit of SAES-SVD'
DENSE = 1.0

WIKITEXT2 = [
    ('Llama-1-7B', 'dense', {DENSE: 5.67}, ARENA),
    ('Llama-1-7B', 'ASVD', {0.8: 8.60}, ARENA),
    ('Llama-1-7B', 'SVD-LLM', {0.8: 7.88, 0.6: 13.74}, ARENA),
    ('Llama-1-7B', 'Dobi-SVD', {0.8: 9.23, 0.6: 15.24}, ARENA),
    ('Llama-1-7B', 'Basis Sharing', {0.8: 7.74, 0.6: 12.42}, ARENA),
    ('Llama-1-7B', 'MoDeGPT', {0.8: 6.92, 0.6: 12.43}, ARENA),
    ('Llama-1-7B', 'SAES-SVD, measured again', {0.4: 31.60}, AUDIT),
    ('Llama-1-7B', 'SAES-SVD, as in its paper', {0.4: 22.01}, AUDIT),
    ('Llama-1-7B', 'IO-SVD', {0.8: 6.41, 0.6: 9.84, 0.4: 27.70}, IO),
    ('Llama-1-7B', 'IO-SVD, equal ranks', {0.4: 32.09}, IO),
    ('Llama-1-7B', 'OBD-LLM, two-sided', {0.4: 28.19}, IO),
    ('Llama-1-7B', 'OBD-LLM, two-sided, equal ranks', {0.4: 32.95}, IO),
    ('Llama-1-7B', 'IO-SVD + 8 bits: equal storage, not parameters', {0.8: 5.59, 0.6: 6.27, 0.4: 6.41}, IO),
    ('Llama-1-7B', 'Dobi-SVD + remapping: equal storage, not parameters', {0.6: 9.07}, 'arXiv 2502.02723'),
    ('Llama-1-7B', 'SVD-LLM', {0.8: 7.94, 0.6: 13.11, 0.5: 23.97, 0.4: 42.30}, MAS),
    ('Llama-1-7B', 'MAS-SVD, factors refined', {0.8: 7.29, 0.6: 9.68, 0.5: 11.98, 0.4: 14.99}, MAS),
    ('Llama-2-7B', 'SliceGPT', {0.8: 6.86, 0.75: 7.56, 0.7: 8.63, 0.5: 21.1}, SLICE),
    ('Llama-3.1-8B', 'dense', {DENSE: 6.24}, ARENA),
    ('Llama-3.1-8B', 'SVD-LLM', {0.8: 14.83, 0.6: 199.84}, ARENA),
    ('Llama-3.1-8B', 'Basis Sharing', {0.8: 15.61, 0.6: 82.96}, ARENA),
    ('Llama-3.1-8B', 'MoDeGPT', {0.8: 9.01, 0.6: 24.50}, ARENA),
    ('Llama-3.1-8B', 'SliceGPT', {0.8: 11.31, 0.5: 47.86}, SLICE),
    ('Qwen3-8B-Base', 'dense', {DENSE: 7.00}, ARENA),
    ('Qwen3-8B-Base', 'SVD-LLM', {0.8: 11.08, 0.6: 20.44}, ARENA),
    ('Qwen3-8B-Base', 'Basis Sharing', {0.8: 11.05, 0.6: 18.59}, ARENA),
    ('Qwen3-8B-Base', 'MoDeGPT', {0.8: 10.34, 0.6: 18.40}, ARENA),
    ('Mistral-7B', 'dense', {DENSE: 5.25}, LEMS),
    ('Mistral-7B', 'SVD-LLM', {0.7: 10.96}, LEMS),
    ('Mistral-7B', 'Dobi-SVD', {0.7: 12.37}, LEMS),
    ('Mistral-7B', 'GFWSVD', {0.7: 2549}, LEMS),
    ('Mistral-7B', 'KFAC-SVD, equal ranks', {0.8: 7.14, 0.7: 9.29, 0.6: 14.38}, LEMS),
    ('Mistral-7B', 'KFAC-SVD, SVD-LLM v2 ranks', {0.8: 7.13}, LEMS),
    ('Mistral-7B', 'KFAC-SVD, LEMS ranks', {0.8: 5.98, 0.7: 7.42, 0.6: 10.58}, LEMS),
    ('Llama-3-8B', 'dense', {DENSE: 6.14}, LEMS),
    ('Llama-3-8B', 'SVD-LLM', {0.7: 34.64}, LEMS),
    ('Llama-3-8B', 'Dobi-SVD', {0.7: 31.54}, LEMS),
    ('Llama-3-8B', 'GFWSVD', {0.7: 41798}, LEMS),
    ('Llama-3-8B', 'KFAC-SVD, equal ranks', {0.8: 11.44, 0.7: 19.43, 0.6: 48.56}, LEMS),
    ('Llama-3-8B', 'KFAC-SVD, SVD-LLM v2 ranks', {0.8: 11.40}, LEMS),
    ('Llama-3-8B', 'KFAC-SVD, LEMS ranks', {0.8: 8.16, 0.7: 11.07, 0.6: 17.86}, LEMS),
    ('Qwen3-8B', 'dense', {DENSE: 9.71}, LEMS),
    ('Qwen3-8B', 'SVD-LLM', {0.7: 17.11}, LEMS),
    ('Qwen3-8B', 'Dobi-SVD', {0.7: 18.54}, LEMS),
    ('Qwen3-8B', 'GFWSVD', {0.7: 21684}, LEMS),
    ('Qwen3-8B', 'KFAC-SVD, equal ranks', {0.8: 12.52, 0.7: 14.69, 0.6: 21.68}, LEMS),
    ('Qwen3-8B', 'KFAC-SVD, SVD-LLM v2 ranks', {0.8: 12.52}, LEMS),
    ('Qwen3-8B', 'KFAC-SVD, LEMS ranks', {0.8: 10.38, 0.7: 11.81, 0.6: 15.70}, LEMS),
]
TABLES = {'wikitext2': WIKITEXT2}


def figure(value):
    return '' if value is None else f'{value:.2f}' if value < 1000 else f'{value:.3g}'


def text(name, model, own):
    """The published table with a study's rows in front. name: in TABLES; own: [(method, {share: words})] of `model`."""
    rows = TABLES[name]
    shares = sorted({share for row in rows for share in row[2]} | {share for row in own for share in row[1]}, reverse=True)
    heads = ['dense' if share == DENSE else f'keep {share:g}' for share in shares]
    lines = [[model, method, *(found.get(share, '') for share in shares), '**this study**'] for method, found in own]
    lines += [[*names, *(figure(found.get(share)) for share in shares), source] for *names, found, source in rows]
    return ('Perplexity on the test text beside what others published. Rows with another source were **not measured here**: '
            'the figures are theirs, of their models, code and precision.\n\n' +
            markdown(['model', 'method', *heads, 'source'], lines))
