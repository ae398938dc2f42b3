"""A small GPT on the bytes of enwik8, the published task: 90M bytes for training, 5M for validation, 5M for the test.

Bits per character are loss / ln 2, as every byte is one token. The GPT-2 block with rotary positions, 3.2M parameters.
The time is enough for 2.5M of the 90M bytes, so the figures are far from the published ones, of long trainings.

Launch: bash run.sh config/train_enwik8.py       (downloads 36 MB once, see data/enwik8/prepare.py)
        torchrun --standalone --nproc_per_node=2 train.py config/train_enwik8.py
Hardware: one CPU core; the same file runs on a GPU, where --max_iters and --lr_decay_iters may be raised
Time: about 14 minutes
Result: 1.747 nats, 2.520 bits per character, on the fixed validation batches (records/2026-11-21_enwik8)
"""
out_dir = 'out/enwik8'
dataset = 'enwik8'

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
rope = True
dropout = 0.0

batch_size = 4
gradient_accumulation_steps = 1
learning_rate = 2e-3
min_lr = 2e-4
beta2 = 0.99
warmup_iters = 100
max_iters = 2400
lr_decay_iters = 2400

eval_interval = 600
eval_iters = 80                     # fixed batches: 82,000 bytes
log_interval = 10
