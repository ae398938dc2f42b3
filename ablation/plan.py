"""The runs of a grid: configuration, arguments, and the controls that are trained with the variants."""
import functools
import itertools
import os

import configurator
from ablation import axes, cost
from ablation.grid import SEEDS, Run, argument, first_runs, placeholders, runs_on, settings_of
from ablation.runner import ROOT
from data.dataset import open_dataset
from pretrained import sources

PLACES = 'data_dir', 'dataset', 'init_from'             # settings that name what a run reads


def first_choice(grid):
    return tuple((name, values[0]) for name, values in grid.search.items())


class Plan:
    """A grid with the settings that the command line adds to every run."""

    def __init__(self, grid, passed=()):
        self.grid, self.passed = grid, tuple(passed)
        self.base, self.scaled = functools.cache(self.base), functools.cache(self.scaled)

    def config(self, *more):
        return cost.with_vocabulary(configurator.load([self.grid.base, *more]))

    def load(self, run):
        """The Config of a run, as train.py will read it. Raises UserError."""
        return self.config(*self.arguments(run)[1:])

    def base(self, task):
        """The Config of the dense base on a task, whether or not it is a variant."""
        return self.config(*(argument(name, value) for name, value in self.grid.tasks[task].items()), *self.passed)

    def scaled(self, task, variant, searched):
        """equal=flops: arguments that give a variant the training FLOPs of the dense base; none for equal tokens."""
        if self.grid.equal == 'tokens':
            return ()
        config = self.config(*settings_of(Run(task, variant, searched, SEEDS[0]), self.grid, self.passed))
        flops = cost.training_cost(self.base(task))['flops']
        return tuple(argument(name, value) for name, value in cost.steps_for(config, flops).items())

    def arguments(self, run):
        """The command line of a run for train.py, without its out_dir."""
        return [self.grid.base, *settings_of(run, self.grid, self.passed), *self.scaled(
            run.task, run.variant, run.searched)]

    def check(self):
        """Every variant on every task must be a model that train.py accepts. Raises UserError."""
        for run in first_runs(self.grid):
            if run.searched == first_choice(self.grid):
                cost.check_model(self.load(run))

    def places(self):
        """{data set's folder or source of weights: its reader} of all runs, in order, as train.py sees them in ROOT."""
        grid, found = self.grid, {}
        searched = [[(name, value) for value in grid.search[name]] for name in PLACES if name in grid.search]
        for task, variant in itertools.product(grid.tasks, grid.variants):
            for values in itertools.product(*searched) if runs_on(grid, variant, task) else ():
                own = {name: value for name, value in grid.variants[variant].items() if name in PLACES} | dict(values)
                config = self.config(*(argument(*pair) for pair in grid.tasks[task].items()), *self.passed,
                                     *(argument(*pair) for pair in own.items()))
                found[os.path.join(ROOT, config.data_dir, config.dataset)] = open_dataset
                if config.init_from not in ('scratch', 'resume'):
                    found[config.init_from] = self.read_source
        return found

    def check_places(self):
        """Read every data set and source of weights once, before the first run. Raises UserError for one that is missing."""
        for place, read in self.places().items():
            read(place)

    def read_source(self, init_from):
        """Read the weights that runs begin from; those of a run of this grid may come later."""
        place = os.path.join(ROOT, os.path.expanduser(init_from))
        if os.path.commonpath([place, os.path.abspath(self.grid.out_dir)]) != os.path.abspath(self.grid.out_dir):
            sources.read(place if os.path.exists(place) else sources.find(init_from))

    def structured(self):
        """The variants whose matrices or attention differ from the base's."""
        return [name for name, settings in self.grid.variants.items() if {'linear', 'attention', 'mlp'} & set(settings)]

    def add_controls(self):
        """Add the dense base and narrower dense models: one hidden size for each parameter count of a variant."""
        grid, task = self.grid, next(iter(self.grid.tasks))
        if not grid.controls or not (grid.axes or grid.ranks):
            return
        base, measure = self.base(task), grid.budget_of if grid.ranks else 'parameters'
        sizes = {grid.budget * cost.size_of(base, measure)} if grid.ranks else {
            cost.size_of(self.load(Run(task, name, first_choice(grid), SEEDS[0])), 'parameters')
            for name in self.structured() if not placeholders(grid.variants[name], grid.ranks)}
        widths = {cost.narrow_width(base, size, measure) for size in sizes} - {base.n_embd}
        controls = {axes.DENSE: {}, **{f'narrow {width}': {'n_embd': width} for width in sorted(widths, reverse=True)}}
        grid.variants = {**controls, **grid.variants}
