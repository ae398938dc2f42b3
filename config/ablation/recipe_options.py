"""The options of config/train_gpt.py, each alone over the laptop recipe: what does one line of it change at a small size?

Launch: python ablate.py config/ablation/recipe_options.py --jobs=2
Then:   python ablate.py report out/recipe_options
Data: python data/shakespeare_char/prepare.py
Hardware: 2 CPU cores
Time: 17 minutes: 91 runs of about 20 seconds of one core each
Result: no option is below the recipe with an interval that leaves out 0; hidden_gain=0.33 is 0.028 above it, at half of
its rate: records/2026-11-29_recipe_options

Every option has the best of five values of muon_lr on its first seed. 290 steps of a small model say little about 3,250 of
GPT-2's size: a row here is no claim about the speed run.
"""
base = 'config/train_shakespeare_char_fast.py'
baseline = 'recipe'

variants = {
    'recipe': {},
    'RMSNorm after the embedding': {'embed_norm': True},
    'the same, embeddings of standard deviation 1': {'embed_norm': True, 'embed_std': 1.0, 'embedding_lr': 0.7},
    'attention scale 0.12': {'attention_scale': 0.12},
    'RoPE on half of the pairs': {'rope_half': True, 'rope_base': 1024.0},
    'head at a quarter of the rate': {'head_lr': 0.004},
    'adam_eps 1e-10': {'adam_eps': 1e-10},
    'cool-down 0.7': {'cooldown': 0.7},
    'decay 0.05': {'muon_weight_decay': 0.05},
    'residual branches at 0.33': {'hidden_gain': 0.33},
    'twelve convergent steps': {'muon_coefficients': 'convergent', 'muon_steps': 12},
    'NorMuon': {'muon_row_beta': 0.95},
    'EMA-Nesterov': {'look_ahead': 0.6, 'look_ahead_from': 30, 'look_ahead_until': 230},
}
tasks = {
    'shakespeare_char': {'target_val_loss': 0.0},
}
search = {'muon_lr': [6e-3, 1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2]}
seeds = 3
