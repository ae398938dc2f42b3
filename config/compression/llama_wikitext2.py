"""The protocol of the field, for a model of your own: wikitext-2 perplexity with 80, 60 and 40% of all block parameters.

Launch: python compress.py config/compression/llama_wikitext2.py --source=FOLDER_OR_GGUF
        python compress.py report out/compression_llama_wikitext2
Hardware: one GPU of 24 GB for 7B in 16 bits, by the plan that --dry_run=True prints; a CPU for small models
Time: not measured on a GPU
Result: not run at 7B yet; the report has the published figures beside one's own

For any Llama, Mistral, Qwen2 or GPT-2 as in docs/pretrained.md. The data set is wikitext-2 in the model's own tokens:
    python data/wikitext/prepare.py --tokenizer=FOLDER_OR_GGUF --out=data/wikitext2
Test: the joined test split in windows of 2,048 tokens, the first of each not predicted. Calibration: 256 windows of the
training split, gradients on 64 of them. Selection: the validation split. docs/compression.md says how this compares.
"""
title = 'wikitext-2 at 80%, 60% and 40% of the block parameters'
dataset = 'wikitext2'
prepare = 'python data/wikitext/prepare.py --tokenizer=SOURCE --out=FOLDER'
block_size = 2048
sites = 'h.*'
select = 'val'
test = 'test'
score = 'inside'
calibration_tokens = 256 * 2048
gradient_tokens = 64 * 2048
weights = 'bfloat16'
published = 'wikitext2'
budgets = {'80%': 0.8, '60%': 0.6, '40%': 0.4}

_low = {'h.*': 'lowrank'}
_pivot = {'h.*': 'pivot'}

variants = {
    # of LowRankArena and LEMS, with equal shares of every matrix
    'svd': {'linear': _low, 'decompose': 'svd'},
    'SVD-LLM: svd_whitened': {'linear': _low, 'decompose': 'svd_whitened'},
    'KFAC-SVD: svd_hessian': {'linear': _low, 'decompose': 'svd_whitened_hessian'},
    # ranks by the curvature of the loss, and the pivot form of low rank
    'curvature: svd_hessian': {'linear': _low, 'decompose': 'svd_whitened_hessian', 'sizes': 'curvature'},
    'pivot curvature: svd_hessian': {'linear': _pivot, 'decompose': 'svd_whitened_hessian', 'sizes': 'curvature'},
    # fewer hidden neurons and groups of heads: a dense model
    'neurons and heads': {'narrow': 'mlp, heads', 'decompose': 'neurons', 'sizes': 'curvature'},
    'neurons and heads + pivot': {'narrow': 'mlp, heads', 'linear': _pivot, 'sizes': 'curvature',
                                  'decompose': 'neurons, svd_whitened_hessian'},
}
