"""GPT-2 124M with its MLPs as Kronecker products, started from OpenAI's weights by Van Loan.

It has 82,008,672 parameters, 81,972,576 without the 47 rows that pad the vocabulary to a multiple of 64, which GPUs like.
Every c_fc is the Kronecker product of A (768 x 768) and B (4 x 1), every c_proj its mirror image: a quarter of the MLP's
parameters and of its FLOPs. The factors start as the nearest Kronecker product of the pretrained matrix with its norm
restored, and train with everything else on OpenWebText (Krony-PT, arXiv 2412.12351, reaches wikitext103 perplexity 42.7 at
this size).

Launch: torchrun --standalone --nproc_per_node=8 train.py config/gpt2_kron_mlp.py
Data: OpenWebText (python data/openwebtext/prepare.py) and GPT-2's weights from the Hugging Face hub
Hardware: 4 to 8 A100 80GB, 122,880 tokens per step
Time: about a day on 8, an estimate
Result: no record
"""
out_dir = 'out/gpt2_kron_mlp'
wandb_project = 'nanokron'
wandb_run_name = 'gpt2-kron-mlp'

dataset = 'openwebtext'
init_from = 'gpt2'
decompose = 'van_loan_normalised'

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304                  # GPT-2's 50257, padded
bias = True
mlp = "gelu(approximate='tanh')"
linear = {
    'h.*.mlp.c_fc': 'kron(768, 768)',
    'h.*.mlp.c_proj': 'kron(768, 768)',
}
kron_plan = 'measure'               # a minute or two of timing before the first step; kept on resume

batch_size = 15
gradient_accumulation_steps = 8     # of the whole job: 1 a GPU on 8 GPUs, 2 on 4
learning_rate = 6e-5
min_lr = 6e-6
warmup_iters = 500
max_iters = 75000
lr_decay_iters = 75000

eval_interval = 1000
eval_iters = 200
log_interval = 10
