"""A tiny data set and a tiny run for the tests of training: seconds, not minutes."""
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS = 'the cat and a dog sat on my old mat while rain fell down from grey skies over town'.split()

# dropout is on, so that a resumed run that lost its random numbers shows
SMALL = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=4', '--dropout=0.1',
         '--gradient_accumulation_steps=2', '--max_iters=12', '--eval_interval=6', '--eval_iters=2',
         '--learning_rate=1e-2', '--warmup_iters=2', '--lr_decay_iters=12', '--min_lr=1e-3', '--device=cpu',
         '--linear=h.*.mlp.*=kron(8, 8, terms=2); h.1.attn.c_v=lowrank(4)']


def make_data(folder):
    """A data_dir with the data set `tiny`: 6,000 characters of random words."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / 'tiny.txt'
    text.write_text(' '.join(rng.choice(WORDS) for _ in range(1500)))
    subprocess.run([sys.executable, ROOT / 'data/shakespeare_char/prepare.py', f'--input={text}',
                    f'--out={folder / "tiny"}'], check=True, capture_output=True)
    return folder


def arguments(data, out, *more):
    return [f'--data_dir={data}', '--dataset=tiny', f'--out_dir={out}', *SMALL, *more]
