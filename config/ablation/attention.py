"""Attention classes and blocks at equal parameters and equal tokens, by characters and by byte pairs.

Launch: python ablate.py config/ablation/attention.py --jobs=2
        python ablate.py report out/attention
Data: data/shakespeare_char and data/enwik8_prose_4096 (python data/NAME/prepare.py)
Hardware: 2 CPU cores
Time: 1.5 to 3 hours: about 200 runs of about a minute of one core each
Result: records/2026-11-21_attention

These are small models and short runs, so compare differences over seeds, not absolute losses.
"""
base = 'config/attention/causal.py'
baseline = 'llama'

# the hidden width of SwiGLU makes up for what an attention class has more or fewer
variants = {
    'llama': {},
    'gpt2': {'rope': False, 'norm': 'layernorm', 'mlp': 'gelu'},
    'window': {'attention': 'window(32)'},
    'linformer': {'attention': 'linformer(4, chunk=32)'},
    'mla': {'attention': 'mla(64, qk_rope_head_dim=16)', 'mlp': 'swiglu(338)'},
    'diff': {'attention': 'diff(version=1)'},
    'diff 2': {'attention': 'diff(version=2)', 'mlp': 'swiglu(300)'},
    'dint': {'attention': 'dint(version=1)'},
    'dint 2': {'attention': 'dint(version=2)'},
    'dint published (leaks)': {'attention': "dint(version='published')", 'allow_leak': True},
    'ngpt full': {'ngpt': 'full', 'ngpt_sz_init': 10.0, 'tie_weights': False, 'weight_decay': 0.0, 'warmup_iters': 0},
    'ngpt simple': {'ngpt': 'simple', 'ngpt_sz_init': 10.0, 'tie_weights': False, 'weight_decay': 0.0, 'warmup_iters': 0},
    'ngpt dint': {'ngpt': 'simple', 'ngpt_sz_init': 10.0, 'tie_weights': False, 'weight_decay': 0.0, 'warmup_iters': 0,
                  'attention': 'dint(version=1)'},
    'untied': {'tie_weights': False},
    'orthograd': {'orthograd': True},
    'stablemax': {'loss': 'stablemax'},
    'latent 31%': {'mlp': 'latent(32)'},
    'latent equal': {'mlp': 'latent(64, hidden=600)'},
    'mla diff': {'attention': 'mla_diff(48, qk_nope_head_dim=32, qk_rope_head_dim=16)'},
    'mla dint': {'attention': 'mla_dint(48, qk_nope_head_dim=32, qk_rope_head_dim=16)'},
    'ngpt mla dint': {'attention': 'mla_dint(48, qk_nope_head_dim=32, qk_rope_head_dim=16)', 'ngpt': 'simple',
                      'ngpt_sz_init': 10.0, 'tie_weights': False, 'weight_decay': 0.0, 'warmup_iters': 0},
}
only = {'stablemax': ['shakespeare_char'], 'dint published (leaks)': ['shakespeare_char'],      # the rest runs on both
        'ngpt dint': ['shakespeare_char'], 'dint 2': ['shakespeare_char'], 'ngpt mla dint': ['shakespeare_char']}
tasks = {
    'shakespeare_char': {'dataset': 'shakespeare_char', 'max_iters': 500, 'lr_decay_iters': 500, 'eval_interval': 500,
                         'eval_first': False, 'warmup_iters': 50, 'min_lr': 1e-4},
    'enwik8_prose': {'dataset': 'enwik8_prose_4096', 'max_iters': 300, 'lr_decay_iters': 300, 'eval_interval': 300,
                     'eval_first': False, 'warmup_iters': 50, 'min_lr': 1e-4, 'eval_iters': 100},
}
search = {'learning_rate': [1e-3, 3e-3, 1e-2]}
seeds = 3
