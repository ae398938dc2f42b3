"""What config.json and the tensors of an exported model are: transformers' own layout, or ours with the model's code."""
from dataclasses import dataclass, field

import torch

import configurator
from data import hub_tokenizer, tokenizer, tokenizer_json
from decomposition import initialise
from exporting import bundle
from pretrained import said, sources
from variants import UserError, match, parse_spec

CODE = 'modeling_nanokron.py'
CLASSES = {'AutoConfig': 'modeling_nanokron.NanokronConfig', 'AutoModelForCausalLM': 'modeling_nanokron.NanokronForCausalLM'}
TORCH = {name: getattr(torch, name) for name in said.DTYPES}


@dataclass
class Export:
    """config.json, tensors by name, and the texts of other files; line: what they are, in a few words."""
    raw: dict
    tensors: dict
    line: str
    files: dict = field(default_factory=dict)
    dense: bool = True                                  # whether transformers' own class reads it


def made(source, dense=False, dtype='source'):
    """(the model, its Export) of a source of initialise.read_folder, without the tokenizer and the card.

    dense: multiply structures out; dtype: one of said.DTYPES or 'source'.
    """
    config, state, info = source
    model = initialise.build(config, config, state).eval()
    layout, name = (sources.LAYOUTS['llama'], 'Llama') if config.rope else (sources.LAYOUTS['gpt2'], 'GPT-2')
    odd = layout.difference(model)
    structured = any(module.spec != 'dense' for module in model.sites(experts=True).values())
    if odd or structured and not dense:
        if dense:
            model.realise()
        found = with_code(model, info, f'{odd} is no {name} block' if odd else 'structured matrices')
    else:
        rows = known_tokens(info['data'] if info['kind'] == 'nanokron' else None, config.vocab_size)
        dropped = config.vocab_size - rows
        padding = f', {dropped} padding rows of the vocabulary dropped' if dropped else ''
        raw, tensors = layout.from_ours(model, rows)
        name = 'Qwen2' if raw['model_type'] == 'qwen2' else name
        found = Export(raw, tensors, f'dense {name} for transformers{padding}')
        if config.rope:
            longer(found.raw, 'max_position_embeddings', info)
    cast(found, info, dtype)
    return model, found


def with_code(model, info, why):
    """Our own layout: state-dict names, GPTConfig's settings, and the code by which transformers computes the model."""
    config, data = configurator.as_dict(model.config), info['data']
    if model.config.rope and attentions(model.config) == {'causal'}:
        longer(config, 'block_size', info)
    in_file = data and data['tokenizer'] == 'hub'       # its tokenizer.json lies beside
    raw = {'model_type': 'nanokron', 'architectures': [bundle.MODEL], 'auto_map': CLASSES, 'config': config,
           'step': info['step'], 'data': tokenizer.describe(data) if data and not in_file else None,
           'source': {name: value for name, value in info['source'].items() if name != 'files'},
           'bos_token_id': None, 'eos_token_id': None}
    tied = ('lm_head.weight',) if model.config.tie_weights else ()
    tensors = {name: t.contiguous() for name, t in model.state_dict().items() if name not in tied}
    return Export(raw, tensors, f'{why}: for transformers with trust_remote_code=True', {CODE: bundle.text_of(model)}, False)


def attentions(config):
    """The names of the attention classes of all blocks."""
    return {parse_spec(match(config.attention, f'h.{i}', 'causal')[1]).name for i in range(config.n_layer)}


def longer(raw, name, info):
    """The source's context where a run took a shorter one: rotary positions need no table."""
    raw[name] = max(raw[name], info['source'].get('max_positions', 0))


def cast(found, info, dtype):
    """All floating-point tensors to a type; raises UserError where its range is too small."""
    name = info['source'].get('dtype', 'float32') if dtype == 'source' else dtype
    for key, tensor in found.tensors.items():
        if tensor.is_floating_point() and tensor.dtype != TORCH[name]:
            found.tensors[key] = tensor.to(TORCH[name])
            if not found.tensors[key].isfinite().all() and tensor.isfinite().all():
                raise UserError(f'{key} has numbers too large for {name}; take --dtype=bfloat16 or float32', 'dtype')
    found.raw['dtype'] = name


def known_tokens(data, vocab_size):
    """Rows of the vocabulary that are tokens, by the tokenizer's meta; all of them when nothing is known."""
    known = (data or {}).get('vocab_size')
    return known if type(known) is int and 0 < known <= vocab_size else vocab_size


# ----------------------------------------------------------------------------------------------------
# the tokenizer

def tokenizer_text(data):
    """The text of a tokenizer.json; None where nothing is known, and for prices."""
    return (data['json'] if data['tokenizer'] == 'hub' else tokenizer_json.text_of(data)) if data else None


def add_tokens(found, info):
    """Add the tokenizer's files, the source's own where it has them, and the tokens that config.json names.

    tokenizer_config.json keeps transformers from choosing the tokenizer class by the model class.
    """
    source, text, size = info['source'], tokenizer_text(info['data']), vocab_size(found)
    tokens = {name: value for name, value in source.get('tokens', {}).items() if within(value, size)}
    end = text and hub_tokenizer.between_texts(text)
    if end and 'eos_token_id' not in tokens:
        tokens['eos_token_id'] = end[1]
    found.raw.update(tokens)
    found.files.update({name: said.without_code(name, words) for name, words in source.get('files', {}).items()
                        if text or name == 'generation_config.json'})
    if text:
        found.files['tokenizer.json'] = text
        words = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
        found.files.setdefault('tokenizer_config.json', said.dumped(words | ({'eos_token': end[0]} if end else {})))


def vocab_size(found):
    return found.raw.get('vocab_size') or found.raw['config']['vocab_size']


def within(value, size):
    """Whether a token, or some, are rows of the vocabulary."""
    return all(number < size for number in (value if isinstance(value, list) else [value]))
