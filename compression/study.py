"""A compression study: its settings, its variants, the trials that they make. Imports no torch."""
import json
from dataclasses import dataclass

import configurator
from ablation.grid import SEEDS, check_name, check_settings
from commandline import bounds
from configfile import number
from configurator import key
from reporting import palette
from variants import UserError, did_you_mean

DENSE = 'dense'                         # the variant that changes nothing; always present
WHOLE = 1 << 62                         # stop of a text that is a whole split


@dataclass
class Study:
    """Settings of compress.py."""
    source: str = key('', 'the dense model: a folder, a .gguf, or a name on the hub')
    train: str = key('', 'in place of source: config file of a dense model, trained into out_dir once per seed')
    models: int = key(1, 'with train: number of dense models, each with its own seed', low=1)
    out_dir: str = key('', 'folder of the results; default out/<name of the study file>')
    dataset: str = key('', 'data set: its train split is used for calibration and healing')
    data_dir: str = key('data', 'folder that holds the data set folders')
    block_size: int = key(0, "context of calibration, evaluation and healing, tokens; 0 = the source's", low=0)
    sites: str = key('h.*.mlp.*', 'pattern of the matrices whose parameters the budgets count')
    budgets: dict = key({}, "{label: share of the dense parameters of `sites`}; 0 = the sizes in the variants")
    variants: dict = key({}, '{name: {setting: value}}, the settings of compression.study.Variant')
    calibration_tokens: int = key(65536, 'training tokens of a calibration', low=1)
    calibration_seeds: int = key(1, 'calibrations per variant, each on other text', low=1)
    gradient_tokens: int = key(0, 'of these the tokens that gradients are measured on, which takes longest; 0 = all', low=0)
    select: str = key('', 'tokens on which choices are made, SPLIT:START:STOP, or SPLIT')
    test: str = key('', 'tokens of the table, on which no choice is made, SPLIT:START:STOP, or SPLIT')
    score: str = key('all', "scored tokens of a text: 'all' but its first; 'inside' = all but the first of each window, and "
                     'whole windows only, as published perplexities', choices=('all', 'inside'))
    heal: dict = key({}, 'settings of train.py for the healing runs')
    baseline: str = key('', 'a method: the report has the share of its gap to the dense model that others close')
    only: str = key('', 'names of variants to run now, with commas, a * for any letters; default all')
    keep: bool = key(False, 'keep compressed and healed models as checkpoints, for export.py and sample.py')
    threads: int = key(1, 'CPU threads', low=1)
    device: str = key('auto', "'auto' = cuda, else cpu; 'cpu', 'cuda', 'cuda:1'")
    weights: str = key('float32', 'type in which models are kept; in half precision they compute in float32, one block at a '
                       'time', choices=('float32', 'bfloat16', 'float16'))
    memory_gb: float = key(0.0, 'memory of the device to plan for, 10^9 bytes; 0 = what a GPU has', low=0)
    prepare: str = key('', 'the command that makes the data set, said where it is missing; SOURCE and FOLDER are put in')
    published: str = key('', "figures of others to show in the report beside one's own", choices=('', 'wikitext2'))
    dry_run: bool = key(False, 'print the trials, their rules and parameters, and stop')
    figures: str = key('png', palette.HELP, choices=palette.KINDS)
    record: str = key('', 'name of a record to write to records/<date>_NAME')
    title: str = key('', 'title of the record')
    note: str = key('', 'a paragraph for the record: what a reader needs to know')
    debug: bool = key(False, 'print a traceback for user errors too')


@dataclass
class Variant:
    """One way to compress. A budget that it does not fit is a failed trial."""
    linear: dict | str = key({}, 'rules of the site language; the first size of each spec is chosen to fill the budget')
    decompose: str = key('van_loan', 'method, as train.py takes it')
    sizes: str = key('uniform', "how the budget is shared: the same fraction everywhere; by the 'spectrum' of outputs; by "
                     "the 'curvature' of the loss; 'given' = as the rules say",
                     choices=('uniform', 'spectrum', 'curvature', 'given'))
    narrow: str = key('', "what becomes narrower first: 'mlp' = hidden neurons, 'heads' = groups of heads, 'values' = "
                      'features of value heads; with commas several')
    split: float = key(0.0, 'with narrow and linear: budget of the widths over the whole one; 0 = by predicted nats', low=0)
    mlp: dict | str = key('', "with sizes='given': the MLP of each block, as train.py takes it")
    attention: dict | str = key('', "with sizes='given': the attention of each block")
    prune_before: str = key('none', 'set weights to zero first', choices=('none', 'magnitude', 'wanda'))
    prune_fraction: float = key(0.0, 'share of the weights that prune_before sets to zero', low=0)
    refine: int = key(0, 'steps in which each block learns to meet the dense one, as train.py takes them; 0 = off', low=0)
    refine_learning_rate: float = key(0.01, "their peak learning rate, as a share of a weight's rms", low=0)
    refine_parameters: str = key('mlp', 'what learns', choices=('mlp', 'block'))
    refine_error: str = key('mse', 'how errors are weighed', choices=('mse', 'curvature'))
    calibration_tokens: int = key(0, "training tokens; 0 = the study's", low=0)
    calibration_seeds: int = key(0, "calibrations; 0 = the study's", low=0)
    budgets: str = key('', 'labels of the budgets, with commas; default all')
    heal: str = key('', 'labels of the budgets after which a healing run follows, with commas')
    heal_settings: dict = key({}, "settings of its healing runs besides the study's; distill='dense' = by its source")
    at: dict = key({}, '{label of a budget: {setting: value}}: what differs there')


# settings that older results do not have: left out of signatures while they are off, so that those results stay valid
LATER = ('narrow', 'split', 'mlp', 'attention', 'refine', 'refine_learning_rate', 'refine_parameters', 'refine_error')
LATER_SHARED = ('score', 'weights', 'gradient_tokens')


@dataclass(frozen=True)
class Trial:
    """One compressed model. source: index of the dense model; seed: of the calibration text."""
    variant: str
    budget: str
    source: int
    seed: int

    def __str__(self):
        words = (self.variant, self.budget, f'source={self.source}' * bool(self.source), f'seed={self.seed}')
        return ' '.join(filter(None, words))


def labels(text):
    return [label.strip() for label in text.split(',') if label.strip()]


def settings_of(study, name, label):
    """The Variant of that name at one budget; raises UserError."""
    given = dict(study.variants.get(name, {}))
    at = given.get('at') or {}
    if not isinstance(at, dict) or not all(isinstance(values, dict) for values in at.values()):
        raise UserError(f"variants: {name!r}: at takes {{budget: {{setting: value}}}}, got {bounds.shown(at)}", 'variants')
    for values in (given, at.get(label, {})):
        for setting in values:
            known = configurator.settings(Variant)
            if setting not in known:
                raise UserError(f'variants: {name!r}: there is no setting {setting!r}{did_you_mean(setting, known)}')
    values, known = given | at.get(label, {}), configurator.settings(Variant)
    try:
        found = Variant(**{setting: configurator.coerce(known[setting], value) for setting, value in values.items()})
    except UserError as error:
        raise UserError(f'variants: {name!r}: {error}', 'variants') from None
    found.calibration_tokens = found.calibration_tokens or study.calibration_tokens
    found.calibration_seeds = found.calibration_seeds or study.calibration_seeds
    return found


def signature(study, trial):
    """The settings that a result depends on, as text: a trial whose settings have changed runs again."""
    values = configurator.as_dict(settings_of(study, trial.variant, trial.budget))
    apart = ('budgets', 'heal', 'heal_settings', 'at', 'calibration_seeds')
    plain = configurator.as_dict(Variant())
    values = {name: value for name, value in values.items() if name not in apart and (
        name not in LATER or value != plain[name])}
    shared = {name: getattr(study, name) for name in ('source', 'train', 'dataset', 'block_size', 'sites', 'select', 'test')}
    shared |= {name: getattr(study, name) for name in LATER_SHARED if getattr(study, name) != getattr(Study(), name)}
    return json.dumps([values, study.budgets.get(trial.budget), shared], sort_keys=True)


def heal_settings(study, trial):
    """Settings of train.py for the healing run of a trial, {} where there is none."""
    variant = settings_of(study, trial.variant, trial.budget)
    wanted = trial.budget in labels(variant.heal) or trial.variant == DENSE and study.variants.get(DENSE, {}).get('heal')
    return {**study.heal, **variant.heal_settings} if wanted and trial.seed == SEEDS[0] else {}


def trials(study):
    """All trials in the order in which they run: model after model, on the first calibration seed, then on the others."""
    found = []
    for index in range(len(SEEDS)):
        for source in range(study.models):
            found += [Trial(DENSE, '', source, SEEDS[0])] * (index == 0)
            for label in study.budgets:
                for name in study.variants:
                    variant = settings_of(study, name, label)
                    if name == DENSE or label not in (labels(variant.budgets) or study.budgets):
                        continue
                    if index < variant.calibration_seeds:
                        found.append(Trial(name, label, source, SEEDS[index]))
    return found


def slice_of(text, name='select'):
    """(split, start, stop) of SPLIT:START:STOP, or of SPLIT, whose stop is WHOLE; raises UserError."""
    parts = text.split(':')
    if len(parts) == 1 and text:
        return text, 0, WHOLE
    numbers = [int(part) for part in parts[1:] if part.isdecimal()]
    if len(parts) != 3 or not parts[0] or len(numbers) != 2 or numbers[1] - numbers[0] < 2:
        raise UserError(f"{name} is SPLIT:START:STOP with at least 2 tokens, as 'val:0:8192', or SPLIT, got {text!r}", name)
    return parts[0], *numbers


def check(study):
    """Refuse what can be refused without torch."""
    if bool(study.source) == bool(study.train):
        raise UserError('a study needs either `source`, a dense model, or `train`, the config file of one')
    for name in ('dataset', 'budgets', 'variants'):
        if not getattr(study, name):
            raise UserError(f'a study needs `{name}`; name a file of config/compression/')
    if study.source and study.models > 1:
        raise UserError(f'models={study.models} needs `train`: one `source` is one model', 'models')
    if study.calibration_seeds > len(SEEDS) or study.models > len(SEEDS):
        raise UserError(f'there are {len(SEEDS)} seeds; lower calibration_seeds and models', 'calibration_seeds')
    if study.memory_gb and study.weights == 'float32':
        raise UserError(f"memory_gb={study.memory_gb:g} is for weights='bfloat16' or 'float16'; set one", 'memory_gb')
    check_settings('heal', study.heal, (), 'heal')
    for label, share in study.budgets.items():
        check_name('budgets', label)
        if not isinstance(label, str) or not number(share) or not 0 <= share < 1:
            raise UserError(f'budgets: {label!r} needs a share from 0 to below 1, got {share!r}', 'budgets')
    a, b = (slice_of(getattr(study, name), name) for name in ('select', 'test'))
    if a[0] == b[0] and a[1] < b[2] and b[1] < a[2]:
        raise UserError(f'select ({study.select}) and test ({study.test}) overlap, and test must be fresh text', 'test')
    for name, given in study.variants.items():
        if not isinstance(name, str) or ',' in name or not isinstance(given, dict):
            raise UserError(f'variants: a name without commas needs a dict of settings, got {name!r}: {given!r}', 'variants')
        check_name('variants', name)
        check_variant(study, name)


def check_variant(study, name):
    for label in study.budgets:
        variant = settings_of(study, name, label)
        check_settings(f'variants: {name!r}: heal_settings', variant.heal_settings, (), 'variants')
        for kind, named in (('budgets', labels(variant.budgets)), ('heal', labels(variant.heal)), ('at', variant.at)):
            for other in named if name != DENSE else ():
                if other not in study.budgets:
                    raise UserError(f'variants: {name!r}: {kind} names {other!r}, which is none of the budgets '
                                    f'{", ".join(study.budgets)}', 'variants')
        widths = [key for key in ('mlp', 'attention') if getattr(variant, key)]
        if widths and variant.sizes != 'given':
            raise UserError(f"variants: {name!r}: {widths[0]} is for sizes='given'; narrow chooses widths", 'variants')
        if variant.narrow and variant.sizes not in ('uniform', 'curvature') or variant.narrow and variant.linear and (
                variant.sizes != 'curvature'):
            raise UserError(f"variants: {name!r}: narrow takes sizes='curvature', or 'uniform' without linear, got "
                            f'{variant.sizes!r}', 'variants')
        if variant.refine and study.weights != 'float32':
            raise UserError(f"variants: {name!r}: refine trains the weights; it needs weights='float32', got "
                            f'{study.weights!r}', 'variants')
        if name != DENSE and study.budgets[label] == 0 and variant.sizes != 'given':
            raise UserError(f"variants: {name!r}: the budget {label!r} is 0, by which no sizes can be chosen; take "
                            "sizes='given' and write them", 'variants')
