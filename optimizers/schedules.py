"""Schedules of a run: learning rate, micro-steps per step, sequence length."""
import math

from variants import UserError


def cosine(step, config):
    """From 1 at warmup_iters to 0 at lr_decay_iters, as half a cosine."""
    done = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return 0.5 * (1 + math.cos(math.pi * done))


def wsd(step, config):
    """1, then linear to 0 over the last `cooldown` of lr_decay_iters (warm-up, stable, decay: Hu et al. 2024)."""
    return min(1.0, (config.lr_decay_iters - step) / (config.cooldown * config.lr_decay_iters))


SCHEDULES = {'cosine': cosine, 'wsd': wsd}


def learning_rate(step, config):
    """Learning rate of step 0, 1, ...: linear up to learning_rate, then by lr_schedule to min_lr at lr_decay_iters."""
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= config.lr_decay_iters:
        return config.min_lr
    return config.min_lr + SCHEDULES[config.lr_schedule](step, config) * (config.learning_rate - config.min_lr)


def stages(name, rules):
    """[(fraction of the run, share)] in order, of {0.0: 0.25, 0.5: 1.0} or of the same as a string; {} is 1 throughout.

    Raises UserError for shares that are not in (0, 1], fractions that are not in [0, 1), or none that is 0.
    """
    try:
        found = sorted((float(fraction), float(share)) for fraction, share in (rules or {0: 1}).items())
    except (TypeError, ValueError, OverflowError, AttributeError):
        found = []
    if not found or found[0][0] != 0 or not all(0 <= f < 1 and 0 < s <= 1 for f, s in found):
        raise UserError(f'{name} takes {{fraction of the run: share}} such as {{0: 0.25, 0.5: 1}}, the first fraction 0, '
                        f'got {rules!r}', name)
    return found


def share_at(step, config, name):
    """The share of the current stage at this step."""
    done = step / config.max_iters if config.max_iters else 0.0
    return [share for fraction, share in stages(name, getattr(config, name)) if fraction <= done][-1]


def block_size(step, config):
    """Tokens per sequence at this step: block_schedule's share of block_size. Rows are split; tokens per step stay."""
    return length_at(share_at(step, config, 'block_schedule'), config)


def check(config):
    """UserError for a stage of either schedule, however late it comes, that no step could follow."""
    stages('batch_schedule', config.batch_schedule)
    for _, share in stages('block_schedule', config.block_schedule):
        length_at(share, config)


def length_at(share, config):
    """Tokens per sequence at a share of block_size, which they must divide."""
    length = round(config.block_size * share)
    if length < 1 or config.block_size % length:
        raise UserError(f'block_schedule makes sequences of {length} tokens, which do not divide block_size '
                        f'({config.block_size}); take shares such as 0.5 or 0.25', 'block_schedule')
    return length


class Rounds:
    """Micro-steps per rank by batch_schedule: count(step) of a step, before(step) of all earlier steps.

    accumulation: micro-steps of a full step over all ranks. Counted in rounds, in which every rank takes one, so that
    the order of the data follows from the step alone.
    """

    def __init__(self, config, accumulation, world_size):
        self.full, self.begins = accumulation // world_size, []     # [(first step, rounds per step, rounds before)]
        before = last = rounds = 0
        for fraction, share in stages('batch_schedule', config.batch_schedule):
            first = math.ceil(fraction * config.max_iters)
            before += (first - last) * rounds
            last, rounds = first, max(1, round(self.full * share))
            self.begins.append((first, rounds, before))

    def count(self, step):
        return next(rounds for first, rounds, _ in reversed(self.begins) if first <= step)

    def before(self, step):
        return next(before + (step - first) * rounds for first, rounds, before in reversed(self.begins) if first <= step)
