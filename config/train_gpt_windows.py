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
qk_norm = 'standard'
attention = "window(1728, schedule='linear', long=(0, 4, 8, 11), documents=50256)"
mlp = 'relu2'
value_residual = True
zero_init = True
tie_weights = False
softcap = 15.0

optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3
min_lr = 1.5e-4
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
grad_clip = 0.0
lr_schedule = 'wsd'
cooldown = 0.45
warmup_iters = 0
loss_chunk = 16384

# 16 * 4096 * 8 = 524,288 tokens per step
batch_size = 16
gradient_accumulation_steps = 8
max_iters = 3000
lr_decay_iters = 3000

target_val_loss = 3.28
eval_interval = 125
eval_first = False
eval_iters = 160                     # 10,485,760 tokens
log_interval = 10
skip_zscore = 5.0
