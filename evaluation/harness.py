"""lm-evaluation-harness on any checkpoint: an adapter of ours as its `LM`. Needs the package lm_eval (extra `evaluate`).

The rolling log-likelihood has one token in front and windows as evaluate.py --convention=harness has them; contexts and
continuations are cut as evaluation/likelihood.py says; generation ends at the task's stop strings. Tasks of the harness
download their data from the hub; a folder of one's own with YAML tasks and local files needs no network.
"""
import os
from pathlib import Path

import lm_eval
import torch
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from evaluation import likelihood, windows
from evaluation.texts import Source, prefixed
from sampling import several
from sampling.choosing import Choice
from variants import UserError

MOST_NEW = 256                          # tokens of an answer where the task names no number


class Adapter(LM):
    """A GPT of ours with its tokenizer as the harness asks for it: requests hold texts, answers are numbers or texts.

    first: the token in front of a text that has nothing before it.
    """

    def __init__(self, model, tokenizer, first, device, dtype):
        super().__init__()
        self.model, self.tokenizer, self.first = model, tokenizer, first
        self._device, self.dtype = device, dtype

    def loglikelihood(self, requests):
        """[(log-likelihood in nats, whether greedy decoding gives it)] of (context, continuation)."""
        pairs = []
        for context, continuation in (request.args for request in requests):
            pairs.append(likelihood.cut(self.tokenizer, context, continuation) if context.strip()
                         else ([self.first], self.tokenizer.encode_ordinary(context + continuation)))
        empty = [i for i, (head, _) in enumerate(pairs) if not head]
        for i in empty:                                 # a context of no tokens
            pairs[i] = ([self.first], pairs[i][1])
        return likelihood.likelihoods(self.model, pairs, self._device, self.dtype)

    def loglikelihood_rolling(self, requests):
        """[log-likelihood in nats] of whole texts."""
        return [self.rolling(request.args[0]) for request in requests]

    def rolling(self, text):
        tokens = torch.tensor(self.tokenizer.encode_ordinary(text), dtype=torch.int64).numpy()
        if not len(tokens):
            return 0.0
        source = prefixed(Source('', lambda a, b: tokens[a:b], len(tokens), None, None), self.first)
        size = self.model.config.block_size
        rows = windows.batch_rows(size, self.model.config.vocab_size)
        return -windows.score(self.model, source, size, size, rows, self._device, self.dtype, 'harness')['nats']

    def generate_until(self, requests):
        """[text] that continues each context up to a stop string or max_gen_toks tokens."""
        return [self.continued(*request.args) for request in requests]

    def continued(self, context, wanted):
        stops = wanted.get('until') or []
        stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
        most = int(wanted.get('max_gen_toks') or MOST_NEW)
        room = max(1, self.model.config.block_size - most)
        tokens = (self.tokenizer.encode_ordinary(context) or [self.first])[-room:]
        warm = float(wanted.get('temperature') or 0) if wanted.get('do_sample') else 0.0
        choice = Choice(temperature=warm, top_k=int(wanted.get('top_k') or 0), top_p=float(wanted.get('top_p') or 1))
        texts = several.Texts(self.model, self.tokenizer, choice, stops, dtype=self.dtype)
        return ''.join(texts.stream(tokens, most, torch.Generator(self._device).manual_seed(0)))


def run(config, model, tokenizer, first, device, dtype):
    """(what the harness found, its table) of the tasks that --lm_eval names."""
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    folder = config.lm_eval_folder or None
    if folder and not Path(folder).is_dir():
        raise UserError(f'there is no folder {folder!r}', 'lm_eval_folder')
    manager = TaskManager(include_path=folder)
    names = [name.strip() for name in config.lm_eval.split(',') if name.strip()]
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise UserError(f'lm-evaluation-harness has no task {(unknown or [""])[0]!r}; `lm_eval ls tasks` lists its own, and '
                        '--lm_eval_folder=FOLDER adds yours', 'lm_eval')
    adapter = Adapter(model, tokenizer, first, device, dtype)
    found = lm_eval.simple_evaluate(model=adapter, tasks=names, task_manager=manager, log_samples=False,
                                    limit=config.limit or None, num_fewshot=config.fewshot, bootstrap_iters=1000)
    return {name: plain(scores) for name, scores in found['results'].items()}, make_table(found)


def plain(scores):
    """A dict of scores as JSON has it; the harness writes `N/A` for a standard error that it does not know."""
    return {name: value.item() if hasattr(value, 'item') else value for name, value in scores.items()
            if name != ' ' and (isinstance(value, (int, float, str)) or hasattr(value, 'item'))}
