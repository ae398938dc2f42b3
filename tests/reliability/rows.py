"""Which tests stand for the rows R1 to R20, and what nanoGPT does where that was measured.

A row's tests are PATH::FUNCTION, over all their parameters; `controls` are tests of the tests: what must be noticed.
nanoGPT's figures are of commit 3adf61e, measured once, on another machine.
"""
from typing import NamedTuple


class Row(NamedTuple):
    """One row of docs/reliability.md."""
    what: str
    survived: str                       # what is counted as survived
    tests: dict                         # {path: names of functions}
    nanogpt: str = ''
    controls: dict = {}


R = 'tests/reliability/'
FILES, PROCESSES, SHARDED, OUTSIDE, KILLS, RESUME, FAULTS, PARALLEL = (f'{R}test_{name}.py' for name in (
    'checkpoint_files', 'processes', 'sharded', 'outside', 'kills', 'resume', 'faults', 'parallel'))
TRAIN, DATA, IDENTITY = 'tests/training/test_train.py', 'tests/data/test_data.py', 'tests/data/test_identity.py'
SOURCES, COMMAND = 'tests/data/test_data_sources.py', 'tests/commandline/test_'

ROWS = {
    'R1': Row('SIGKILL of the process at random moments: import, first step, steps, evaluation, save; over Kronecker sums, '
              'growth, drop-in and dense finish, each with AdamW and Muon', 'the end has the bits of a run that '
                                        'nobody killed',
              {KILLS: 'test_r1_twenty_five_sigkills_over_structures_and_optimizers',
               PROCESSES: 'test_r1_five_sigkills_and_the_same_bits',
               'tests/growth/test_dropin.py': 'test_a_killed_process_goes_on_in_the_middle_of_a_drop_in'},
              'of 20: 15 left a readable checkpoint, 5 lost the only one; a resume has other bits (R5)'),
    'R2': Row('a save is killed after each of its file operations, and inside its writes; so is setting a run aside',
              'the old or the new state, never a mixture; the next save works',
              {FILES: 'test_r2_killed_after_every_operation test_r2_a_damaged_step_is_saved_again '
                      'test_set_aside_killed_after_every_operation',
               SHARDED: 'test_a_save_of_a_folder_killed_after_any_operation_leaves_the_old_or_the_new'},
              controls={FILES: 'test_r2_would_catch_a_writer_in_place'}),
    'R3': Row('the power goes at any moment of a save: every disk that may be left, with what was not synced gone',
              'the old or the new state', {FILES: 'test_r3_writes_that_were_not_synced_are_lost'},
              controls={FILES: 'test_r3_would_catch_a_save_that_does_not_sync'}),
    'R4': Row('mutants: a part of the checkpoint is dropped, swapped or off by one', 'the test of equal bits notices',
              {TRAIN: 'test_r4_a_checkpoint_that_lost_something_is_noticed test_fp16_scaler_is_restored',
               RESUME: 'test_r4_a_resume_without_it_is_told_by_its_bits_or_refused'},
              'its own resume loses the data position: loss 4.089 and not 4.188 at the first resumed step'),
    'R5': Row('resume after the first step, before, at and after a change of the model, and before the end; all pairs of '
              'dense, kron, lowrank, abba; causal, linformer, mla, dint; AdamW, Muon; growing, frozen, made dense',
              'the same bits of weights and optimizer, the same losses',
              {RESUME: 'test_r5_resume_from_any_step_ends_in_the_same_bits', TRAIN: 'test_resume_is_bit_exact',
               'tests/growth/test_growth.py': 'test_runs_that_grow_or_become_dense_resume_to_the_same_bits',
               'tests/growth/test_dropin.py': 'test_runs_that_drop_in_resume_to_the_same_bits',
               'tests/growth/test_guided.py': 'test_guided_runs_resume_to_the_same_bits'},
              'weights 3.7e-3 apart after 40 steps', {TRAIN: 'test_another_seed_changes_it'}),
    'R6': Row('the newest or the only checkpoint is damaged: flipped bits, truncations, zeroed pages, manifests, shards',
              'the one before is used, with one warning; or one line; never wrong values',
              {FILES: 'test_r6_a_damaged_newest_checkpoint_is_passed_over '
                      'test_r6_a_damaged_manifest_never_gives_wrong_values '
                      'test_r6_the_only_checkpoint_is_damaged test_r6_several_damaged_ones',
               RESUME: 'test_r6_a_run_goes_on_from_the_one_before_and_ends_in_the_same_bits',
               SHARDED: 'test_a_damaged_folder_costs_one_line_and_the_older_one_is_taken'},
              'torch.load: 251 of 260 flips and zeroed pages read with wrong values, silently; all 60 truncations raise',
              {FILES: 'test_r6_torch_alone_would_let_it_pass'}),
    'R7': Row('files made to harm: code, huge sizes, bombs, depth, names that lead elsewhere, odd contents under a manifest '
              'that fits; as checkpoint, shards, meta.json, meta.pkl and foreign model',
              'no code runs; one line, in 2 s and 1 GiB',
              {FILES: 'test_r7_hostile_files_are_refused test_r7_hostile_manifests test_r7_a_manifest_is_short '
                      'test_r7_contents_must_agree_with_the_name',
               OUTSIDE: 'test_odd_contents_are_one_line',
               SHARDED: 'test_nothing_in_a_folder_is_run_and_dcps_own_index_would_be '
                        'test_folders_that_lie_are_refused_whatever_their_manifest_says',
               DATA: 'test_hostile_meta_is_refused_in_one_line test_what_is_no_meta_is_refused_in_one_line '
                     'test_mutated_meta_never_ends_in_a_traceback test_nanogpt_folders_are_announced_and_no_pickle_is_run',
               IDENTITY: 'test_a_pickle_that_is_not_nanogpts_is_refused '
                         'test_two_thousand_damaged_pickles_raise_one_kind_of_error',
               'tests/pretrained/test_sources.py': 'test_a_hostile_pickle_is_refused_and_not_run test_a_pickle_is_refused '
                                                   'test_tensors_that_do_not_fit_are_refused'},
              'checkpoint: blocked, with a traceback; meta.pkl: its code is run',
              {FILES: 'test_r7_the_canary_is_alive test_r7_the_tools_that_make_them_can_make_good_ones'}),
    'R8': Row('command lines and config files that mean nothing: written by hand, mutated, and generated for every program; '
              'damaged folders of runs, grids and studies',
              'taken with a meaning, or one line of at most 400 characters; no traceback, at most 2 s of CPU time',
              {'tests/test_configurator.py': 'test_a_mistake_in_a_file_is_one_line_with_file_line_and_key '
                                             'test_a_mistake_on_the_command_line '
                                             'test_random_bytes_and_mutated_files_never_escape',
               f'{COMMAND}bounds.py': 'test_bombs_in_config_files test_plain_values_are_refused_in_one_line',
               f'{COMMAND}nonsense.py': 'test_every_setting_with_every_odd_value test_no_input_escapes '
                                        'test_none_of_20_000_inputs_escapes',
               f'{COMMAND}damaged.py': 'test_no_damaged_folder_escapes test_none_of_2_500_damaged_folders_escapes',
               'tests/ablation/test_nonsense.py': 'test_grids_that_mean_nothing test_studies_that_mean_nothing',
               OUTSIDE: 'test_an_out_dir_that_cannot_be_used_is_one_line_before_the_data '
                        'test_resume_refuses_what_a_fresh_start'
                        '_refuses'},
              'of 30: 24 tracebacks, 5 accepted, 1 trained to NaN with exit code 0; code in a config is run',
              {f'{COMMAND}bounds.py': 'test_what_is_within_the_bounds_is_read test_what_means_something_is_taken',
               'tests/ablation/test_nonsense.py': 'test_grids_that_mean_something test_a_study_that_means_something'}),
    'R9': Row('data files that are missing, cut, swapped, of other types or of other tokens; flipped bits and truncations; '
              'a preparation that dies at any write', 'one line before the first step, with path, expected and found; the '
              'same bytes in the end',
              {DATA: 'test_bad_shards_are_refused_in_one_line test_every_flip_and_truncation_is_found '
                     'test_short_validation_split_and_missing_folder',
               SOURCES: 'test_damaged_input_is_refused_in_one_line test_a_death_at_any_write_changes_nothing '
                        'test_a_killed_run_goes_on'},
              'of 9: 7 tracebacks, 2 accepted', {DATA: 'test_good_folders_are_not_refused test_good_meta_is_taken'}),
    'R10': Row('a loss that is not a number, an infinite gradient or a spike at one step, of either of two ranks; '
               'stop, skip, '
               'float16', 'no rank applies it, both end alike, nothing that is not finite is saved',
               {FAULTS: 'test_r10_a_fault_on_one_rank_is_applied_on_none',
                TRAIN: 'test_r10_a_loss_that_is_not_finite_stops_with_3_and_saves_nothing_bad '
                       'test_r10_a_single_bad_step_is_skipped',
                'tests/training/test_loop.py': 'test_an_overflow_halves_the_scale_also_where_the_loss_is_lost'},
               'trains on, exit code 0'),
    'R11': Row('SIGTERM, SIGINT, SIGUSR1 or SIGHUP during import, set-up, steps, micro-steps, evaluation, save, last step; '
               'twice; to torchrun', 'saved at that step, exit code 0, resumed to the same bits; before the loop it ends at '
               'once', {PROCESSES: 'test_r11_a_signal_saves_leaves_0_and_resumes_bit_for_bit '
                                   'test_r11_a_signal_before_the_loop_leaves_at_once '
                                   'test_r11_the_second_signal_leaves_at_once '
                                   'test_sigterm_to_torchrun_saves_on_two_ranks',
                        RESUME: 'test_r11_a_signal_at_any_moment_saves_that_step_and_resumes'}),
    'R12': Row('the disk is full at each operation of a save, past a limit of size, on /dev/full, on a real file system of '
               '2 MiB; a folder that is read-only; for logs, pictures and the best', 'a line with what it needs, the '
               'checkpoints before intact, training goes on',
               {FILES: 'test_r12_the_disk_fills_up_at_every_operation test_r12_a_real_limit_on_the_file_size '
                       'test_r12_dev_full '
                       'test_r12_a_folder_that_may_not_be_written',
                FAULTS: 'test_r12_a_run_on_a_disk_that_fills_up_trains_on_and_is_resumed_when_there_is_space',
                SHARDED: 'test_a_full_disk_is_an_error_and_leaves_no_half_folder',
                TRAIN: 'test_r12_a_failed_save_warns_and_only_the_last_is_fatal',
                OUTSIDE: 'test_a_full_disk_for_logs_and_a_picture_that_fails_warn_once_each '
                         'test_lines_are_whole_when_there_is_space_again '
                         'test_a_best_that_cannot_be_named_is_no_failed_save '
                         'test_a_run_without_its_stdout_trains_and_saves'}),
    'R13': Row('memory runs out: forward, backward, save, and a real limit of the process', 'one line with what to '
                                        'lower, exit '
               'code 4, checkpoints intact',
               {TRAIN: 'test_r13_out_of_memory_is_one_line_and_leaves_4',
                FAULTS: 'test_r13_a_real_limit_of_memory_is_one_line_and_leaves_the_checkpoints'}),
    'R14': Row('SIGKILL of one of two ranks: first step, mid-run, save, growth, before any checkpoint', 'torchrun '
                                        'starts both '
               'again; the bits of a job that nobody killed',
               {KILLS: 'test_r14_either_rank_is_killed_and_the_job_ends_in_the_same_bits',
                PROCESSES: 'test_r14_a_killed_rank_restarts_both_and_ends_in_the_same_bits',
                SHARDED: 'test_a_killed_worker_is_restarted_and_the_run_ends_in_the_same_bits'}),
    'R15': Row('a rank is stopped; two ranks against accumulation on one; resume on another number of ranks',
               'one line that names the rank; weights within 1e-6',
               {PROCESSES: 'test_r15_a_stopped_rank_ends_the_job_with_its_number '
                           'test_accumulation_on_one_rank_equals_two_ranks',
                PARALLEL: 'test_two_ranks_equal_accumulation_on_one test_sharded_runs_resume_on_any_number_of_ranks',
                SHARDED: 'test_it_goes_on_with_any_number_of_ranks'},
               controls={PARALLEL: 'test_another_seed_is_far_away'}),
    'R16': Row('the same seed with other evaluation, logging and saving intervals; deterministic algorithms; NaN in '
               'all fresh '
               'memory', 'the same bits of training',
               {TRAIN: 'test_evaluation_logging_and_saving_do_not_change_training',
                'tests/training/test_loop.py': 'test_deterministic_changes_no_bit_on_a_cpu '
                                               'test_no_memory_is_read_before_it_is_written'},
               'eval_interval 20 to 10 moves the weights by 8.4e-3; the same seed twice: equal',
               {TRAIN: 'test_another_seed_changes_it'}),
    'R17': Row('a checkpoint of every schema there was, and of one there is not yet', 'read, or one line that says '
                                        'to update',
               {FILES: 'test_r17_golden_files_still_load test_r17_a_newer_schema_is_named'}),
    'R18': Row('sample and export from a run that was killed and resumed; dense against factorised logits',
               'the same text, the same file; within 1e-5',
               {KILLS: 'test_r18_sample_and_export_of_a_killed_run_are_those_of_the_whole_one',
                'tests/test_export.py': 'test_transformers_computes_the_same'}),
    'R19': Row('a second trainer on the same out_dir', 'one line with the pid of the first',
               {FILES: 'test_r19_a_second_trainer_is_refused test_r19_stale_and_odd_lock_files',
                PROCESSES: 'test_r19_a_second_trainer_on_the_same_folder_is_refused'}),
    'R20': Row('every source: eval, exec, pickle, a shell, torch.load without weights_only=True, a bare except', 'none',
               {'tests/test_setup.py': 'test_no_source_holds_what_is_forbidden'}, 'exec of config files, pickle.load of '
               'meta.pkl', {'tests/test_setup.py': 'test_the_scan_finds_what_is_forbidden '
                                                   'test_the_scan_lets_good_code_pass'}),
}


def listed(tests):
    """['path::function'] of {path: names}."""
    return [f'{path}::{name}' for path, names in tests.items() for name in names.split()]
