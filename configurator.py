"""Configuration: every setting of a run, its default, and the reader of --key=value; configfile.py reads files.

Nothing is ever run. Imports no torch, so that a mistake is said at once.
`python configurator.py [--get=KEY] config/X.py [--key=value]` checks a configuration alone.
"""
import ast
import dataclasses
import math
import os
import sys
import typing
from dataclasses import dataclass, field

import variants
from configfile import at_home, number, read_file
from optimizers import schedules
from variants import UserError, did_you_mean


def key(default, doc, low=None, choices=None):
    """A dataclass field with its documentation, lowest allowed value and allowed choices."""
    metadata = {'doc': doc, 'low': low, 'choices': choices}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class GPTConfig:
    """What the model is: all that a checkpoint needs to rebuild it."""
    block_size: int = key(1024, 'context length, tokens', low=1)
    vocab_size: int = key(50304, "rows of the embedding; train.py takes the data set's (GPT-2's 50257 padded to 50304)",
                          low=1)
    n_layer: int = key(12, 'number of blocks', low=1)
    n_head: int = key(12, 'attention heads per block; must divide n_embd', low=1)
    n_embd: int = key(768, 'width of the residual stream', low=1)
    dropout: float = key(0.0, 'probability of zeroing an activation, 0 <= p < 1', low=0)
    bias: bool = key(False, 'biases in linears and norms (GPT-2 has them)')
    tie_weights: bool = key(True, 'the head shares the weight of the token embedding')
    n_kv_head: int | None = key(None, 'key and value heads (grouped queries); None = n_head; must divide it', low=1)
    norm: str = key('layernorm', 'norm of the residual stream', choices=('layernorm', 'rmsnorm'))
    norm_eps: float = key(1e-5, 'added to the variance in norms', low=0)
    rope: bool = key(False, 'rotary positions instead of a position table')
    rope_base: float = key(10000.0, 'base of the rotary wave lengths', low=1)
    qk_norm: str = key('none', "RMS norm of queries and keys; 'split' norms each map of diff and dint alone",
                       choices=('none', 'standard', 'split'))
    value_residual: bool = key(False, "mix block 0's values into every block's, by a learned share")
    softcap: float = key(0.0, 'bound the logits by softcap * tanh(logits / softcap); 0 = off', low=0)
    loss: str = key('cross_entropy', 'loss function; stablemax is for vocabularies of some hundred tokens',
                    choices=('cross_entropy', 'stablemax'))
    zero_init: bool = key(False, 'branches start at 0: c_proj (one factor of it, where it is a product)')
    loss_chunk: int = key(0, 'tokens whose logits exist at a time while training; 0 = all', low=0)
    recompute: bool = key(False, 'keep only the inputs of blocks for the backward pass, and compute the rest again')
    residual: str = key('float32', "the residual stream under bf16 autocast: 'bfloat16' halves its traffic, fp32 is finer",
                        choices=('float32', 'bfloat16'))
    ngpt: str = key('none', 'normalised GPT: unit vectors everywhere, weights normalised after every step',
                    choices=('none', 'simple', 'full'))
    ngpt_sz_init: float = key(1.0, "nGPT's first logit scale; about 10 lets short runs move", low=0)
    linear: dict | str = key({}, 'which linear stands where: {site pattern: spec}, first match wins, else dense')
    attention: dict | str = key('causal', 'attention class: a spec, or {block pattern: spec}')
    mlp: dict | str = key('gelu', "MLP class: a spec, or {block pattern: spec}; GPT-2's weights want "
                          "\"gelu(approximate='tanh')\"")


@dataclass
class Config(GPTConfig):
    """The whole run. The names, meanings and defaults of nanoGPT's train.py, and ours."""
    out_dir: str = key('out', 'folder for checkpoints, logs and plots')
    eval_interval: int = key(2000, 'steps between evaluations', low=1)
    log_interval: int = key(1, 'steps between lines of log.jsonl', low=1)
    eval_iters: int = key(200, 'random batches an evaluation; 0 = the whole validation split in order', low=0)
    target_val_loss: float = key(0.0, 'stop at an evaluation that reaches it; 0 = never', low=0)
    eval_first: bool = key(True, 'evaluate before the first step too')
    eval_only: bool = key(False, 'evaluate once and stop')
    always_save_checkpoint: bool = key(True, 'save after every evaluation, not only after a better one')
    init_from: str = key('scratch', "'scratch', 'resume', 'gpt2*', a .gguf, or a folder: ours, nanoGPT's, Hugging Face's")
    wandb_log: bool = key(False, 'log to Weights & Biases')
    wandb_project: str = key('owt', 'project name there')
    wandb_run_name: str = key('gpt2', 'run name there')
    dataset: str = key('openwebtext', 'folder below data_dir with train.bin and val.bin')
    gradient_accumulation_steps: int = key(5 * 8, 'micro-steps per step, counted over the whole job', low=1)
    batch_size: int = key(12, 'sequences per micro-step', low=1)
    learning_rate: float = key(6e-4, 'peak learning rate', low=0)
    max_iters: int = key(600000, 'steps in all', low=0)
    weight_decay: float = key(1e-1, 'AdamW decay of matrices, factors and embeddings', low=0)
    beta1: float = key(0.9, 'AdamW first moment', low=0)
    beta2: float = key(0.95, 'AdamW second moment', low=0)
    optimizer: str = key('adamw', "'muon': Muon for matrices and factors (docs/muon.md), AdamW for the rest",
                         choices=('adamw', 'muon'))
    muon_lr: float = key(0.02, "Muon's peak learning rate; it follows the schedule of learning_rate", low=0)
    muon_momentum: float = key(0.95, "Muon's momentum", low=0)
    muon_momentum_warmup: int = key(300, 'steps in which it rises from 0.85', low=0)
    muon_weight_decay: float = key(0.0, "Muon's decoupled weight decay", low=0)
    muon_cautious: bool = key(False, 'decay only where update and weight have the same sign')
    muon_adjust_lr: str = key('original', "scale of an update by its shape; 'match_rms' makes AdamW's learning rates fit",
                              choices=('original', 'match_rms'))
    muon_coefficients: str = key('quintic', 'polynomials of the iteration', choices=('quintic', 'polar_express'))
    muon_steps: int = key(5, 'steps of the iteration, the first ones of its polynomials', choices=(1, 2, 3, 4, 5))
    muon_dtype: str = key('auto', "type that the iteration runs in; 'auto' = bfloat16 on a GPU, float32 elsewhere",
                          choices=('auto', 'float32', 'bfloat16'))
    orthograd: bool = key(False, 'make gradients of matrices orthogonal to the weights, norms kept')
    grad_clip: float = key(1.0, 'largest gradient norm; 0 = no clipping', low=0)
    skip_zscore: float = key(0.0, 'skip steps whose loss or gradient norm lies this many standard deviations above the '
                             'last 128; 0 = none', low=0)
    ema_decay: float = key(0.0, 'evaluate and sample an exponential moving average of the weights; 0 = the weights', low=0)
    decay_lr: bool = key(True, 'warm up, then decay')
    lr_schedule: str = key('cosine', "how it decays; 'wsd' stays at the peak and cools down on a line",
                           choices=('cosine', 'wsd'))
    cooldown: float = key(0.4, "share of lr_decay_iters that wsd's cool-down takes", low=0)
    batch_schedule: dict | str = key({}, 'share of the micro-steps by fraction of the run: {0: 0.25, 0.5: 1}')
    block_schedule: dict | str = key({}, 'share of block_size that sequences have, by fraction of the run')
    warmup_iters: int = key(2000, 'steps of warm-up', low=0)
    lr_decay_iters: int = key(600000, 'step at which min_lr is reached', low=0)
    min_lr: float = key(6e-5, 'lowest learning rate, about learning_rate / 10', low=0)
    backend: str = key('nccl', "torch.distributed backend; 'nccl' becomes 'gloo' without a GPU",
                       choices=('nccl', 'gloo'))
    device: str = key('auto', "'auto' = cuda, else cpu; 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = key('auto', "autocast type; 'auto' = bfloat16 where the GPU has it, float16 on older ones, "
                     'float32 on a CPU', choices=('auto', 'float32', 'bfloat16', 'float16'))
    weights: str = key('float32', 'what weights and gradients are kept in; half precision computes everything in it, '
                       'without autocast', choices=('float32', 'bfloat16', 'float16'))
    master_weights: bool = key(True, 'with half-precision weights: the optimizer keeps them in fp32 too')
    loss_scaling: bool = key(True, 'in float16: multiply the loss, so that small gradients do not round to 0')
    compile: bool | None = key(None, 'torch.compile; default True on a GPU, False elsewhere (it gains little there)')
    kron_plan: str = key('rule', "how Kronecker sums are contracted: by FLOPs, or by timing every way once, on rank 0, into "
                         'kron_plans', choices=('rule', 'measure'))
    kron_plans: dict = key({}, 'what was timed, and is kept on resume: {shape and call: plan}, see docs/kronecker.md')
    deterministic: bool = key(False, 'the same bits every time on a GPU too (on a CPU they are): slower algorithms there')
    parallel: str = key('ddp', "several ranks: 'ddp' copies the model, 'fsdp' shards it (FSDP2)", choices=('ddp', 'fsdp'))
    sharded_checkpoints: bool = key(False, "with parallel='fsdp': every rank saves its own part (docs/distributed.md)")
    prefetch: int | None = key(None, 'micro-batches that a thread makes ahead; None = 2 on a GPU, 0 elsewhere', low=0)
    memory_budget_gb: float = key(0.0, 'lower batch_size, tokens per step unchanged, until a device needs no more; 0 = off',
                                  low=0)
    seed: int = key(1337, 'all randomness of a run follows from it', low=0)
    data_dir: str = key('data', 'folder that holds the data set folders')
    save_interval: int = key(0, 'steps between checkpoints besides those at evaluations; 0 = none', low=0)
    keep_checkpoints: int = key(3, 'newest checkpoints kept, the best one not counted', low=2)
    grow_from: int = key(0, 'blocks at the start of a run that grows to n_layer; 0 = all from the start', low=0)
    grow_every: int = key(0, 'steps between new blocks; 0 = not by steps', low=0)
    grow_on_plateau: bool = key(False, 'a new block when three evaluations gained less than 0.005 nats')
    grow_freeze: bool = key(False, 'blocks before the newest do not train')
    grow_init: str = key('zero', "new blocks: 'zero' branches; 'copy' of the last one with zero branches; 'stack' it whole",
                         choices=('zero', 'copy', 'stack'))
    grow_rewarm: int = key(0, 'steps in which the learning rate comes back after a change of the model', low=0)
    grow_report: int = key(0, 'steps between measurements of the loss on fixed batches in the 50 steps after a block was '
                           'added or every site made dense; 0 = none', low=0)
    finish_dense_at: float = key(0.0, 'fraction of the run at which every structured site becomes dense; 0 = never', low=0)
    finish_dense_state: str = key('reset', "optimizer state of what became dense: none, or an 'estimate' from the factors'",
                                  choices=('reset', 'estimate'))
    rank_budget: float = key(0.0, 'parameters of structured sites over those of dense ones: chooses ranks and terms; 0 = as '
                             'the rules say', low=0)
    rank_allocation: str = key('uniform', "the same fraction everywhere, or by the 'spectrum' of the dense source's weights",
                               choices=('uniform', 'spectrum'))
    self_guided: float = key(0.0, 'fraction of the run in which a dense matrix beside each structured site fades out', low=0)
    factor_lr: str = key('none', "AdamW's learning rate of a factor: as all, or times in_features / its fan-in / factors",
                         choices=('none', 'fan_in'))
    factor_decay: str = key('tensors', "weight_decay acts on each factor, which decays a product that many times, or on the "
                            "'product' once", choices=('tensors', 'product'))
    drop_in: str = key('none', 'matrices that linear names become structured one by one in the course of the run: in depth '
                       "order, the least damage first ('sensitivity', block 0 last), or 'all' at once",
                       choices=('none', 'sequential', 'sensitivity', 'all'))
    drop_in_unit: str = key('site', "what is replaced at a time: one matrix ('site'), or a block's ('layer')",
                            choices=('site', 'layer'))
    drop_in_from: int = key(0, 'step of the first replacement', low=0)
    drop_in_every: int = key(0, 'steps from one replacement to the next', low=0)
    drop_in_freeze: int = key(0, 'steps after a replacement in which nothing else trains', low=0)
    drop_in_rewarm: int = key(0, 'steps in which the learning rate comes back after a replacement', low=0)
    drop_in_report: int = key(0, 'steps between measurements of the loss on fixed batches while matrices are replaced, and '
                              'drop_in.md, .json, .png at the end; 0 = none', low=0)
    decompose: str = key('van_loan', 'how dense weights become structured ones when init_from names a dense model: '
                         'van_loan, van_loan_normalised, prune, als, als_hessian, svd ...; with _sequential or _streamed: '
                         'layer by layer; several with commas: each structure takes the first that it knows')
    calibration_tokens: int = key(65536, 'training tokens on which the inputs of decomposed sites are measured', low=0)
    prune_before: str = key('none', 'zero weights before decomposing: the smallest, or those of least effect on calibration '
                            'text', choices=('none', 'magnitude', 'wanda'))
    prune_fraction: float = key(0.0, 'share of the weights that prune_before zeroes', low=0)
    decompose_report: bool = key(False, "measure each decomposed site's own damage to the validation loss")
    nonfinite: str = key('stop', "a loss or gradient that is not finite: 'stop' (exit 3) or 'skip' the step",
                         choices=('stop', 'skip'))
    tensorboard_log: bool = key(False, 'log to out_dir/tensorboard')
    dist_timeout: int = key(600, 'seconds that ranks wait for one another', low=1)
    allow_leak: bool = key(False, 'train a model whose attention sees the future: for negative controls')
    dry_run: bool = key(False, 'print sites, parameters, FLOPs and memory, and stop')
    debug: bool = key(False, 'tracebacks for mistakes too')
    sources: dict = field(default_factory=dict, repr=False, compare=False)   # key -> where it was set


def settings(cls):
    """{key: dataclass field} of the keys a user may set."""
    return {f.name: f for f in dataclasses.fields(cls) if 'doc' in f.metadata}


def as_dict(config):
    """The settings as plain values, as config.json and checkpoints hold them."""
    return {name: getattr(config, name) for name in settings(type(config))}


def model_config(config):
    """The GPTConfig part of a Config (or of a dict of settings that a checkpoint holds)."""
    values = config if isinstance(config, dict) else as_dict(config)
    return GPTConfig(**{name: values[name] for name in settings(GPTConfig) if name in values})


# ----------------------------------------------------------------------------------------------------
# reading arguments

def read_argument(argument, fields):
    """[(key, value, where)] of one --key=value; split at the first '='."""
    name, equals, text = argument.lstrip('-').partition('=')
    where = argument[:120]
    if argument in ('--help', '-h'):
        return [('help', True, where)]
    if not equals or not argument.startswith('--'):
        raise UserError(f'{where}: write --{name}=VALUE')
    value = text
    if name in fields and str not in types_of(fields[name]):    # a text setting is taken as it stands
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            pass
    elif name in fields and dict in types_of(fields[name]):
        try:
            value = variants.parse_rules(text)
        except UserError as error:
            raise UserError(f'{where}: {error}') from None
    return [(name, value, where)]


# ----------------------------------------------------------------------------------------------------
# checking

def types_of(setting):
    return typing.get_args(setting.type) or (setting.type,)


def coerce(setting, value):
    """The value in the setting's type (an int becomes a float); raises UserError naming value and remedy."""
    types = types_of(setting)
    if float in types and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) not in types:
        words = ' or '.join({bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a text',
                             dict: 'a dict of rules'}.get(t, 'None') for t in types)
        hint = ' without quotes' if isinstance(value, str) and str not in types else ''
        raise UserError(f'{setting.name} takes {words}{hint}, got {value!r}')
    low, choices = setting.metadata['low'], setting.metadata['choices']
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'{setting.name} must be finite, got {value!r}')
    if low is not None and value is not None and value < low:
        raise UserError(f'{setting.name} must be at least {low}, got {value!r}')
    if number(value) and abs(value) > 1e15:
        raise UserError(f'{setting.name} is too large: {value!r}')
    if choices and value not in choices:
        raise UserError(f'{setting.name} must be one of {", ".join(choices)}, got {value!r}'
                        f'{did_you_mean(value, choices)}')
    return value


def check_rules(config, name, table):
    rules = getattr(config, name)
    if not all(isinstance(part, str) for pair in variants.as_rules(rules).items() for part in pair):
        raise UserError(f'{name} takes texts only, {{pattern: spec}}, got {rules!r}')
    try:
        variants.check_rules(rules, table)
    except UserError as error:
        raise UserError(f'{name}: {error}') from None


def check(config):
    """The rules that need several settings at once: yields (key, sentence)."""
    if config.n_embd % config.n_head:
        yield 'n_head', f'n_head must divide n_embd ({config.n_embd}), got {config.n_head}'
    heads = config.n_kv_head or config.n_head
    if config.n_head % heads:
        yield 'n_kv_head', f'n_kv_head must divide n_head ({config.n_head}), got {heads}'
    if config.rope and config.n_embd // config.n_head % 2:
        yield 'rope', f'rope needs an even head size, got {config.n_embd // config.n_head}'
    if config.ngpt != 'none':
        yield from check_ngpt(config)
    if config.loss_chunk and config.loss != 'cross_entropy':
        yield 'loss_chunk', f"loss_chunk is for loss='cross_entropy', got {config.loss!r}; set loss_chunk=0"
    if config.dropout >= 1:
        yield 'dropout', f'dropout must be below 1, got {config.dropout}'
    for name, table in (('linear', variants.LINEARS), ('attention', variants.ATTENTIONS), ('mlp', variants.MLPS)):
        try:
            check_rules(config, name, table)
        except UserError as error:
            yield name, str(error)
    if isinstance(config, Config):
        yield from check_run(config)


def check_ngpt(config):
    """nGPT has no norms, no biases and its own scales: what would contradict that."""
    for name, allowed in (('bias', False), ('qk_norm', 'none'), ('softcap', 0.0), ('zero_init', False)):
        if getattr(config, name) != allowed:
            yield name, f'{name}={getattr(config, name)!r} contradicts ngpt, which has its own; set {name}={allowed!r}'
    if config.n_kv_head not in (None, config.n_head):
        yield 'n_kv_head', 'ngpt scales queries and keys by one table of n_head rows; leave n_kv_head=None'


def check_run(config):
    if not config.prune_fraction < 1 or (config.prune_before == 'none') != (config.prune_fraction == 0):
        yield 'prune_fraction', ('prune_fraction must be above 0 and below 1 with prune_before, and 0 without, got '
                                 f'{config.prune_fraction} with prune_before={config.prune_before!r}')
    if config.rank_budget >= 1:
        yield 'rank_budget', f'rank_budget must be below 1, got {config.rank_budget}'
    if config.rank_budget and config.rank_allocation == 'spectrum' and config.init_from == 'scratch':
        yield 'rank_allocation', ("rank_allocation='spectrum' reads the spectra of trained weights, and "
                                  "init_from='scratch' has none; take rank_allocation='uniform'")
    if config.self_guided >= 1:
        yield 'self_guided', f'self_guided must be below 1, got {config.self_guided}'
    rivals = {'grow_from': config.grow_from, 'ngpt': config.ngpt != 'none', 'drop_in': config.drop_in != 'none'}
    if config.self_guided and any(rivals.values()):
        yield 'self_guided', f'self_guided does not go with {next(n for n, on in rivals.items() if on)}; drop one of them'
    if 0 < config.finish_dense_at <= config.self_guided:
        yield 'finish_dense_at', (f'finish_dense_at must be after self_guided ({config.self_guided}), got '
                                  f'{config.finish_dense_at}')
    if config.optimizer == 'muon' and (config.factor_lr != 'none' or config.factor_decay != 'tensors'):
        yield 'optimizer', "factor_lr and factor_decay are AdamW's, and optimizer='muon' takes the factors; drop them"
    for name in ('batch_schedule', 'block_schedule'):
        try:
            schedules.stages(name, getattr(config, name))
            schedules.block_size(0, config)
        except UserError as error:
            yield name, str(error)
    if config.grow_from > config.n_layer:
        yield 'grow_from', f'grow_from must not exceed n_layer ({config.n_layer}), got {config.grow_from}'
    if config.grow_from and config.grow_from < config.n_layer and not (config.grow_every or config.grow_on_plateau):
        yield 'grow_from', 'grow_from needs grow_every=STEPS or grow_on_plateau=True, or no block is ever added'
    if config.grow_from and config.init_from not in ('scratch', 'resume'):
        yield 'grow_from', f"grow_from grows a model from scratch, and init_from is {config.init_from!r}; drop one of them"
    if config.drop_in != 'none':
        yield from check_drop_in(config)
    if config.finish_dense_at >= 1:
        yield 'finish_dense_at', f'finish_dense_at must be below 1, got {config.finish_dense_at}'
    if not 0 < config.cooldown <= 1:
        yield 'cooldown', f'cooldown must be above 0 and at most 1, got {config.cooldown}'
    for name in ('beta1', 'beta2', 'muon_momentum', 'ema_decay'):
        if getattr(config, name) >= 1:
            yield name, f'{name} must be below 1, got {getattr(config, name)}'
    if config.decay_lr and config.warmup_iters > config.lr_decay_iters:
        yield 'warmup_iters', (f'warmup_iters must not exceed lr_decay_iters ({config.lr_decay_iters}), got '
                               f'{config.warmup_iters}; lower it or set decay_lr=False')
    if config.decay_lr and config.min_lr > config.learning_rate:
        yield 'min_lr', f'min_lr must not exceed learning_rate ({config.learning_rate}), got {config.min_lr}'
    if config.sharded_checkpoints and config.parallel != 'fsdp':
        yield 'sharded_checkpoints', (f"sharded_checkpoints=True needs parallel='fsdp', got {config.parallel!r}; with "
                                      'copies of the model one file holds it all')
    if config.device.split(':')[0] not in ('auto', 'cpu', 'cuda', 'mps'):
        yield 'device', f"device must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps', got {config.device!r}"
    for name in ('out_dir', 'dataset', 'init_from', 'data_dir'):
        if not getattr(config, name) or '\0' in getattr(config, name):
            yield name, f'{name} must not be empty'


def check_drop_in(config):
    """What a run that drops structures in cannot do; dropin.begin checks the schedule once the sites are known."""
    specs = variants.as_rules(config.linear).values()
    if all(isinstance(spec, str) and spec.strip() == 'dense' for spec in specs):
        yield 'drop_in', (f"drop_in={config.drop_in!r} puts what linear names in place of dense matrices, and linear names "
                          "nothing; set it, say --linear='h.*.mlp.*=kron(8, 8)'")
    if config.grow_from:
        yield 'drop_in', 'drop_in and grow_from change the same model; take one of them'
    if config.init_from == 'scratch' and not config.drop_in_from:
        yield 'drop_in_from', ('drop_in from scratch would decompose random weights; set drop_in_from=STEPS of dense '
                               'training, or init_from=FOLDER of a dense run')
    if config.drop_in != 'all' and not config.drop_in_every:
        yield 'drop_in_every', f'drop_in={config.drop_in!r} needs drop_in_every=STEPS from one replacement to the next'
    if config.drop_in != 'all' and config.drop_in_freeze > config.drop_in_every:
        yield 'drop_in_freeze', (f'drop_in_freeze must not exceed drop_in_every ({config.drop_in_every}), got '
                                 f'{config.drop_in_freeze}')


def place(config, name):
    """'config/x.py:7: ' or '--n_head=5: ' for a key that was set, '' for a default."""
    where = getattr(config, 'sources', {}).get(name, '')
    return f'{where}: ' if where else ''


def placed(config, error):
    """The sentence of a UserError that came up after loading, with the place and the name of the key it is about."""
    where = place(config, error.key)
    named = str(error).startswith(f'{error.key}') or not where
    return f'{where}{"" if named else error.key + ": "}{error}'


def load(arguments, cls=Config):
    """Read config files and --key=value, in the order given, into a checked `cls`.

    Raises UserError in one line that names the file and line (or the argument), the key and the remedy.
    """
    fields, config = settings(cls), cls()
    config.sources = {}
    for argument in arguments:
        pairs = read_argument(argument, fields) if argument.startswith('-') else read_file(argument)
        for name, value, where in pairs:
            if name == 'help':
                print(help_text(cls))
                raise SystemExit(0)
            if name not in fields:
                raise UserError(f'{where}: there is no setting {name!r}{did_you_mean(name, fields)}')
            try:
                setattr(config, name, at_home(name, coerce(fields[name], value)))
            except UserError as error:
                raise UserError(f'{where}: {error}') from None
            config.sources[name] = where
    for name, sentence in check(config) if isinstance(config, GPTConfig) else ():
        raise UserError(f'{place(config, name)}{sentence}')
    return config


def help_text(cls):
    """Every key with its default and what it means."""
    lines = ['usage: PROGRAM [config/X.py ...] [--key=value ...]', '']
    for name, setting in settings(cls).items():
        default = setting.default if setting.default is not dataclasses.MISSING else setting.default_factory()
        lines.append(f'  --{name}={default!r}\n        {setting.metadata["doc"]}')
    return '\n'.join(lines)


def run_program(program, cls=Config):
    """load(sys.argv) for a program: a mistake is one line on stderr (of rank 0 alone) and exit code 2."""
    try:
        return load(sys.argv[1:], cls)
    except UserError as error:
        if '--debug=True' in sys.argv:
            raise
        say_mistake(program, error)


def say_mistake(program, error):
    """Print one line for a user's mistake, on rank 0 alone, and leave with exit code 2."""
    if os.environ.get('RANK', '0') == '0':
        print(f'{program}: {error}'.replace('\n', ' '), file=sys.stderr, flush=True)
    raise SystemExit(2)


def main():
    """Check a configuration; with --get=KEY print that setting's value."""
    wanted = [a[6:] for a in sys.argv[1:] if a.startswith('--get=')]
    sys.argv[1:] = [a for a in sys.argv[1:] if not a.startswith('--get=')]
    config = run_program('configurator.py')
    for name in wanted:
        print(getattr(config, name))


if __name__ == '__main__':
    main()
