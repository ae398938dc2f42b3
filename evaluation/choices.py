"""Multiple choice from JSON lines in HellaSwag's form, and the last word of a passage (lambada). Imports no torch.

    {"ctx": "A man is sitting on a roof. he", "endings": ["is using wrap ...", "is ripping ...", ...], "label": 3}

Each ending is scored after the context and one blank. acc: share of questions whose label has the largest log-likelihood;
acc_norm: the same of log-likelihood per character of the ending; acc_bytes: per byte of UTF-8. These are the harness's names
and definitions. Fields that are not named here are not read: what is in `ctx` is what the model sees.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

from variants import UserError

MOST_ENDINGS = 64


@dataclass
class Question:
    """A context, its possible endings, and which one is right."""
    context: str
    endings: list
    label: int


def read_questions(path):
    """[Question] of a file of JSON lines; raises UserError that names the line."""
    try:
        lines = Path(path).read_text(encoding='utf-8').splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: {getattr(error, "strerror", None) or error}', 'choices') from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(question(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise UserError(f'{path}, line {number}: {str(error)[:120]}', 'choices') from None
    if not found:
        raise UserError(f'{path}: no questions; a line is {{"ctx": TEXT, "endings": [TEXT, ...], "label": 0}}', 'choices')
    return found


def question(row):
    """The Question of one JSON object; raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError('an object is wanted')
    context, endings, label = (row.get(name) for name in ('ctx', 'endings', 'label'))
    if not isinstance(context, str) or not context.strip():
        raise ValueError('ctx must be a text that is not empty')
    if not isinstance(endings, list) or not 2 <= len(endings) <= MOST_ENDINGS or not all(
            isinstance(ending, str) and ending.strip() for ending in endings):
        raise ValueError(f'endings must be a list of 2 to {MOST_ENDINGS} texts')
    label = int(label) if isinstance(label, str) and label.isdecimal() else label       # the published file has texts
    if type(label) is not int or not 0 <= label < len(endings):
        raise ValueError(f'label must be a number from 0 to {len(endings) - 1}')
    return Question(context, endings, label)


def right(scores, lengths, label):
    """Whether the label has the largest score / length, the first of equals."""
    norms = [score / length for score, length in zip(scores, lengths)]
    return norms.index(max(norms)) == label


def choose(questions, tokenizer, score):
    """{'acc', 'acc_norm', 'acc_bytes', 'questions', ...} and standard errors; score: [(context, continuation)] of tokens ->
    [(log-likelihood, greedy)]."""
    from evaluation.likelihood import cut
    scored = iter(score([cut(tokenizer, q.context, f' {ending}') for q in questions for ending in q.endings]))
    hits = {'acc': 0, 'acc_norm': 0, 'acc_bytes': 0}
    for q in questions:
        scores = [next(scored)[0] for _ in q.endings]
        hits['acc'] += right(scores, [1] * len(scores), q.label)
        hits['acc_norm'] += right(scores, [len(ending) for ending in q.endings], q.label)
        hits['acc_bytes'] += right(scores, [len(ending.encode()) for ending in q.endings], q.label)
    chance = sum(1 / len(q.endings) for q in questions) / len(questions)
    return {'questions': len(questions), **shares(hits, len(questions)), 'chance': chance}


def shares(hits, count):
    """{name: share, name_stderr: its standard error sqrt(p (1 - p) / (n - 1))}."""
    found = {}
    for name, number in hits.items():
        p = number / count
        found |= {name: p, f'{name}_stderr': math.sqrt(p * (1 - p) / (count - 1)) if count > 1 else None}
    return found


def last_words(passages, tokenizer, score):
    """{'acc', 'perplexity', 'questions'}: the last word of each passage after all before it.

    acc: share of passages whose word is the likeliest token by token; perplexity: e^-(mean log-likelihood of a word).
    """
    from evaluation.likelihood import cut
    split = [passage.rstrip().rsplit(' ', 1) for passage in passages if ' ' in passage.strip()]
    if not split:
        raise UserError('no passage has two words', 'text')
    found = score([cut(tokenizer, context, f' {word}') for context, word in split])
    nats = -sum(loss for loss, _ in found) / len(found)
    return {'questions': len(found), **shares({'acc': sum(greedy for _, greedy in found)}, len(found)),
            'perplexity': math.exp(nats) if nats < 700 else None}


def table(result):
    """The result as lines of text."""
    lines = [f'{result["out_dir"]} on {result["data"]}: {result["questions"]:,} questions in {result["seconds"]:.1f} s '
             f'({result["dtype"]} on {result["device"]})']
    for name, meaning in (('acc', 'right'), ('acc_norm', 'right per character of the ending'),
                          ('acc_bytes', 'right per byte of the ending')):
        if name in result:
            error = result[f'{name}_stderr']
            spread = '' if error is None else f' ± {error:.2%}'
            lines.append(f'{name:12}{result[name]:8.2%}{spread}   {meaning}')
    if 'chance' in result:
        lines.append(f'{"chance":12}{result["chance"]:8.2%}')
    if 'perplexity' in result:
        lines.append(f'{"perplexity":12}' + (f'{result["perplexity"]:8.2f}' if result['perplexity'] else '     inf'))
    return '\n'.join(lines)
