"""Which tables README.md and docs/ show, and of which records: the names in `<!-- table NAME -->`."""
import re
from dataclasses import dataclass, field

from reporting.tables import Record, folded, link, markdown

STEPS = {'parameters': 'parameters', 'FLOPs per token': 'FLOPs per token', 'validation loss': 'validation loss'}
SAVINGS = {'validation loss': 'validation loss', 'training FLOPs': 'training FLOPs',
           'times fewer FLOPs to the loss of dense': 'times fewer',
           'seeds that reached it': 'reached'}
TRAINED = {'parameters': 'parameters', 'training FLOPs': 'training FLOPs', 'validation loss': 'validation loss'}


@dataclass
class At:
    """A column of another table: of another part of the record, or of another record. Rows that it lacks are empty there.

    rows: {label in the table's own record: label here} where they differ.
    """
    column: str
    part: str
    record: str = ''
    rows: dict = field(default_factory=dict)

    def cell(self, record, label):
        label = self.rows.get(label, label)
        return record.cell(label, self.column, self.part) if label in record.table(self.part) else ''


@dataclass
class Table:
    """Rows and columns of one table of a record.

    columns: {heading shown: heading in the record, or At}; rows: {label shown: label in the record}, {} for all as they are;
    part: the heading above the table; takes: what the commands take, said where they are folded.
    """
    record: str
    columns: dict
    takes: str
    rows: dict = field(default_factory=dict)
    part: str = ''
    first: str = 'variant'

    def cells(self, record, *others):
        """[(label shown, its cells)]"""
        rows, known = self.rows or {label: label for label in record.table(self.part)}, {r.name: r for r in others}
        return [(shown, [column.cell(known.get(column.record, record), label) if isinstance(column, At)
                         else record.cell(label, column, self.part) for column in self.columns.values()])
                for shown, label in rows.items()]

    def records(self, root):
        """The record of the rows, then others of which columns are."""
        others = [column.record for column in self.columns.values() if isinstance(column, At) and column.record]
        return [Record(root, name) for name in dict.fromkeys([self.record, *others])]

    def text(self, root, page):
        """The table, the record's link and its commands, for a page."""
        records, lines, seeds = self.records(root), [], []
        for shown, found in self.cells(*records):
            lines.append([shown, *(re.sub(r' \(n=\d+\)', '', cell) for cell in found)])
            seeds.append(re.findall(r'\(n=(\d+)\)', ' '.join(found)))
        head = [self.first, *self.columns]
        if any(seeds) and not any('→' in cell for line in lines for cell in line):
            head.append('seeds')
            lines = [[*line, n[0] if n else '1'] for line, n in zip(lines, seeds)]
        spread = '; ± is the standard deviation over seeds' if any('±' in cell for line in lines for cell in line) else ''
        commands = [command for record in records for command in record.commands()]
        return '\n\n'.join([markdown(head, lines), f'From {" and ".join(link(r.name, page) for r in records)}{spread}.',
                            folded(commands, f'the commands ({self.takes})')])


class Crossed(Table):
    """A table of rows x columns; the record has a row 'ROW: COLUMN' for each cell, and one column of results, `part`."""

    def cells(self, record):
        return [(shown, [record.cell(f'{row}: {column}', self.part) for column in self.columns.values()])
                for shown, row in self.rows.items()]


BUDGETS = {name: name for name in ('75%', '50%', '25%')}
SMOLLM2 = {
    'fewer hidden neurons, widths by curvature, `neurons`': 'neurons',
    '`pivot` on top, one budget': 'neurons + pivot',
    'neurons, then 200 steps of refinement per block': 'neurons refined',
    '`pivot` on top, refined': 'neurons + pivot refined',
    'equal widths': 'neurons of equal widths',
    'fitted layer by layer, `neurons_streamed`': 'neurons streamed',
    'the same, refined': 'neurons streamed refined',
    'chosen by leverage, `neurons_leverage`': 'neurons by leverage',
    'by norms, `neurons_norm`': 'neurons by norms',
    'by the Taylor term, `neurons_taylor`': 'neurons by Taylor',
    '`neurons`, healed by the logits, MLPs alone': 'neurons healed by logits',
    '`neurons`, healed by the text': 'neurons healed by labels',
    'low rank on top': 'neurons + low rank',
    '`pivot` and kron(2, 576) on top': 'neurons + kron',
    'low rank, equal ranks, `svd`': 'svd',
    'the same, `svd_whitened`': 'svd_whitened',
    'the same, `svd_whitened_sequential`': 'svd_whitened_sequential',
    'the same, `svd_whitened_streamed`': 'svd_whitened_streamed',
    '`pivot` in its place, `svd_whitened`': 'pivot: svd_whitened',
    'low rank, ranks by curvature, `svd_whitened_hessian`': 'curvature: svd_hessian',
    'the same with 64 exact columns in c_proj': 'exact columns: svd_hessian',
    '`pivot` in place of low rank': 'pivot curvature: svd_hessian',
    'the same, `svd_whitened_hessian_streamed`': 'pivot curvature: svd_hessian_streamed',
    'the same, `svd_whitened_hessian_sequential`': 'pivot curvature: svd_hessian_sequential',
    'the same, `svd_whitened_streamed`, ranks by curvature': 'pivot curvature: svd_whitened_streamed',
    '`pivot` with `kron_pivot(1, 768)` as c_proj, `als_hessian` there': 'pivot mixed curvature: als_hessian',
    'the same, `_streamed`': 'pivot mixed curvature: als_hessian_streamed',
    'sums of kron(1, 768) and kron(2, 576), equal terms, `als`': 'near low rank: als',
    'the same, `als_sequential`': 'near low rank: als_sequential',
    'the same, `als_streamed`': 'near low rank: als_streamed',
    'low rank + 20 square Kronecker terms, `svd_whitened`, `als`': 'sum',
    'ABBA, `van_loan`': 'abba',
    'sums of square Kronecker products, `van_loan`': 'van_loan',
    'the same, `van_loan_normalised`': 'van_loan_normalised',
    'the same, 30% zeroed before by magnitude, `van_loan`': 'magnitude: van_loan',
    'the same, 30% zeroed before by wanda, `van_loan`': 'wanda: van_loan',
    'kron(288, 1536), `prune`': 'prune',
}



def text_of(words, rows=None):
    """Columns of the losses after some text, of the scan over tokens. rows: see At."""
    rows = {'low rank': 'low rank, plain steps'} if rows is None else rows
    return {f'{count}k{words}': At('validation loss', f'tokens x{times}', '2026-11-29_budgets', rows)
            for times, count in ((1, 154), (3, 461), (10, '1,536'))}


SIX_RATES = {rate: f'muon_lr {rate}' for rate in ('0.006', '0.012', '0.024', '0.048', '0.096', '0.192')}
APPROXIMATIONS = '90 minutes on two CPU cores, the note alone 42'

TABLES = {
    'answers': Table('2026-11-29_scratch', {
        'parameters': 'parameters', 'FLOPs per token': 'FLOPs per token', 'loss at equal FLOPs': 'validation loss',
        'beside dense, 95% interval': '95 % interval', **text_of(' tokens, 3 seeds')}, '2 hours on two CPU cores', {
            'dense': 'dense', 'dense, a quarter of the neurons': 'narrow hidden', 'low rank': 'low rank',
            "Kronecker, Spectron's steps": 'kron, spectron', 'dense, `n_embd` 104, 104 neurons': 'narrow both',
            'Kronecker, `n_embd` 104': 'kron, narrow'}, first='MLPs'),
    'kron_mlp': Table('2026-11-29_kron_mlp', {
        'parameters': 'parameters', 'FLOPs per token': 'FLOPs per token', 'tokens': 'tokens',
        'validation loss': 'last val loss', 'beside dense': 'beside the baseline', '95% interval': '95 % interval'},
        '2 minutes a run on two CPU cores', {
            'dense': 'dense', 'MLPs `kron(256, 64)` from scratch': 'kron', 'the same from the dense model': 'from_dense'}),
    'scratch': Table('2026-11-29_scratch', {
        **TRAINED, 'beside dense': 'beside the baseline', '95% interval': '95 % interval'}, '20 minutes on two CPU cores'),
    'budgets': Table('2026-11-29_budgets', {
        'parameters': 'parameters', 'FLOPs per token': 'FLOPs per token', **text_of(' tokens', {}),
        'at 461k, beside fewer neurons': At('95 % interval', 'tokens x3')}, '90 minutes on two CPU cores', part='tokens x3'),
    'muon_rates': Table('2026-11-29_muon_rates', {rate: SIX_RATES[rate] for rate in list(SIX_RATES)[:5]},
                        '20 minutes on two CPU cores', part='The search, every seed', first='MLPs'),
    'product_steps': Table('2026-11-29_product_steps', SIX_RATES, '25 minutes on two CPU cores', {
        f'{size}, {step}': f'{size} {step}' for size in ('rank 8', 'rank 16', 'rank 32', 'width 64', 'width 256')
        for step in ('plain', 'spectron')}, part='The search, every seed', first='all matrices low rank'),
    'recipe_options': Table('2026-11-29_recipe_options', {
        'muon_lr': 'muon_lr', 'validation loss': 'validation loss', 'beside the recipe': 'beside the baseline',
        '95% interval': '95 % interval'}, '17 minutes on two CPU cores'),
    'scratch_adamw': Table('2026-11-21_scratch', TRAINED, 'half an hour on two CPU cores'),
    'where': Table('2026-11-22_where_the_money_is', {**TRAINED, 'beside dense': 'beside the baseline',
                                                     'beside narrow dense': 'beside a narrow dense model'},
                   '50 minutes on one CPU core', {
                       'dense': 'dense', 'narrow dense, 75%': 'narrow 75%', 'attention alone, at 25%': 'attention 75%',
                       'MLP alone, at 62.5%': 'mlp 75%', 'both, at 75%': 'both 75%', 'narrow dense, 50%': 'narrow 50%',
                       'MLP alone, at 25%': 'mlp 50%', 'both, at 50%': 'both 50%'}, first='saved in'),
    'mixture': Table('2026-11-22_mixture', {**STEPS, 'beside static, 2 terms': 'beside the baseline'},
                     '25 minutes on two CPU cores', {
                         'static, 2 terms': 'static 2', 'mixture': 'mixture', 'mixture, one B': 'mixture, one B',
                         'mixture, one A': 'mixture, one A', 'static, 8 terms': 'static 8', 'dense': 'dense'}),
    'growth': Table('2026-11-21_growth', {**TRAINED, 'beside dense': 'beside the baseline'},
                    '40 minutes on two CPU cores'),
    'finish': Table('2026-11-21_finish', {'parameters before the finish': 'parameters before the finish', **TRAINED,
                                          'beside dense': 'beside the baseline'}, '40 minutes on two CPU cores'),
    'growth_savings': Table('2026-11-21_growth', SAVINGS, '40 minutes on two CPU cores', {
        '`copy`': 'from 1 copy/learning_rate=0.005_seed=1', '`zero`': 'from 1 zero/learning_rate=0.008_seed=1',
        '`stack`': 'from 1 stack/learning_rate=0.008_seed=1',
        'from three, frozen until 0.6': 'from 3 copy frozen to 0.6/learning_rate=0.005_seed=1',
        'dense, 0.9 of the steps': 'dense 0.9 of the steps/learning_rate=0.005_seed=1',
        'dense, 0.8 of the steps': 'dense 0.8 of the steps/learning_rate=0.003_seed=1',
        'dense, 0.7 of the steps': 'dense 0.7 of the steps/learning_rate=0.005_seed=1',
        'dense': 'dense/learning_rate=0.005_seed=1'}, part='runs'),
    'finish_savings': Table('2026-11-21_finish', {**SAVINGS, 'rise at the finish': 'switch spike'},
                            '40 minutes on two CPU cores', {
        'kron MLPs until 0.7, `reset`': 'kron to 0.7 reset/learning_rate=0.008_seed=1',
        'kron MLPs until 0.7, `estimate`': 'kron to 0.7 estimate/learning_rate=0.008_seed=1',
        'kron MLPs until 0.7, `reset`, no re-warming': 'kron to 0.7 reset at once/learning_rate=0.008_seed=1',
        'kron MLPs and growth until 0.8, `reset`': 'grow, kron to 0.8 reset/learning_rate=0.004_seed=1',
        'kron MLPs and growth until 0.8, `estimate`': 'grow, kron to 0.8 estimate/learning_rate=0.004_seed=1',
        'low-rank MLPs and values until 0.7, `reset`': 'lowrank to 0.7 reset/learning_rate=0.004_seed=1',
        'low-rank MLPs and values until 0.7, `estimate`': 'lowrank to 0.7 estimate/learning_rate=0.004_seed=1',
        'dense': 'dense/learning_rate=0.004_seed=1'}, part='runs'),
    'drop_in': Table('2026-11-21_drop_in', {'replacements': 'replacements', 'training FLOPs': 'training FLOPs',
                                            'worst spike': 'worst spike', 'validation loss': 'validation loss'},
                     '2 minutes a run on one CPU core', first='order'),
    'attention': Table('2026-11-21_attention', {**STEPS, 'cache, bytes per token': 'cache, bytes per token'},
                       '1.5 to 3 hours on two CPU cores', part='shakespeare_char'),
    'attention_prose': Table('2026-11-21_attention', {**STEPS, 'cache, bytes per token': 'cache, bytes per token'},
                             '1.5 to 3 hours on two CPU cores', part='enwik8_prose'),
    'ranks': Table('2026-11-21_ranks', TRAINED, '18 minutes on two CPU cores'),
    'effects': Table('2026-11-21_approximations', {'effect on the loss': 'effect on the loss',
                                                   '95% over pairs': '95 % over pairs', 'pairs': 'pairs',
                                                   '95% over seeds': '95 % over seeds'},
                     APPROXIMATIONS, part='Main effects', first='switch'),
    'approximations': Table('2026-11-21_approximations', TRAINED, APPROXIMATIONS, {
        name: name for name in ('dense', 'narrow 96', 'narrow 88', 'linformer', 'grow', 'grow+v+abba+linformer',
                                'v+mlp+abba+linformer', 'grow+v+mlp', 'grow+freeze')}),
    'enwik8': Table('2026-11-21_enwik8', {'parameters': 'parameters', 'FLOPs per token': 'FLOPs per token',
                                          'tokens': 'tokens', 'validation loss': 'last val loss'},
                    '14 minutes each on one CPU core, after a download of 36 MB', first='run'),
    'recipe': Table('2026-11-29_recipe', {name: name for name in (
        'nanoGPT, s', 'ours, s', 'loss', 'ours, loss', 'wall x', 'CPU x', 'tokens x')},
                    '12 minutes on two CPU cores, after a clone of nanoGPT', first='threads'),
    'smollm2': Table('2026-11-29_smollm2', BUDGETS, '10 hours on two CPU cores, after two downloads', SMOLLM2),
    'character_neurons': Table('2026-11-29_character_compression', {'zero-shot → healed': '25%'}, '35 minutes on one core', {
        'a quarter of the neurons': 'hidden 128: neurons', 'the same, refined': 'hidden 128: neurons refined',
        'kron(256, 64), `van_loan_normalised`': '256 x 64: nVL', 'kron(256, 64), `als_hessian`': '256 x 64: als_hessian',
        'kron(32, 8, terms=32), `als_hessian`': '32 x 8: als_hessian'}, first='MLPs'),
    'character': Crossed('2026-11-22_character_compression', {
        '`van_loan_normalised`': 'nVL', '`als`': 'als', '`als_sequential`': 'als_sequential', '`als_hessian`': 'als_hessian',
        '`als_sequential_hessian`': 'als_sequential_hessian', 'the same on 98,304 tokens': 'als_sequential_hessian on 98k'},
        '75 minutes on one CPU core', {
            'kron(256, 64)': '256 x 64', 'kron(128, 32, terms=4)': '128 x 32', 'kron(64, 16, terms=15)': '64 x 16',
            'kron(32, 8, terms=32)': '32 x 8'}, part='25%', first='c_fc'),
}
