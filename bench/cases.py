"""The models that part check compares, and the allowed difference of compiled and eager results."""
LIMIT = {'float32': 0.01, 'float16': 0.1, 'bfloat16': 0.2}
RANKED = ('train_gpt', 'windows', 'kron')       # cases that are trained under DDP too
STEPS = 4                                       # Muon steps there
DDP_LIMIT = 0.01                                # relative difference allowed between losses


def cases(s):
    """{name: (precision, settings of GPTConfig)} at the sizes of s, the most important first."""
    C, T = s.n_embd, s.block_size
    recipe = dict(norm='rmsnorm', rope=True, qk_norm='standard', mlp='relu2', value_residual=True, tie_weights=False,
                  softcap=15.0, loss_chunk=s.batch_size * T // 4)
    window = f"{3 * T // 4}, schedule='linear', long=(0,)" if T >= 256 else f'{3 * T // 8}'     # schedules move by 128
    half = {
        'kron': dict(linear={'h.*.mlp.*': f'kron({C}, {C})'}),          # right factors of one column and of one row
        'train_gpt': recipe,
        'windows': dict(recipe, attention=f'window({window}, documents=3)'),
        'mla': dict(rope=True, attention=f'mla({C // 4}, q_lora_rank={3 * C // 8}, qk_nope_head_dim={C // 4}, '
                    f'qk_rope_head_dim={C // 8})'),
        'linformer': dict(rope=True, attention=f'linformer({min(16, T // 8)}, chunk={T // 4})'),
        'dint': dict(rope=True, attention='dint(version=1)'),
        'kron_moe': dict(mlp='kron_moe(4)'),
        'kron recomputed': dict(linear={'h.*.mlp.*': f'kron({C}, {C})'}, recompute=True),
        'windows recomputed': dict(recipe, attention=f'window({window}, documents=3)', recompute=True),
        'lowrank': dict(linear={'h.*.mlp.*': f'lowrank({C // 8}) + kron({C // 2}, {C // 2})', '*': f'lowrank({C // 8})'}),
    }
    found = {name: ('bfloat16', settings) for name, settings in half.items()}
    for kind in ('float16', 'float32'):
        found |= {f'{name} {kind}': (kind, half[name]) for name in ('kron', 'train_gpt')}
    return found
