"""The dry run: sites, parameters, FLOPs and memory, printed without building the model."""
import os

from data.loader import open_dataset
from decomposition import initialise
from training.startup import adopt, check_shapes, choose_sizes, padded
from variants import UserError


def dry_run(config, job, found=None):
    """Print the site table, parameters in three conventions, FLOPs per token and memory. found: what restart.read gave."""
    if isinstance(found, UserError):
        raise found
    folder = os.path.join(config.data_dir, config.dataset)
    known = config.init_from == 'resume' or 'vocab_size' in config.sources
    if not known and os.path.exists(os.path.join(folder, 'meta.json')):
        config.vocab_size = padded(open_dataset(folder, job.say).vocab_size)
    if config.init_from == 'scratch':
        choose_sizes(config, job)
    elif config.init_from != 'resume':                  # whose settings are merged already
        source_config, source, _ = initialise.read_source(config.init_from) if config.rank_budget else (
            initialise.source_config(config.init_from), None, None)
        adopt(config, source_config)
        calibrated = config.rank_budget and config.rank_allocation != 'uniform'
        choose_sizes(config, job, open_dataset(folder, job.say) if calibrated else None, source_config, source)
    model = check_shapes(config)
    job.say(f'{"site":24}{"spec":36}{"out x in":>14}{"parameters":>14}{"FLOPs/token":>14}{"share":>8}')
    rows = model.site_table()
    for row in rows:
        shape = '{} x {}'.format(*row['shape'])
        job.say(f'{row["site"]:24}{row["spec"]:36}{shape:>14}{row["parameters"]:14,}{row["flops"]:14,}{row["share"]:8.2%}')
    embeddings = model.num_params(positions=False) - model.transformer.wte.weight.numel()
    job.say(f'parameters: {model.num_params():,} in all, {model.num_params(positions=False):,} without the position '
            f'table, {embeddings:,} without embeddings')
    idle = sum(row['parameters'] - row.get('active', row['parameters']) for row in rows)
    if idle:
        job.say(f'active: {model.num_params() - idle:,} parameters per token; the rest are experts that it does not use')
    job.say(f'FLOPs per token: {model.flops_per_token():,} forward, {3 * model.flops_per_token():,} training')
    job.say(f'memory: about {memory_estimate(model, config, job.dtype.itemsize) / 2**30:.2f} GiB per device (weights, '
            'gradients, AdamW, activations, logits)')


def fit_memory(config, model, job):
    """Lower batch_size and raise gradient_accumulation_steps, product unchanged, until a step fits memory_budget_gb."""
    if not config.memory_budget_gb:
        return
    total, budget = config.batch_size * config.gradient_accumulation_steps, config.memory_budget_gb * 1e9
    for rows in range(config.batch_size, 0, -1):
        config.batch_size = rows
        if total % rows == 0 and memory_estimate(model, config, job.dtype.itemsize) <= budget:
            config.gradient_accumulation_steps = total // rows
            job.say(f'memory_budget_gb={config.memory_budget_gb:g}: batch_size {rows}, gradient_accumulation_steps '
                    f'{total // rows}')
            return
    needed = memory_estimate(model, config, job.dtype.itemsize) / 1e9
    raise UserError(f'memory_budget_gb={config.memory_budget_gb:g} is below the {needed:.2f} that one sequence needs; set '
                    'recompute=True, loss_chunk, a smaller block_size or model', 'memory_budget_gb')


def memory_estimate(model, config, itemsize):
    """Bytes: 16 per parameter (weight, gradient, two moments), activations, logits twice in fp32.

    Activations: about 17 C per token and block, or C where they are recomputed, and one block's; the residual stream in
    fp32 beside half precision; a chunk of logits where the loss is chunked.
    """
    tokens = config.batch_size * config.block_size
    blocks = config.n_layer / 17 + 1 if config.recompute else config.n_layer
    rows = min(tokens, config.loss_chunk) if config.loss_chunk else tokens
    kept = 17 * config.n_embd * tokens * blocks * itemsize
    if itemsize == 2 and config.weights == config.residual == 'float32':       # the stream that norms keep, two per block
        kept += 2 * config.n_embd * tokens * (1 if config.recompute else 2) * config.n_layer
    return int(16 * model.num_params() + kept + 2 * 4 * rows * config.vocab_size)
