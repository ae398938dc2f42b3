"""config/kron_mlp.py on the modern block, by Muon: Kronecker MLPs with the recipe of config/train_shakespeare_char_fast.py.

Launch: bash run.sh config/kron_mlp_fast.py
Hardware: one CPU core
Time: about 20 seconds (153,600 tokens)
Result: 1.939 +- 0.005 nats per character, 3 seeds; with dense MLPs 1.872 +- 0.004

--max_iters=1600 --lr_decay_iters=1600 goes on for two minutes.
"""
out_dir = 'out/kron_mlp_fast'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 2
n_embd = 128
block_size = 128
norm = 'rmsnorm'
rope = True
qk_norm = 'standard'
mlp = 'relu2'
linear = {
    'h.*.mlp.c_fc': 'kron(256, 64)',
    'h.*.mlp.c_proj': 'kron(64, 256)',
}
value_residual = True
zero_init = True
tie_weights = False
softcap = 15.0
dtype = 'bfloat16'                   # autocast, as muon_dtype: on CPUs with bf16 instructions

optimizer = 'muon'
muon_lr = 0.024
muon_momentum = 0.9
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
max_iters = 300                      # 153,600 tokens
lr_decay_iters = 300

eval_interval = 300
eval_first = False
eval_iters = 0
log_interval = 10
