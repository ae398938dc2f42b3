"""loss.png: the losses of one run over its steps."""
import os

from reporting import palette

SKIPPED = 0.1                           # share of the steps that does not set the range of the losses


def limits(steps, evals):
    """(low, high) of the loss axis, from all but the first tenth of the run, which falls from ln(vocab_size); None for all.

    Of the steps' losses the highest 0.5 % do not count either, so that a spike does not flatten the rest.
    """
    end = max([line['step'] for line in steps + evals], default=0)
    late = sorted(line['loss'] for line in steps if line['step'] >= SKIPPED * end)
    seen = [line[name] for line in evals if line['step'] >= SKIPPED * end for name in ('train_loss', 'val_loss')]
    seen += late[:max(1, round(0.995 * len(late)))]
    if len(steps) < 20 or len(seen) < 2 or not all(abs(value) < 1e6 for value in seen):
        return None
    room = 0.06 * (max(seen) - min(seen)) or 0.1
    return min(seen) - room, max(seen) + room


def draw(folder, lines, figures='png'):
    """loss.png from the lines of log.jsonl: the loss of each step's batch, training and validation loss at evaluations."""
    steps = [line for line in lines if 'loss' in line]
    evals = [line for line in lines if 'val_loss' in line and 'train_loss' in line]
    picture = palette.figure(7, 4)
    axes = picture.subplots()
    axes.plot([s['step'] for s in steps], [s['loss'] for s in steps], color=palette.PALE, linewidth=0.8,
              label="loss of the step's own batch")
    for index, name in enumerate(('train_loss', 'val_loss')):
        axes.plot([e['step'] for e in evals], [e[name] for e in evals], **palette.style(index), markersize=4.5,
                  linewidth=1.3, label=name.replace('_', ' '))
    axes.set(xlabel='training step', ylabel='loss, nats per token', title=os.path.basename(os.path.normpath(folder)))
    found = limits(steps, evals)
    if found:
        axes.set_ylim(*found)
        first = steps[0]['loss']
        if first > found[1]:
            axes.annotate(f'from {first:.2f}', (0.015, 0.985), xycoords='axes fraction', va='top', fontsize=8,
                          color=palette.GREY, rotation=90)
    axes.grid(alpha=0.25)
    axes.legend(loc='upper right')
    palette.save(picture, os.path.join(folder, 'loss.png'), figures, dpi=120)
