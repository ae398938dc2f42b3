"""config/train_shakespeare_char_fast.py for as long as nanoGPT's CPU recipe takes: longer windows, larger batches.

Launch: bash run.sh config/train_shakespeare_char_best.py
Hardware: one CPU core
Time: about 2.3 minutes
Result: 1.518 nats per character, median of 3 seeds (records/2026-11-21_recipe)

In the race: python bench.py recipe --full_config=config/train_shakespeare_char_best.py ..., which sets max_iters by time.
"""
out_dir = 'out/train_shakespeare_char_best'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 2
n_embd = 128
block_size = 256
norm = 'rmsnorm'
rope = True
qk_norm = 'standard'
mlp = 'relu2'
value_residual = True
zero_init = True
tie_weights = False
softcap = 15.0
dtype = 'bfloat16'                   # autocast, as muon_dtype: on CPUs with bf16 instructions

optimizer = 'muon'
muon_lr = 0.015
muon_dtype = 'bfloat16'              # on CPUs with bf16 instructions; 'float32' elsewhere
muon_momentum_warmup = 50
learning_rate = 1e-2
min_lr = 0.0
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
lr_schedule = 'wsd'
cooldown = 0.8
warmup_iters = 0

batch_size = 4
gradient_accumulation_steps = 1
max_iters = 1600                     # 1,638,400 tokens
lr_decay_iters = 1600

eval_interval = 1600
eval_first = False
eval_iters = 0
log_interval = 10
