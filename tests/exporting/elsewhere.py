"""Run by tests in a process that cannot import this repository: load exported folders with transformers, and answer in JSON.

    python -I elsewhere.py FOLDER ...       each with asked.pt: {'idx': tokens, 'logits': ..., 'prompt': ..., 'text': ...}
"""
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)


def answer(folder):
    """[relative distance of the logits, whether greedy tokens by the cache are the same, what the loader missed]."""
    asked = torch.load(folder / 'asked.pt', weights_only=True)
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True,
                                                         dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(asked['idx']).logits
    kept = asked['logits'].size(-1)
    distance = (logits[..., :kept] - asked['logits']).abs().max() / asked['logits'].abs().max()
    prompt, count = asked['prompt'], asked['text'].size(1) - asked['prompt'].size(1)
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False,
                          pad_token_id=0, eos_token_id=None) if count else asked['text']
    odd = sorted(str(name) for found in report.values() for name in found)
    return [distance.item(), torch.equal(text, asked['text']), odd]


def main(folders):
    for name in ('variants', 'model', 'layers', 'exporting'):
        try:
            __import__(name)
        except ImportError:
            continue
        raise SystemExit(f'{name} can be imported here, so that nothing is shown')
    print(json.dumps({name: answer(Path(name)) for name in folders}))


if __name__ == '__main__':
    main(sys.argv[1:])
