"""Export a checkpoint as a folder with config.json and model.safetensors, or as a .gguf, that other programs read.

    python export.py --out_dir=out/kron_mlp --to=exported
    AutoModelForCausalLM.from_pretrained('exported', trust_remote_code=True)    # in Python, with transformers

Structured matrices stay what they are, and the model's code goes along as one file, modeling_nanokron.py; --dense=True
multiplies them out. A plain GPT-2, Llama (RMSNorm, RoPE, SwiGLU) or Qwen2 needs no code of ours: it goes to transformers'
own layout, without the padding of the vocabulary, and a Llama to a GGUF with --to=FILE.gguf. The tokenizer goes along, the
source's own files where there are some, and a README.md says where the model comes from. Exit codes: 0 done; 2 a mistake,
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
    to: str = key('', 'folder to write, new or empty; or a new file NAME.gguf')
    which: str = key('last', "checkpoint of out_dir: 'last' or 'best'", choices=('last', 'best'))
    dense: bool = key(False, 'multiply structured matrices out, so that plain GPT-2s and Llamas need no code of ours')
    dtype: str = key('source', "type of the numbers; 'source' = that of the model which the run began from, else float32",
                     choices=('source', 'float32', 'float16', 'bfloat16'))
    debug: bool = key(False, 'print a traceback for user errors too')


def check(config):
    """What can be refused before torch is imported."""
    if not config.to:
        raise UserError('write --to=FOLDER, a new one')
    if not os.path.exists(config.out_dir):
        raise UserError(f'there is no folder or file {config.out_dir!r}; pass --out_dir=FOLDER', 'out_dir')
    if is_file(config):
        if os.path.lexists(config.to):
            raise UserError(f'{config.to!r} exists; nothing is overwritten', 'to')
    elif os.path.lexists(config.to) and not (os.path.isdir(config.to) and not os.listdir(config.to)):
        raise UserError(f'{config.to!r} exists and is not an empty folder; nothing is overwritten', 'to')


def is_file(config):
    """Whether a GGUF is asked for."""
    return config.to.endswith('.gguf')


def write(folder, found):
    """The folder of a layouts.Export. config.json last: without it no program takes the folder for a model."""
    from safetensors.torch import save_file
    os.makedirs(folder, exist_ok=True)
    save_file(found.tensors, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})
    for name, text in {**found.files, 'config.json': json.dumps(found.raw, indent=2) + '\n'}.items():
        with open(os.path.join(folder, name), 'w', encoding='utf-8', newline='') as file:
            file.write(text)


def export(config):
    """Write what config asks for; returns a line about it. Raises UserError, and OSError where it cannot be written."""
    from decomposition import initialise
    from exporting import card, gguf_writer, layouts
    source = initialise.read_folder(config.out_dir, config.which)
    model, found = layouts.made(source, config.dense, config.dtype)
    layouts.add_tokens(found, source[2])
    numbers = f'{sum(t.numel() for t in found.tensors.values()):,} elements in {len(found.tensors)} tensors'
    if is_file(config):
        tokens = gguf_writer.write(config.to, found, source[2], layouts.tokenizer_text(source[2]['data']))
        return f'{numbers}: GGUF in {found.raw["dtype"]}, {tokens}'
    found.files['README.md'] = card.text_of(model, found, source, config.out_dir, ['python', 'export.py', *sys.argv[1:]])
    write(config.to, found)
    return f'{numbers}: {found.line}'


def main():
    config = configurator.run_program('export.py', ExportConfig, '[--key=value ...]')
    try:
        check(config)
        from safetensors import SafetensorError
        try:
            line = export(config)
        except (OSError, SafetensorError) as error:
            print(f'export.py: {config.to} could not be written: {error}', file=sys.stderr)
            raise SystemExit(4) from None
    except UserError as error:
        if config.debug:
            raise
        configurator.say_mistake('export.py', configurator.placed(config, error))
    print(f'{config.to}: {line}')


if __name__ == '__main__':
    ends.watch('export.py')
    main()
