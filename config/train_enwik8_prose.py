"""A small GPT on the articles of enwik8 without markup, in byte pairs: a stand-in for wikitext-103.

The tokenizer is the first 4,095 tokens of GPT-2 and <|endoftext|> (data/enwik8_prose_4096), so that the embedding does not
outweigh the rest: 4.2M parameters. `--dataset=enwik8_prose` takes all 50,257, for a GPU.

Launch: bash run.sh config/train_enwik8_prose.py         (downloads 36 MB once, see data/enwik8/prepare.py)
        torchrun --standalone --nproc_per_node=2 train.py config/train_enwik8_prose.py
Hardware: one CPU core; the same file runs on a GPU, where --max_iters and --lr_decay_iters may be raised
Time: about 14 minutes
Result: 4.564 nats per token on the fixed validation batches (records/2026-11-21_enwik8)
"""
out_dir = 'out/enwik8_prose'
dataset = 'enwik8_prose_4096'

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
max_iters = 2000
lr_decay_iters = 2000

eval_interval = 500
eval_iters = 80                     # fixed batches: 82,000 tokens
log_interval = 10
