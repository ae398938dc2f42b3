"""Rank search: optuna draws ranks that fit a budget, trains with them and prunes bad trials."""
from ablation import cost
from ablation.grid import SEEDS, Run, placeholders, runs_on, with_seeds
from ablation.plan import first_choice
from variants import UserError

DRAWS = 200                             # ranks drawn for one trial before the smallest are taken


def searched_variants(grid):
    """[(task, variant)] whose specs contain a {rank}."""
    return [(task, variant) for task in grid.tasks for variant, settings in grid.variants.items()
            if placeholders(settings, grid.ranks) and runs_on(grid, variant, task)]


def check(plan):
    """Refuse invalid ranges, ranks that save nothing and budgets below the cost of the lowest ranks: UserError."""
    grid = plan.grid
    if not grid.ranks:
        return
    for name, bounds in grid.ranks.items():
        if len(bounds) != 2 or not all(type(b) is int for b in bounds) or not 1 <= bounds[0] <= bounds[1]:
            raise UserError(f'ranks: {name!r} takes [lowest, highest] with 1 <= lowest <= highest, got {bounds!r}', 'ranks')
        if not any(name in placeholders(settings, grid.ranks) for settings in grid.variants.values()):
            raise UserError(f'ranks: no variant has {{{name}}} in its specs', 'ranks')
    if not grid.budget:
        raise UserError("a search of ranks needs a budget: the share of the dense base's parameters or FLOPs, such as 0.5",
                        'budget')
    for task, variant in searched_variants(grid):
        names = placeholders(grid.variants[variant], grid.ranks)
        for end in (1, 0):                              # the highest ranks: the model refuses one that saves nothing
            run = Run(task, variant, tuple((n, grid.ranks[n][end]) for n in names) + first_choice(grid), SEEDS[0])
            config = plan.load(run)
            cost.check_model(config)
        least, most = cost.size_of(config, grid.budget_of), limit(plan, task)
        if least > most:
            whole = most / grid.budget
            raise UserError(f'budget={grid.budget:g} is {most:,.0f} {grid.budget_of}, below the {least:,} that {variant} '
                            f'needs with the lowest ranks; take {least / whole + 5e-4:.3f} or more', 'budget')


def limit(plan, task):
    """The budget in parameters or training FLOPs: a share of the dense base's on this task."""
    return plan.grid.budget * cost.size_of(plan.base(task), plan.grid.budget_of)


class Search:
    """The trials of one (task, variant): take() as Queue's, then the best of them with the other seeds by `confirmed`."""

    def __init__(self, queue, plan, task, variant):
        self.queue, self.grid, self.task, self.variant, self.load = queue, plan.grid, task, variant, plan.load
        self.names, self.limit = placeholders(self.grid.variants[variant], self.grid.ranks), limit(plan, task)
        optuna = queue.optuna
        with queue.held:
            self.study = queue.make_study(
                f'ranks of {task} {variant}'.replace('  ', ' '),
                sampler=optuna.samplers.TPESampler(seed=SEEDS[0], multivariate=True, constant_liar=True, n_startup_trials=6),
                pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=0))

    def ended(self):
        """{run: loss, inf where it was pruned or failed} of this search's trials that were trained."""
        states, found = self.queue.states, {}
        for trial in self.queue.trials(self.study, states.COMPLETE, states.PRUNED, states.FAIL):
            known = trial.state != states.FAIL or 'error' in trial.user_attrs
            if 'run' in trial.user_attrs and known:
                found[self.queue.run_of(trial)] = trial.value if trial.state == states.COMPLETE else float('inf')
        return found

    def take(self):
        """(study, trial, run, watch) of the next trial; 'wait' while the last ones run; None when all have ended."""
        queue, states = self.queue, self.queue.states
        with queue.held:
            self.take_back()
            running = len(queue.trials(self.study, states.RUNNING, states.WAITING))
            waiting = queue.trials(self.study, states.WAITING)
            if not waiting and len(self.ended()) + running >= self.grid.trials:
                return 'wait' if running else None
            trial, run = self.draw()
            return self.study, trial, run, lambda step, loss: self.goes_on(trial, step, loss)

    def take_back(self):
        """Enqueue the trials of dead processes again with the same ranks, unless their folder is done."""
        for trial in self.queue.trials(self.study, self.queue.states.RUNNING):
            dead = not self.queue.worker.alive(trial.user_attrs.get('worker', 'nobody'))
            if dead and trial.params and self.queue.folder_says(trial)[0] not in ('done', 'pruned'):
                self.study.enqueue_trial(trial.params)
        self.queue.give_back(self.study)

    def draw(self):
        """A new trial whose ranks fit the budget; ranks that do not fit are drawn again, at no cost."""
        before, attempt = self.ended(), 0
        while True:
            attempt += 1
            if attempt == DRAWS:
                self.study.enqueue_trial({name: self.grid.ranks[name][0] for name in self.names})
            trial = self.queue.own(self.study.ask())
            values = [(name, trial.suggest_int(name, *self.grid.ranks[name], log=True)) for name in self.names]
            values += [(name, trial.suggest_categorical(name, list(v))) for name, v in self.grid.search.items()]
            run = Run(self.task, self.variant, tuple(values), SEEDS[0])
            fits = cost.size_of(self.load(run), self.grid.budget_of) <= self.limit
            if fits and run not in before or attempt == DRAWS:
                trial.set_user_attr('run', self.queue.described(run))
                return trial, run
            known = before.get(run, float('inf'))       # over the budget counts as pruned
            if known < float('inf'):
                self.study.tell(trial, known)
            else:
                self.study.tell(trial, state=self.queue.states.PRUNED)

    def goes_on(self, trial, step, loss):
        """Report an evaluation to the pruner; False when the run is worse than the median of the others at that step."""
        with self.queue.held:
            trial.report(loss, step)
            return not trial.should_prune()

    def confirmed(self):
        """The best trials with the other seeds, when the search has ended; else nothing."""
        ended = self.ended()
        if len(ended) < self.grid.trials:
            return []
        best = sorted((run for run in ended if ended[run] < float('inf')), key=ended.get)[:self.grid.confirm]
        return [other for run in best for other in with_seeds(run, self.grid)]


def describe(grid):
    """One line per search, for --dry_run."""
    lines = []
    for task, variant in searched_variants(grid):
        ranges = ['{} {}..{}'.format(n, *grid.ranks[n]) for n in placeholders(grid.variants[variant], grid.ranks)]
        lines.append(f'{task} {variant}: {grid.trials} trials of {", ".join(ranges)}, then the best {grid.confirm} with '
                     f'{grid.seeds - 1} more seeds'.strip())
    return lines
