"""Export a checkpoint as a folder with config.json and model.safetensors that other programs read.

    python export.py --out_dir=out/kron_mlp --to=exported
    AutoModelForCausalLM.from_pretrained('exported')    # in Python, with transformers

A GPT-2 or a Llama block (RMSNorm, RoPE, SwiGLU; Qwen2's too) goes to transformers' layout, with structured linears
multiplied out to dense matrices and without the padding of the vocabulary; any other model is written in our own layout,
which sample.py and train.py --init_from read. The tokenizer goes along as tokenizer.json. Exit codes: 0 done; 2 a mistake,
said in one line; 4 the folder could not be written.
"""
import json
import os
import sys
from dataclasses import dataclass

import configurator
from commandline import ends
from configurator import key
from variants import UserError


@dataclass
class ExportConfig:
    """What to export, and to which folder."""
    out_dir: str = key('out', "folder of the run; nanoGPT's and Hugging Face's folders and .gguf files are taken too")
    to: str = key('', 'folder to write, new or empty')
    which: str = key('last', "checkpoint of out_dir: 'last' or 'best'", choices=('last', 'best'))
    debug: bool = key(False, 'print a traceback for user errors too')


def check(config):
    """What can be refused before torch is imported."""
    if not config.to:
        raise UserError('write --to=FOLDER, a new one')
    if not os.path.exists(config.out_dir):
        raise UserError(f'there is no folder or file {config.out_dir!r}; pass --out_dir=FOLDER', 'out_dir')
    if os.path.lexists(config.to) and not (os.path.isdir(config.to) and not os.listdir(config.to)):
        raise UserError(f'{config.to!r} exists and is not an empty folder; nothing is overwritten', 'to')


def contents(source):
    """(config.json, state dict, a line that says what they are) of a source of initialise.read_folder."""
    from data import tokenizer
    from decomposition import initialise
    from pretrained import sources
    config, state, info = source
    model = initialise.build(config, config, state)
    kind = 'llama' if config.rope else 'gpt2'
    layout, name = sources.LAYOUTS[kind], {'llama': 'Llama', 'gpt2': 'GPT-2'}[kind]
    odd = layout.difference(model)
    if odd:
        raw = {'model_type': 'nanokron', 'config': configurator.as_dict(config), 'step': info['step'],
               'data': tokenizer.describe(info['data']) if info['data'] else None}
        tied = ('lm_head.weight',) if config.tie_weights else ()
        return raw, {name: t.contiguous() for name, t in model.state_dict().items() if name not in tied}, (
            f"{odd} is no {name} block, so this is nanokron's own layout, which transformers does not read")
    vocab_size = known_tokens(info['data'] if info['kind'] == 'nanokron' else None, config.vocab_size)
    raw, tensors = layout.from_ours(model, vocab_size)
    dropped = config.vocab_size - vocab_size
    padding = f', {dropped} padding rows of the vocabulary dropped' if dropped else ''
    name = 'Qwen2' if raw['model_type'] == 'qwen2' else name
    return raw, tensors, f'dense {name} for transformers{padding}'


def known_tokens(data, vocab_size):
    """Rows of the vocabulary that are tokens, by the tokenizer's meta; all of them when nothing is known."""
    known = (data or {}).get('vocab_size')
    return known if type(known) is int and 0 < known <= vocab_size else vocab_size


def tokenizer_files(data, raw):
    """{file name: text} of the tokenizer that transformers is to load, and raw's token between texts; {} for prices.

    tokenizer_config.json keeps transformers from choosing the tokenizer class by the model class.
    """
    from data import hub_tokenizer, tokenizer_json
    if not data or raw['model_type'] == 'nanokron':
        return {}
    text = data['json'] if data['tokenizer'] == 'hub' else tokenizer_json.text_of(data)
    if text is None:
        return {}
    words = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    end = hub_tokenizer.between_texts(text)
    if end:
        words['eos_token'], raw['eos_token_id'] = end
    return {'tokenizer.json': text, 'tokenizer_config.json': json.dumps(words, indent=2) + '\n'}


def write(folder, raw, tensors, files):
    """files: {name: text} besides. config.json last: without it no program takes the folder for a model."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    try:
        os.makedirs(folder, exist_ok=True)
        save_file(tensors, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})
        for name, text in {**files, 'config.json': json.dumps(raw, indent=2) + '\n'}.items():
            with open(os.path.join(folder, name), 'w', encoding='utf-8', newline='') as file:
                file.write(text)
    except (OSError, SafetensorError) as error:
        print(f'export.py: {folder} could not be written: {error}', file=sys.stderr)
        raise SystemExit(4) from None


def main():
    config = configurator.run_program('export.py', ExportConfig, '[--key=value ...]')
    try:
        check(config)
        from decomposition import initialise
        source = initialise.read_folder(config.out_dir, config.which)
        raw, tensors, line = contents(source)
        write(config.to, raw, tensors, tokenizer_files(source[2]['data'], raw))
    except UserError as error:
        if config.debug:
            raise
        configurator.say_mistake('export.py', configurator.placed(config, error))
    numbers = sum(tensor.numel() for tensor in tensors.values())
    print(f'{config.to}: {numbers:,} elements in {len(tensors)} tensors: {line}')


if __name__ == '__main__':
    ends.watch('export.py')
    main()
