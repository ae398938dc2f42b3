"""Configuration: every setting of a run, in sections, with its default; configfile.py reads files and arguments.

Nothing is ever run. Imports no torch, so that a mistake is said at once.
    python configurator.py [--get=KEY] config/X.py [--key=value]    checks a configuration alone
    python configurator.py configs > config/README.md               lists the files of config/
"""
import dataclasses
import sys
from dataclasses import dataclass, field

import variants
from commandline import checks, configs, ends
from commandline.ends import say_mistake
from commandline.help import text as help_text
from configfile import at_home, coerce, read_argument, read_file
from optimizers import schedules
from variants import UserError, did_you_mean


def key(default, doc, low=None, choices=None, high=1e15):
    """A dataclass field with its documentation, lowest and highest allowed value and allowed choices."""
    metadata = {'doc': doc, 'low': low, 'choices': choices, 'high': high}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class GPTConfig:
    """What the model is: all that a checkpoint needs to rebuild it."""
    block_size: int = key(1024, 'context length, tokens', low=1, high=1 << 24)
    vocab_size: int = key(50304, "rows of the embedding; train.py: the data set's (GPT-2: 50257, padded)", low=1,
                          high=1 << 28)
    n_layer: int = key(12, 'number of blocks', low=1, high=2000)
    n_head: int = key(12, 'attention heads per block; must divide n_embd', low=1, high=1 << 20)
    n_embd: int = key(768, 'hidden size: width of the residual stream', low=1, high=1 << 20)
    dropout: float = key(0.0, 'probability of zeroing an activation, 0 <= p < 1', low=0)
    bias: bool = key(False, 'biases in linears and norms (GPT-2 has them)')
    tie_weights: bool = key(True, 'the head shares the weight of the token embedding')
    n_kv_head: int | None = key(None, 'key and value heads (grouped queries); None = n_head; must divide it', low=1)
    norm: str = key('layernorm', 'norm of the residual stream', choices=('layernorm', 'rmsnorm'))
    norm_eps: float = key(1e-5, 'added to the variance in norms', low=0)
    rope: bool = key(False, 'rotary positions instead of a position table')
    rope_base: float = key(10000.0, 'base of the rotary wavelengths', low=1)
    rope_half: bool = key(False, 'half of the rotary pairs stand still; the others turn by 1 to 1 / rope_base (track 3)')
    attention_scale: float = key(0.0, 'multiplies q . k, with qk_norm say 0.12 (track 3); 0 = 1 / sqrt(head size)', low=0)
    embed_norm: bool = key(False, 'RMSNorm after the embedding (track 3)')
    embed_std: float = key(0.02, "std of an embedding's entries at first (track 3: 1)", low=0)
    head_std: float = key(0.02, "std of an untied head's entries at first (track 3: 0)", low=0)
    hidden_gain: float = key(0.0, "variance of a linear's entries at first times its inputs (track 3: 0.33); 0 = std 0.02",
                             low=0)
    qk_norm: str = key('none', "RMS norm of queries and keys; 'split': each map of diff and dint alone",
                       choices=('none', 'standard', 'split'))
    value_residual: bool = key(False, "mix block 0's values into every block's, by a learned share")
    softcap: float = key(0.0, 'bound the logits by softcap * tanh(logits / softcap); 0 = off', low=0)
    loss: str = key('cross_entropy', 'loss function; stablemax is for vocabularies of some hundred tokens',
                    choices=('cross_entropy', 'stablemax'))
    zero_init: bool = key(False, 'branches start at 0: c_proj (one factor of it, where it is a product)')
    loss_chunk: int = key(0, 'tokens whose logits exist at a time while training; 0 = all', low=0)
    recompute: bool = key(False, 'keep only the inputs of blocks for the backward pass; recompute the rest')
    residual: str = key('float32', "residual stream under bf16 autocast; 'bfloat16' halves its memory traffic",
                        choices=('float32', 'bfloat16'))
    ngpt: str = key('none', 'normalised GPT: unit vectors, weights normalised after every step',
                    choices=('none', 'simple', 'full'))
    ngpt_sz_init: float = key(1.0, "nGPT's first logit scale; about 10 lets short runs move", low=0)
    linear: dict | str = key({}, 'which linear stands where: {site pattern: spec}; first match, else dense')
    attention: dict | str = key('causal', 'attention class: a spec, or {block pattern: spec}')
    mlp: dict | str = key('gelu', "MLP class: a spec, or {block pattern: spec}; GPT-2: \"gelu(approximate='tanh')\"")


@dataclass
class Data:
    """What the run reads, and where its weights come from."""
    init_from: str = key('scratch', "'scratch', 'resume', 'gpt2*', a .gguf, or a folder: ours, nanoGPT's, Hugging Face's")
    dataset: str = key('openwebtext', 'folder below data_dir with train.bin and val.bin')
    data_dir: str = key('data', 'folder that holds the data set folders')
    batch_size: int = key(12, 'sequences per micro-step', low=1)
    gradient_accumulation_steps: int = key(5 * 8, 'micro-steps per step, counted over the whole job', low=1)
    prefetch: int | None = key(None, 'micro-batches prepared ahead; None = 2 on a GPU, else 0', low=0)


@dataclass
class Optimizer:
    """AdamW, Muon, and what is done to gradients and weights."""
    optimizer: str = key('adamw', "'adamw', or 'muon' for matrices and factors (docs/muon.md)", choices=('adamw', 'muon'))
    learning_rate: float = key(6e-4, 'peak learning rate', low=0)
    weight_decay: float = key(1e-1, 'AdamW decay of matrices, factors and embeddings', low=0)
    beta1: float = key(0.9, 'AdamW first moment', low=0)
    beta2: float = key(0.95, 'AdamW second moment', low=0)
    adam_eps: float = key(1e-8, 'AdamW: added to the root of the second moment (track 3: 1e-10)', low=0)
    embedding_lr: float = key(0.0, "AdamW's peak rate of embeddings, same schedule; 0 = learning_rate (track 3: 0.7)", low=0)
    head_lr: float = key(0.0, 'that of an untied head (track 3: 0.004)', low=0)
    vector_lr: float = key(0.0, 'that of norms, biases, gates and scales (track 3: 0.015)', low=0)
    grad_clip: float = key(1.0, 'largest gradient norm; 0 = no clipping', low=0)
    trainable: str = key('', "patterns of the parameters that train, with commas, as 'h.*.mlp.*'; '' = all")
    look_ahead: float = key(0.0, 'EMA-Nesterov: gradients are taken so many average steps ahead, times lr / its peak; 0 = '
                            'off (track 3 #39: 0.6)', low=0)
    look_ahead_decay: float = key(0.99, "decay of the average step (track 3 #39's)", low=0)
    look_ahead_from: int = key(500, 'first step with a look ahead', low=0)
    look_ahead_until: int = key(0, 'first step without one again (track 3 #39: 750 before the end); 0 = none', low=0)
    ema_decay: float = key(0.0, 'evaluate and sample a moving average of the weights; 0 = off', low=0)
    orthograd: bool = key(False, 'make gradients of matrices orthogonal to the weights, norms kept')
    factor_lr: str = key('none', "a factor's rate: as all, or times in_features / fan_in / factors",
                         choices=('none', 'fan_in'))
    factor_decay: str = key('tensors', "decay every factor of a product, or the 'product' once",
                            choices=('tensors', 'product'))
    muon_lr: float = key(0.02, "Muon's peak learning rate; it follows the schedule of learning_rate", low=0)
    muon_momentum: float = key(0.95, "Muon's momentum", low=0)
    muon_momentum_warmup: int = key(300, 'steps in which the momentum rises from 0.85', low=0)
    muon_weight_decay: float = key(0.0, "Muon's decoupled weight decay", low=0)
    muon_cautious: bool = key(False, 'decay only where update and weight have the same sign')
    muon_adjust_lr: str = key('original', "scale of an update by its shape; 'match_rms' fits AdamW's rates",
                              choices=('original', 'match_rms'))
    muon_product: str = key('none', "steps of factors whose product moves by muon_lr: 'spectron' (docs/muon.md)",
                            choices=('none', 'spectron'))
    muon_row_beta: float = key(0.0, "NorMuon's average of squares per row of an update, say 0.95; 0 = off", low=0)
    muon_coefficients: str = key('quintic', "polynomials of the iteration; 'convergent' (track 3's) wants muon_steps=12",
                                 choices=('quintic', 'polar_express', 'convergent'))
    muon_steps: int = key(5, "steps of the iteration, the first ones of its polynomials: at most 5, 'convergent' 12", low=1,
                          high=12)
    muon_dtype: str = key('auto', "type of the iteration; 'auto' = bfloat16 on a GPU, else float32",
                          choices=('auto', 'float32', 'bfloat16'))


@dataclass
class Schedule:
    """How long the run is, and what changes on the way."""
    max_iters: int = key(600000, 'steps in all', low=0)
    decay_lr: bool = key(True, 'warm up, then decay')
    lr_schedule: str = key('cosine', "'cosine', or 'wsd': stay at the peak, then cool down linearly",
                           choices=('cosine', 'wsd'))
    warmup_iters: int = key(2000, 'steps of warm-up', low=0)
    lr_decay_iters: int = key(600000, 'step at which min_lr is reached', low=0)
    min_lr: float = key(6e-5, 'lowest learning rate, about learning_rate / 10', low=0)
    cooldown: float = key(0.4, 'wsd: share of lr_decay_iters that the cool-down takes', low=0)
    batch_schedule: dict | str = key({}, 'share of the micro-steps by fraction of the run: {0: 0.25, 0.5: 1}')
    block_schedule: dict | str = key({}, 'share of block_size that sequences have, by fraction of the run')


@dataclass
class Precision:
    """The device, number types, compilation and contraction plans."""
    device: str = key('auto', "'auto' = cuda, else cpu; 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = key('auto', "autocast type; 'auto' = bfloat16 or float16 on a GPU, float32 on a CPU",
                     choices=('auto', 'float32', 'bfloat16', 'float16'))
    weights: str = key('float32', 'type of weights and gradients; half precision runs without autocast',
                       choices=('float32', 'bfloat16', 'float16'))
    master_weights: bool = key(True, 'with half-precision weights: the optimizer keeps them in fp32 too')
    loss_scaling: bool = key(True, 'in float16: multiply the loss, so that small gradients do not round to 0')
    compile: bool | None = key(None, 'torch.compile; None = on a GPU only (it gains little on a CPU)')
    threads: int = key(0, 'CPU threads; 0 = as OMP_NUM_THREADS says, else measured at the start of a run', low=0, high=4096)
    kron_plan: str = key('rule', "contraction of Kronecker sums: at least cost, or 'measure' every way once",
                         choices=('rule', 'measure'))
    kron_plans: dict = key({}, 'what was measured, kept on resume: {shape and call: plan}')


@dataclass
class Ranks:
    """Memory of a device, and how several share the work."""
    memory_budget_gb: float = key(0.0, 'lower batch_size, same tokens per step, to fit a device; 0 = off', low=0)
    parallel: str = key('ddp', "several ranks: 'ddp' copies the model, 'fsdp' shards it (FSDP2)", choices=('ddp', 'fsdp'))
    sharded_checkpoints: bool = key(False, "with parallel='fsdp': every rank saves its own part")
    backend: str = key('nccl', "torch.distributed backend; 'nccl' becomes 'gloo' without a GPU",
                       choices=('nccl', 'gloo'))
    dist_timeout: int = key(600, 'seconds that ranks wait for one another', low=1)


@dataclass
class Evaluation:
    """What the run measures and writes."""
    out_dir: str = key('out', 'folder for checkpoints, logs and plots')
    eval_interval: int = key(2000, 'steps between evaluations', low=1)
    eval_iters: int = key(200, 'random batches per evaluation; 0 = the whole validation split', low=0)
    eval_first: bool = key(True, 'evaluate before the first step too')
    eval_only: bool = key(False, 'evaluate once and stop')
    target_val_loss: float = key(0.0, 'stop at an evaluation that reaches it; 0 = never', low=0)
    log_interval: int = key(1, 'steps between lines of log.jsonl', low=1)
    always_save_checkpoint: bool = key(True, 'save after every evaluation, not only after a better one')
    save_interval: int = key(0, 'steps between checkpoints besides those at evaluations; 0 = none', low=0)
    keep_checkpoints: int = key(3, 'newest checkpoints kept, the best one not counted', low=2)
    figures: str = key('png', "formats of pictures; 'png,pdf' and 'png,svg' are for papers",
                       choices=('png', 'png,pdf', 'png,svg', 'png,pdf,svg'))
    tensorboard_log: bool = key(False, 'log to out_dir/tensorboard')
    wandb_log: bool = key(False, 'log to Weights & Biases')
    wandb_project: str = key('nanokron', 'its project name')
    wandb_run_name: str = key('', "its run name; '' = the name of out_dir")


@dataclass
class Growth:
    """Blocks that are added, and structures that become dense or begin dense."""
    grow_from: int = key(0, 'blocks at the start of a run that grows to n_layer; 0 = all of them', low=0)
    grow_every: int = key(0, 'steps between new blocks; 0 = not by steps', low=0)
    grow_on_plateau: bool = key(False, 'a new block when three evaluations gained less than 0.005 nats')
    grow_freeze: bool = key(False, 'blocks before the newest do not train')
    grow_init: str = key('zero', "new block: 'zero' branches, 'copy' the last with zero branches, or 'stack'",
                         choices=('zero', 'copy', 'stack'))
    grow_rewarm: int = key(0, 'steps in which the learning rate comes back after a change of the model', low=0)
    grow_report: int = key(0, 'steps between losses on fixed batches in the 50 steps after such a change; 0 = none', low=0)
    finish_dense_at: float = key(0.0, 'fraction of the run at which every site becomes dense; 0 = never', low=0)
    finish_dense_state: str = key('reset', "their optimizer state: none, or an 'estimate' from the factors'",
                                  choices=('reset', 'estimate'))
    self_guided: float = key(0.0, 'fraction of the run in which a dense twin of each site fades out', low=0)


@dataclass
class DropIn:
    """Dense matrices that become structured in the course of the run."""
    drop_in: str = key('none', 'matrices that linear names become structured one by one, in depth order or the least '
                       "damage first ('sensitivity', block 0 last), or 'all' at once",
                       choices=('none', 'sequential', 'sensitivity', 'all'))
    drop_in_unit: str = key('site', "what is replaced at a time: one matrix ('site'), or a block's ('layer')",
                            choices=('site', 'layer'))
    drop_in_from: int = key(0, 'step of the first replacement', low=0)
    drop_in_every: int = key(0, 'steps from one replacement to the next', low=0)
    drop_in_freeze: int = key(0, 'steps after a replacement in which nothing else trains', low=0)
    drop_in_rewarm: int = key(0, 'steps in which the learning rate comes back after a replacement', low=0)
    drop_in_report: int = key(0, 'steps between losses on fixed batches while matrices are replaced, and drop_in.md, .json '
                              'and .png at the end; 0 = none', low=0)


@dataclass
class Decomposition:
    """Structures from the weights of a dense model."""
    decompose: str = key('van_loan', 'how dense weights become structured: van_loan, van_loan_normalised, prune, als, '
                         'als_hessian, svd ...; with _sequential or _streamed: layer by layer; of several, with commas, '
                         'each structure takes the first that it knows')
    calibration_tokens: int = key(65536, 'training tokens on which inputs of decomposed sites are measured', low=0)
    prune_before: str = key('none', 'zero weights first: the smallest, or those of least effect',
                            choices=('none', 'magnitude', 'wanda'))
    prune_fraction: float = key(0.0, 'share of the weights that prune_before zeroes', low=0)
    decompose_report: bool = key(False, "measure each decomposed site's own damage to the validation loss")
    rank_budget: float = key(0.0, 'parameters of structured sites over dense ones: sets ranks and terms; 0 = off', low=0)
    rank_allocation: str = key('uniform', "the same fraction everywhere, by the 'spectrum' of the weights, or by the "
                               "'curvature' of the loss", choices=('uniform', 'spectrum', 'curvature'))
    narrow: str = key('', "with rank_budget: what becomes narrower first: 'mlp' = hidden neurons, 'heads' = groups of heads,"
                      " 'values' = features of value heads; with commas several")
    refine: int = key(0, 'steps in which each block of the compressed model learns to meet the dense one; 0 = off', low=0)
    refine_learning_rate: float = key(0.01, "their peak learning rate, as a share of a weight's rms", low=0)
    refine_parameters: str = key('mlp', "what learns: the 'mlp' of each block, or the whole 'block'",
                                 choices=('mlp', 'block'))
    refine_error: str = key('mse', "the plain error of a block's output ('mse'), or by the 'curvature' of the loss",
                            choices=('mse', 'curvature'))


@dataclass
class Distillation:
    """Training against a dense model's predictions."""
    distill: str = key('', "the teacher, a place as for init_from; 'init_from' = the model this run starts from; '' = none")
    distill_top_k: int = key(0, "the teacher's likeliest tokens that count, all others as one; 0 = every token", low=0)
    distill_weight: float = key(1.0, "share of the teacher in the loss; the rest is the text's", low=0)
    distill_temperature: float = key(1.0, 'divides the logits of both', low=1e-3)


@dataclass
class Safety:
    """What is reproduced, refused and checked."""
    seed: int = key(1337, 'all randomness of a run follows from it', low=0)
    deterministic: bool = key(False, 'the same bits every time on a GPU too (as on a CPU); slower there')
    nonfinite: str = key('stop', "a loss or gradient that is not finite: 'stop' (exit 3) or 'skip' the step",
                         choices=('stop', 'skip'))
    skip_zscore: float = key(0.0, 'skip steps whose loss or gradient norm is so many deviations above the last 128; 0 = off',
                             low=0)
    allow_leak: bool = key(False, 'train a model whose attention sees the future: for negative controls')
    dry_run: bool = key(False, 'print sites, parameters, FLOPs and memory, and stop')
    debug: bool = key(False, 'tracebacks for mistakes too')


# a class a section, in the order of --help
SECTIONS = {'model': GPTConfig, 'data': Data, 'optimizer': Optimizer, 'schedule': Schedule, 'precision': Precision,
            'memory and ranks': Ranks, 'evaluation and logging': Evaluation, 'growth': Growth, 'drop-in': DropIn,
            'decomposition': Decomposition, 'distillation': Distillation, 'safety': Safety}


@dataclass
class Config(Safety, Distillation, Decomposition, DropIn, Growth, Evaluation, Ranks, Precision, Schedule, Optimizer, Data,
             GPTConfig):
    """The whole run in one flat namespace: nanoGPT's names, meanings and defaults, and ours. The last base comes first."""
    sources: dict = field(default_factory=dict, repr=False, compare=False)   # key -> where it was set


def settings(cls):
    """{key: dataclass field} of the keys a user may set."""
    return {f.name: f for f in dataclasses.fields(cls) if 'doc' in f.metadata}


def sections(cls):
    """{title: (what it is about, [key])} of the sections that a class has."""
    return {title: (part.__doc__.rstrip('.'), list(settings(part))) for title, part in SECTIONS.items()
            if issubclass(cls, part)}


def as_dict(config):
    """The settings as plain values, as config.json and checkpoints hold them."""
    return {name: getattr(config, name) for name in settings(type(config))}


def model_config(config):
    """The GPTConfig part of a Config (or of a dict of settings that a checkpoint holds)."""
    values = config if isinstance(config, dict) else as_dict(config)
    return GPTConfig(**{name: values[name] for name in settings(GPTConfig) if name in values})


# ----------------------------------------------------------------------------------------------------
# checking

def check(config):
    """The rules that need several settings at once: yields (key, sentence)."""
    if config.n_embd % config.n_head:
        yield 'n_head', f'n_head must divide n_embd ({config.n_embd}), got {config.n_head}'
    heads = config.n_kv_head or config.n_head
    if config.n_head % heads:
        yield 'n_kv_head', f'n_kv_head must divide n_head ({config.n_head}), got {heads}'
    if config.rope and config.n_embd // config.n_head % 2:
        yield 'rope', f'rope needs an even head size, got {config.n_embd // config.n_head}'
    if config.rope_half and not config.rope:
        yield 'rope_half', 'rope_half halves rotary positions, and rope=False has none; set rope=True or drop it'
    if config.ngpt != 'none':
        yield from checks.check_ngpt(config)
    if config.loss_chunk and config.loss != 'cross_entropy':
        yield 'loss_chunk', f"loss_chunk is for loss='cross_entropy', got {config.loss!r}; set loss_chunk=0"
    if config.dropout >= 1:
        yield 'dropout', f'dropout must be below 1, got {config.dropout}'
    for name, table in (('linear', variants.LINEARS), ('attention', variants.ATTENTIONS), ('mlp', variants.MLPS)):
        try:
            checks.check_rules(config, name, table)
        except UserError as error:
            yield name, str(error)
    if isinstance(config, Config):
        yield from check_run(config)


def check_run(config):
    if not config.prune_fraction < 1 or (config.prune_before == 'none') != (config.prune_fraction == 0):
        yield 'prune_fraction', ('prune_fraction must be above 0 and below 1 with prune_before, and 0 without, got '
                                 f'{config.prune_fraction} with prune_before={config.prune_before!r}')
    yield from checks.check_budget(config)
    yield from checks.check_growth(config)
    yield from checks.check_optimizer(config)
    try:
        schedules.check(config)
        for name in ('attention', 'mlp') if config.init_from == 'scratch' else ():      # else n_layer is the source's
            variants.refuse_idle(name, getattr(config, name), checks.blocks(config))
    except UserError as error:
        yield error.key, str(error)
    if config.drop_in != 'none':
        yield from checks.check_drop_in(config)
    yield from checks.check_refine(config)
    yield from checks.check_distill(config)
    if config.finish_dense_at >= 1:
        yield 'finish_dense_at', f'finish_dense_at must be below 1, got {config.finish_dense_at}'
    if not 0 < config.cooldown <= 1:
        yield 'cooldown', f'cooldown must be above 0 and at most 1, got {config.cooldown}'
    for name in ('beta1', 'beta2', 'muon_momentum', 'muon_row_beta', 'ema_decay', 'look_ahead_decay'):
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
    for name in ('out_dir', 'dataset', 'init_from', 'data_dir'):
        if not getattr(config, name):
            yield name, f'{name} must not be empty'


def place(config, name):
    """'config/x.py:7: ' or '--n_head=5: ' for a key that was set, '' for a default."""
    where = getattr(config, 'sources', {}).get(name, '')
    return f'{where}: ' if where else ''


def placed(config, error):
    """The sentence of a UserError that came up after loading, with the place and the name of the key it is about."""
    where = place(config, error.key)
    named = str(error).startswith(f'{error.key}') or not where
    return f'{where}{"" if named else error.key + ": "}{error}'


def load(arguments, cls=Config, usage='python train.py [config/X.py ...] [--key=value ...]'):
    """Read config files and --key=value, in the order given, into a checked `cls`; --help prints all settings and leaves.

    Raises UserError in one line that names the file and line (or the argument), the key and the remedy.
    """
    fields, config = settings(cls), cls()
    config.sources = {}
    for argument in arguments:
        pairs = read_argument(argument, fields) if argument.startswith('-') else read_file(argument)
        for name, value, where in pairs:
            if name == 'help' and where == argument[:120]:
                ends.show(help_text(usage, fields, sections(cls), value))
            if name not in fields:
                raise UserError(f'{where}: there is no setting {name!r}{did_you_mean(name, fields)}')
            try:
                setattr(config, name, at_home(name, coerce(fields[name], value)))
            except UserError as error:
                raise UserError(f'{where}: {error}') from None
            config.sources[name] = where
    merges = getattr(config, 'init_from', '') == 'resume'           # startup.resumed checks then
    for name, sentence in check(config) if isinstance(config, GPTConfig) and not merges else ():
        raise UserError(f'{place(config, name)}{sentence}')
    return config


def run_program(program, cls=Config, usage='[config/X.py ...] [--key=value ...]'):
    """load(sys.argv) for a program: a mistake is one line on stderr (of rank 0 alone) and exit code 2.

    usage: what may follow the program's name.
    """
    try:
        return load(sys.argv[1:], cls, f'python {program} {usage}')
    except UserError as error:
        if '--debug=True' in sys.argv:
            raise
        say_mistake(program, error)


def main():
    """Check a configuration; with --get=KEY print that setting's value; `configs` prints config/README.md."""
    ends.watch('configurator.py')
    own = [a for a in sys.argv[1:] if a.startswith(('--get=', '--usage='))]
    arguments = [a for a in sys.argv[1:] if a not in own]
    usage = [a[8:] for a in own if a.startswith('--usage=')] or ['python configurator.py [--get=KEY ...] config/X.py ...']
    try:
        if arguments == ['configs']:
            ends.show(configs.text())
        config = load(arguments, Config, usage[0])
    except UserError as error:
        say_mistake('configurator.py', error)
    for argument in own:
        if argument.startswith('--get='):
            print(getattr(config, argument[6:]))


if __name__ == '__main__':
    main()
