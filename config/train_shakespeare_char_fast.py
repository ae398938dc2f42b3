"""The modern recipe on a laptop: what nanoGPT's CPU recipe reaches, in a fraction of its tokens and time.

Launch: bash run.sh config/train_shakespeare_char_fast.py
Hardware: one CPU core
Time: about 14 seconds (148,480 tokens)
Result: 1.873 nats per character, median of 3 seeds (records/2026-11-29_recipe has the race against nanoGPT)

The classic recipe takes 1.5 million tokens to 1.90 nats per character.
"""
out_dir = 'out/train_shakespeare_char_fast'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 2                           # heads of 64: better than 4 of 32
n_embd = 128
block_size = 128                     # longer than the parent's 64: fewer characters lack their context
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
muon_lr = 0.024
muon_momentum = 0.9
muon_coefficients = 'polar_express'
muon_steps = 4                       # as good as five here, and cheaper
muon_dtype = 'bfloat16'              # on CPUs with bf16 instructions; 'float32' elsewhere
muon_momentum_warmup = 50
learning_rate = 1.7e-2
min_lr = 0.0
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
lr_schedule = 'wsd'
cooldown = 1.0
warmup_iters = 0

batch_size = 4
gradient_accumulation_steps = 1
max_iters = 290                      # 148,480 tokens
lr_decay_iters = 290

eval_interval = 290
eval_first = False
eval_iters = 0
log_interval = 10
