"""What a model's file is, by what is in it and not by its name, and tensors by the names that a wrapper left out."""
import json
import os
import re

from variants import UserError

LEGACY = b'\x80\x02\x8a\x0al\xfc\x9cF\xf9'              # torch.save before 1.6, or with _use_new_zipfile_serialization=False
WRAPPERS = re.compile(r'(module\.|_orig_mod\.|base_model\.model\.|_fsdp_wrapped_module\.)+')
BARE = re.compile(r'(layers\.\d+|embed_tokens|norm)\.')     # of a LlamaModel that was saved without its head


def kind(path):
    """'gguf', 'torch', 'legacy', 'safetensors' or '' by the first bytes of a file; raises UserError."""
    try:
        with open(path, 'rb') as file:
            head = file.read(16)
        size = os.path.getsize(path)
    except OSError as error:
        raise UserError(f'{path}: {(error.strerror or str(error)).lower()}', 'init_from') from None
    if head.startswith(b'GGUF'):
        return 'gguf'
    if head.startswith(b'PK\x03\x04'):
        return 'torch'
    if head.startswith(LEGACY):
        return 'legacy'
    length = int.from_bytes(head[:8], 'little')
    return 'safetensors' if head[8:9] == b'{' and 2 <= length <= size - 8 else ''


def refuse_legacy(path):
    raise UserError(f"{path} is in torch.save's old format, which is not read; where you trust it, write it anew: "
                    "torch.save(torch.load('OLD.pt', map_location='cpu', weights_only=True), 'ckpt.pt')", 'init_from')


def plain_names(tensors, where):
    """The tensors by the names of the model itself: prefixes of DDP, FSDP, torch.compile and peft are dropped.

    Raises UserError for an adapter beside its weights, and for two tensors that come to have one name.
    """
    if any('.lora_' in name or '.base_layer.' in name for name in tensors):
        raise UserError(f"{where} holds an adapter beside the weights; merge them first: peft's "
                        'model.merge_and_unload().save_pretrained(NEW_FOLDER)', 'init_from')
    found = {}
    for name, tensor in tensors.items():
        short = WRAPPERS.sub('', name, count=1) if WRAPPERS.match(name) else name
        short = f'model.{short}' if BARE.match(short) else short
        if short in found:
            raise UserError(f'{where} holds {short} twice, under two prefixes', 'init_from')
        found[short] = tensor
    return found


def read_json(path):
    try:
        with open(path, encoding='utf-8') as file:
            value = json.load(file)
        if not isinstance(value, dict):
            raise ValueError('it is no object')
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{path}: not readable as JSON: {error}', 'init_from') from None
    return value
