"""README.md of an exported model: where it comes from, how it was made, how large and how good it is."""
import math
import os

from pretrained import said
from reporting import masking
from reporting.records import read_json
from reporting.runlog import read_log
from variants import as_rules

USE = """```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained('THIS_FOLDER'{more})
```"""


def text_of(model, found, source, place, command):
    """The card's text. model: as it was exported; source: (GPTConfig, state, info) it was read from, at `place`."""
    info, count = source[2], sum(tensor.numel() for tensor in found.tensors.values())
    head = ['---', *([f'license: {info["source"]["licence"]}'] if info['source'].get('licence') else []),
            'library_name: transformers', 'pipeline_tag: text-generation', '---', '']
    name = info['source'].get('name') or os.path.basename(os.path.normpath(place))
    parts = [f'# {name}, exported by nanokron', what(info, name), sizes(model, info, count), *quality(info, place),
             *settings(source[0]), use(found), '## Commands', commands(place, command)]
    return '\n'.join([*head, '\n\n'.join(parts), ''])


def what(info, name):
    """The source and everything that was done to it."""
    lines = list(info['source'].get('history', ()))
    if info.get('run'):
        lines.append(said.told(info['run'], info['step'], info['source']))
    licence = info['source'].get('licence')
    lines = [f'- {line}' for line in lines] or ['- nothing was changed']
    terms = f' (licence: {licence}).' if licence else '; nothing is said of its licence.'
    return '\n'.join([f'Source: {name}{terms}', '', 'What was done:', '', *lines])


def sizes(model, info, count):
    """A table of parameters before and after."""
    whole = dense_numel(model)
    rows = [('the source', info['source'].get('parameters')), ('this model', count),
            ('its structured matrices multiplied out', whole if whole != model.num_params() else None)]
    return '\n'.join(['| parameters | |', '|---|---|', *(f'| {name} | {number:,} |' for name, number in rows if number)])


def dense_numel(model):
    """Parameters with every site as a dense matrix."""
    return model.num_params() + sum(site.in_features * site.out_features + (0 if site.bias is None else site.out_features)
                                    - sum(p.numel() for p in site.parameters()) for site in model.sites().values())


def quality(info, place):
    """The last validation loss that the run's log has at or before the checkpoint's step."""
    lines = [line for line in read_log(os.path.join(place, 'log.jsonl')) if isinstance(line.get('val_loss'), float)
             and isinstance(line.get('step'), int) and line['step'] <= (info.get('step') or 0)]
    if not lines:
        return []
    loss, step = lines[-1]['val_loss'], lines[-1]['step']
    perplexity = f', perplexity {math.exp(loss):,.2f}' if loss < 50 else ''
    data = (info.get('run') or {}).get('dataset', 'its data set')
    return [f'Validation loss on {data} at step {step:,}: {loss:.4f} nats per token{perplexity}.']


def settings(config):
    """The rules that say which matrices are structured, and the classes of attention and MLP."""
    rows = [(name, pattern, spec) for name in ('linear', 'attention', 'mlp')
            for pattern, spec in as_rules(getattr(config, name)).items()]
    return ['\n'.join(['| | where | what |', '|---|---|---|', *(f'| {a} | `{b}` | `{c}` |' for a, b, c in rows)])]


def use(found):
    """How it is loaded."""
    return USE.format(more='' if found.dense else ', trust_remote_code=True')


def commands(place, command):
    """The command lines of the run and of the export, without secrets."""
    env = read_json(os.path.join(place, 'env.json')) if os.path.isfile(os.path.join(place, 'env.json')) else {}
    run = env.get('command') if isinstance(env, dict) else None
    lines = [masking.shell(run)] if isinstance(run, list) else []
    return '\n'.join(['```', *lines, masking.shell(command), '```'])
