"""config/train_gpt.py with long sequences: a sliding window that grows, documents kept apart, through FlexAttention.

Launch: torchrun --standalone --nproc_per_node=8 train.py config/train_gpt_windows.py
Data: python data/fineweb/prepare.py --tokens=2B
Hardware: GPUs of 80 GB (FlexAttention has no backward pass on a CPU, where a masked SDPA stands in)
Time: not run yet
Result: not run yet
"""
out_dir = 'out/train_gpt_windows'
dataset = 'fineweb'

n_layer = 12
n_head = 6
n_embd = 768
block_size = 4096
norm = 'rmsnorm'
rope = True
rope_base = 1024.0
rope_half = True
qk_norm = 'standard'
attention_scale = 0.12
attention = "window(1728, schedule='linear', long=(0, 4, 8, 11), documents=50256)"
mlp = 'relu2'
value_residual = True
zero_init = True
hidden_gain = 0.33
embed_norm = True
embed_std = 1.0
tie_weights = False
head_std = 0.0
softcap = 15.0

optimizer = 'muon'
muon_lr = 0.025
muon_weight_decay = 0.05
muon_momentum_warmup = 0
muon_coefficients = 'convergent'
muon_steps = 12
learning_rate = 0.015                # of norms and other vectors
embedding_lr = 0.7
head_lr = 0.004
min_lr = 0.0
beta1 = 0.8
beta2 = 0.95
adam_eps = 1e-10
weight_decay = 0.001
grad_clip = 0.0
lr_schedule = 'wsd'
cooldown = 0.7
warmup_iters = 0
loss_chunk = 16384

# 16 * 4096 * 8 = 524,288 tokens per step
batch_size = 16
gradient_accumulation_steps = 8
max_iters = 3250
lr_decay_iters = 3250

target_val_loss = 3.28
eval_interval = 125
eval_first = False
eval_iters = 160                     # 10,485,760 tokens
log_interval = 10
skip_zscore = 5.0
