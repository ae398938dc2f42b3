"""Attention maps of a checkpoint by layer and head, as one image.

The map of a head is measured from its outputs, so that it is right for every class: for a given x a head's output is
y = A v with values v (B, T, D_v), linear in v. Values that are 1 in one position and feature and 0 elsewhere give A column
by column, D_v columns per row of the batch. A includes all that the head does with its values: DIFF's difference, DINT's
sum, Linformer's slots spread over their tokens, a gate's factor. Values are replaced at the output of heads.ValueMix, and
outputs are read at the input of c_proj. DIFF's and DINT's norm per head, which is in between and not linear, is left out.
That y = A v is checked on the real values.
"""
import contextlib
import dataclasses
import os
import sys
import textwrap

import torch

import variants
from attention.heads import ValueMix, merge_heads, split_heads
from reporting import palette
from variants import UserError

LABELLED, DPI = 64, 110                 # tokens that can still be read on an axis; dots an inch


@contextlib.contextmanager
def hooked(*handles):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def unfinished(attn):
    """Without the norm of a head, where the class has one: DIFF and DINT call it finish."""
    if hasattr(attn, 'finish'):
        attn.finish = lambda y: y
    try:
        yield
    finally:
        attn.__dict__.pop('finish', None)


@torch.no_grad()
def attention_inputs(model, idx):
    """[(x, ctx)] of every attention when the model reads idx (1, T)."""
    found = []
    handles = [block.attn.register_forward_pre_hook(lambda module, inputs: found.append(inputs))
               for block in model.transformer.h]
    with hooked(*handles):
        model(idx)
    return found


def probed(attn, x, ctx, v=None):
    """(values, outputs of the heads before c_proj) of one call; values replaced by v (B, T, features) if given."""
    seen = {}

    def values(module, inputs, output):
        seen['v'] = output if v is None else v.to(output.dtype)
        return seen['v']

    def outputs(module, inputs):
        seen['y'] = inputs[0]

    mix = [module for module in attn.modules() if isinstance(module, ValueMix)]
    if len(mix) != 1:
        raise UserError(f'{type(attn).__name__} does not pass its values through heads.ValueMix, so its maps are not known')
    handles = mix[0].register_forward_hook(values), attn.c_proj.register_forward_pre_hook(outputs)
    with hooked(*handles), unfinished(attn), torch.no_grad():
        attn(x, ctx)
    return seen['v'], seen['y']


def repeated(ctx, batch):
    """The context of `batch` copies of the row of ctx."""
    first = ctx.first_value
    return dataclasses.replace(ctx, tokens=ctx.tokens.expand(batch, -1), losses=[], cache=None,
                               first_value=None if first is None else first.expand(batch, -1, -1))


def heads_of(attn):
    """Heads whose outputs c_proj joins: pairs of maps in DIFF and DINT."""
    return getattr(attn, 'pairs', attn.n_head if hasattr(attn, 'n_head') else 1)


def attention_map(attn, x, ctx):
    """The maps (heads, T, T) of one attention for its input x (1, T, C); raises UserError where y = A v does not hold."""
    T, heads = x.size(1), heads_of(attn)
    v, y = probed(attn, x, repeated(ctx, 1))
    size = y.size(-1) // heads                                          # D_v
    groups = v.size(-1) // size                                         # value heads
    batch = -(-T // size)
    unit = torch.eye(batch * size, dtype=v.dtype, device=v.device)[:, :T]
    basis = unit.view(batch, size, T).mT.repeat(1, 1, groups)           # (batch, T, groups D_v)
    _, columns = probed(attn, x.expand(batch, -1, -1), repeated(ctx, batch), basis)
    maps = split_heads(columns, heads).permute(1, 2, 0, 3).flatten(2)[:, :, :T]         # (heads, T, T)
    again = maps @ split_heads(v, groups)[0].repeat_interleave(heads // groups, 0).to(maps.dtype)
    if not torch.allclose(merge_heads(again[None]), y.to(maps.dtype), rtol=1e-3, atol=1e-3 * y.abs().max().item()):
        raise UserError(f'{type(attn).__name__} is not linear in its values, so that it has no map')
    return maps


def attention_maps(model, idx):
    """[(heads, T, T)] by layer of what a model in evaluation does with the tokens idx (1, T)."""
    inputs = attention_inputs(model, idx)
    return [attention_map(block.attn, x, ctx) for block, (x, ctx) in zip(model.transformer.h, inputs)]


# ----------------------------------------------------------------------------------------------------
# drawing

def label(text):
    """A token as an axis label."""
    for sign, shown in ((' ', '␣'), ('\n', '\\n'), ('\t', '\\t'), ('\r', '\\r'), ('$', r'\$')):
        text = text.replace(sign, shown)
    return text


def draw(path, maps, names, labels, title):
    """One picture, PNG, PDF or SVG: a row of axes per layer, a column per head; queries downwards, keys to the right.

    maps: (heads, T, T) by layer; names: of the class, by layer; labels: the tokens as text, or [] for numbers.
    One colour scale for all, in the square root of the weight, as most weights are near 0; a map with negative weights
    makes it diverging, and up to 64 tokens a minus sign stands on them. Grey is a weight of exactly 0, such as that of a key
    that a query does not see.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    maps = [m.float().cpu() for m in maps]
    columns, T = max(m.size(0) for m in maps), maps[0].size(1)
    cell = max(2.6, 0.16 * len(labels), min(8, T / DPI))                # inches; at most 64 tokens have room for labels
    figure = palette.figure(columns * (cell + 0.7) + 1.4, len(maps) * (cell + 0.8) + 1.0)
    signed = min(m.min().item() for m in maps) < -1e-6
    bound = max(m.abs().max().item() for m in maps) or 1.0
    scale = ScalarMappable(Normalize(-bound ** 0.5 if signed else 0, bound ** 0.5), 'RdBu_r' if signed else 'Reds')
    grid = figure.subplots(len(maps), columns, squeeze=False)
    for layer, (row, name) in enumerate(zip(grid, names)):
        for head, axes in enumerate(row):
            if head >= maps[layer].size(0):
                axes.set_axis_off()
                continue
            weights = maps[layer][head]
            roots = (weights.sign() * weights.abs().sqrt()).where(weights != 0, torch.nan)
            axes.imshow(roots.numpy(), cmap=scale.cmap, norm=scale.norm, interpolation='nearest')
            axes.set_facecolor('0.9')
            axes.set_title(f'layer {layer}, head {head}, {name}', fontsize=10)
            axes.tick_params(labelsize=9, length=3)
            if labels:
                axes.set_xticks(range(T), labels, fontsize=8, family='monospace',
                                rotation=90 * (max(map(len, labels)) > 1))
                axes.set_yticks(range(T), labels, fontsize=8, family='monospace')
            if signed and T <= LABELLED:                # a grey print shows the size alone
                rows, keys = (weights < -0.02 * bound).nonzero(as_tuple=True)
                axes.plot(keys, rows, '_', color='black', ms=max(2, 40 * cell / T), mew=0.8)
    colour_bar(figure, scale, grid, bound, signed)
    width, height = figure.get_size_inches()
    figure.suptitle(textwrap.fill(title, int(11 * width)), fontsize=11)
    figure.savefig(path, dpi=min(DPI, 15000 / max(width, height)))


def colour_bar(figure, scale, grid, bound, signed):
    """A colour bar labelled with weights, not with their roots."""
    marks = [m for m in (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4) if m <= bound]
    marks = [-m for m in marks[:0:-1]] + marks if signed else marks
    bar = figure.colorbar(scale, ax=grid, shrink=0.6, pad=0.01, aspect=40)
    bar.set_ticks([abs(m) ** 0.5 * (1 if m > 0 else -1) for m in marks], labels=[f'{m:g}' for m in marks], fontsize=9)
    bar.set_label('weight of the key', fontsize=10)


def run(settings):
    """Draw the maps of the checkpoint in out_dir for the first block_size tokens of a text into settings.maps."""
    import sample
    from reporting import hardware
    wanted = sample.SampleConfig(out_dir=settings.out_dir, which=settings.which, dataset=settings.dataset,
                                 data_dir=settings.data_dir)
    prompt = sample.read_prompt(f'FILE:{settings.text}')
    torch.set_num_threads(settings.threads)
    model, meta = sample.load_model(wanted)
    tokenizer = sample.load_tokenizer(wanted, meta, model.config.vocab_size)
    tokens = sample.encode(prompt, tokenizer)
    if len(tokens) > model.config.block_size:
        print(f'bench.py: the text has {len(tokens)} tokens, of which the first {model.config.block_size} are read',
              file=sys.stderr)
        tokens = tokens[:model.config.block_size]
    device = hardware.device(settings.device)
    model.eval().to(device)
    maps = attention_maps(model, torch.tensor([tokens], device=device))
    specs = [variants.match(model.config.attention, f'h.{layer}', 'causal')[1] for layer in range(model.config.n_layer)]
    labels = [label(tokenizer.decode([token])) for token in tokens] if len(tokens) <= LABELLED else []
    title = (f'{os.path.basename(os.path.normpath(settings.out_dir))}, {len(tokens)} tokens of '
             f'{os.path.basename(settings.text)}. Queries downwards, keys to the right; grey: weight 0')
    try:
        draw(settings.maps, maps, [variants.parse_spec(spec).name for spec in specs], labels, title)
    except OSError as error:
        raise UserError(f'{settings.maps}: {error.strerror or error}', 'maps') from None
    return {'part': 'attention', 'file': settings.maps, 'layers': len(maps), 'heads': [m.size(0) for m in maps],
            'specs': specs, 'tokens': len(tokens)}

