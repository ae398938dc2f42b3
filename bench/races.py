"""What a race against nanoGPT found: medians for each number of threads, and the table."""
import platform
import statistics

from bench import tables


def processor():
    """The name of this machine's processor; claims of speed name it."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            names = [line.partition(':')[2].strip() for line in file if line.startswith('model name')]
    except OSError:
        names = []
    return (names or [platform.processor() or platform.machine()])[0]


def summaries(rounds):
    """{number of threads: summary of its rounds}, the numbers as JSON has them."""
    counts = sorted({row['threads'] for row in rounds})
    return {str(count): summary([row for row in rounds if row['threads'] == count]) for count in counts}


def summary(rounds):
    """Medians over the rounds."""
    def median(*path):
        values = rounds
        for name in path:
            values = [value[name] for value in values]
        return statistics.median(values)
    found = {name: median(name) for name in ('wall_ratio', 'cpu_ratio', 'tokens_ratio')}
    found.update({f'{side}_{name}': median(side, name) for side in ('parent', 'ours') for name in (
        'wall_s', 'cpu_s', 'tokens', 'val_loss')}, reached=all(row['reached'] for row in rounds))
    if 'full' in rounds[0]:
        found.update(full_val_loss=median('full', 'val_loss'), full_wall_s=median('full', 'wall_s'),
                     full_within=all(row['full']['within'] for row in rounds))
    return found


def text(result):
    """The processor, one line per seed and number of threads, then the medians."""
    lines = [['threads', 'seed', 'nanoGPT, s', 'CPU s', 'tokens', 'loss', 'ours, s', 'CPU s', 'tokens', 'loss', 'wall x',
              'CPU x', 'tokens x', 'loss in its time']]
    for row in result['rounds']:
        lines.append([str(row['threads']), str(row['seed']), *(cell for side in ('parent', 'ours') for cell in (
            f'{row[side]["wall_s"]:.1f}', f'{row[side]["cpu_s"]:.1f}', f'{row[side]["tokens"]:,}',
            f'{row[side]["val_loss"]:.4f}')), *(f'{row[f"{name}_ratio"]:.1f}' for name in ('wall', 'cpu', 'tokens')),
            f'{row["full"]["val_loss"]:.4f}' if 'full' in row else ''])
    facts = result['machine']
    return '\n\n'.join([f'{facts["processor"]}, torch {facts["torch"]}', tables.aligned(lines),
                        *(f'{threads} threads: {medians(found)}' for threads, found in result['summary'].items())])


def medians(found):
    """A summary in words."""
    full = f'; in its whole wall-clock time ours reaches {found["full_val_loss"]:.4f}' if 'full_val_loss' in found else ''
    return (f'ours takes 1/{found["wall_ratio"]:.1f} of the wall-clock time, 1/{found["cpu_ratio"]:.1f} of the CPU time and '
            f'1/{found["tokens_ratio"]:.1f} of the tokens (medians){full}') + (
                '' if found['reached'] else '; NOT every run reached the loss')
