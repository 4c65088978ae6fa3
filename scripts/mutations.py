"""Break the package on purpose, in small ways, and see whether the tests notice: ``python
scripts/mutations.py [--only TEXT]``.

Each mutation changes one expression in a copy of the checkout, and the tests that it names must
fail there. All of them are run unbroken first. A line is printed for each mutation, and a count;
the exit code is 1 where a mutation was not caught, or could not be tried.

torch and the like take eight seconds to import, so this process imports them once and forks for
each mutation. It imports nothing of lorakit, and computes nothing with torch, whose threads a fork
would not have.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# what tests need of a tree that is no checkout
NEEDED = (
    *("lorakit", "hydra_plugins", "conf", "tests", "scripts", "recipes", "docs"),
    *("README.md", "pyproject.toml"),
)
THIRD_PARTY = (
    *("pytest", "hypothesis", "torch", "lightning", "transformers", "peft", "datasets", "trl"),
    *("hydra", "optuna", "fastapi.testclient", "sqlalchemy.orm", "matplotlib.figure"),
    *("lightning.pytorch.strategies", "peft.tuners.lora.layer", "torch._subclasses.fake_tensor"),
    *("transformers.models.qwen3_moe.modeling_qwen3_moe", "torch.utils.flop_counter"),
)
NUM_COPIES = 2  # mutations at a time
LIMIT_SECONDS = 300.0  # of the tests of one mutation; those of several processes take a minute
# a test that fails by one of these says that the new text is no program, not that it is wrong
BROKEN = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError")


@dataclass(frozen=True)
class Mutation:
    """One breakage.

    Args:
        file: below lorakit/.
        old: what stands in the file exactly once.
        new: what stands there instead.
        tests: ids of pytest, each of which must fail; without brackets, for any parameters.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.old} → {self.new or 'nothing'}"


MUTATIONS = (
    # the top level
    Mutation(
        "model_input.py",
        "num_positions -= chunk.length",
        "num_positions -= 1",
        ("tests/test_model_input.py::test_the_first_positions_count_those_of_an_image",),
    ),
    Mutation(
        "types.py",
        "self.weights.abs().amax(dim=-1)",
        "self.weights.amax(dim=-1)",
        (
            "tests/test_model_input.py::"
            "test_a_position_is_trained_where_any_of_its_targets_has_a_weight_of_either_sign",
        ),
    ),
    # callbacks
    Mutation(
        "callbacks/adapter_checkpoint.py",
        "_set_random_state(self._random_state)",
        "_get_random_state()",
        (
            "tests/training/test_exact_resume.py::"
            "test_every_checkpoint_leads_to_the_same_losses_and_bytes",
        ),
    ),
    Mutation(
        "callbacks/adapter_checkpoint.py",
        "self._signal = self._signal or signum",
        "self._signal = None",
        (
            "tests/callbacks/test_interrupt.py::"
            "test_the_first_ctrl_c_finishes_the_step_and_saves_it",
        ),
    ),
    Mutation(
        "callbacks/throughput.py",
        "1 - tokens / max(positions, 1)",
        "tokens / max(positions, 1)",
        (
            "tests/callbacks/test_figures.py::"
            "test_throughput_counts_tokens_trained_tokens_padding_and_seconds",
        ),
    ),
    Mutation(
        "callbacks/expert_load.py",
        "is_token_BL[row, start:end] = True",
        "is_token_BL[:] = True",
        ("tests/callbacks/test_figures.py::test_expert_load_is_not_moved_by_more_padding",),
    ),
    Mutation(
        "callbacks/history.py",
        "if batch.window_weight == 0 else ()",
        "if batch.window_weight < 0 else ()",
        ("tests/callbacks/test_figures.py::test_history_has_no_loss_of_a_step_that_was_skipped",),
    ),
    Mutation(
        "callbacks/packing_guard.py",
        "if leak > 0.05",
        "if leak > 5.0",
        (
            "tests/callbacks/test_packing_guard.py::"
            "test_a_model_that_ignores_positions_leaks_wholly_and_packing_goes_off_with_a_word",
        ),
    ),
    # cli
    Mutation(
        "quoting.py",
        '.replace("${", "\\\\${")',
        "",
        ("tests/cli/test_compose.py::test_values_of_path_keys_mean_themselves",),
    ),
    Mutation(
        "strategy/world.py",
        "if len(holders) > 1:",
        "if len(holders) > 3:",
        ("tests/cli/test_launch.py::test_what_differs_is_named_with_its_ranks",),
    ),
    Mutation(
        "pipeline/resume.py",
        "not key.startswith(FREE_KEYS)",
        "key.startswith(FREE_KEYS)",
        ("tests/pipeline/test_resume.py::test_another_config_is_refused_and_the_keys_are_named",),
    ),
    Mutation(
        "pipeline/resume.py",
        'run.info.get("data_fingerprint") != data_fingerprint',
        "False",
        ("tests/pipeline/test_resume.py::test_another_config_is_refused_and_the_keys_are_named",),
    ),
    Mutation(
        "config/check.py",
        "_AT_LEAST_ONE if flat[key] < 1",
        "_AT_LEAST_ONE if flat[key] < 0",
        (
            "tests/evaluation/test_retain.py::test_rows_that_cannot_be_used_stop_a_run_before_it_begins",
        ),
    ),
    Mutation(
        "planner/step_plan.py",
        "min(all_gather_object(",
        "max(all_gather_object(",
        ("tests/cli/test_plan_command.py::test_all_processes_plan_for_the_least_memory",),
    ),
    Mutation(
        "cli/compose.py",
        "composer.compose_config = lambda *_, **__: config",
        "pass",
        ("tests/cli/test_start.py::test_the_config_is_composed_once",),
    ),
    Mutation(
        "cli/compose.py",
        "(mode|searchpath)",
        "(mode)",
        ("tests/cli/test_start.py::test_a_folder_of_configs_is_found_by_any_form_of_its_flag",),
    ),
    Mutation(
        "pipeline/resume.py",
        "if key in now}, **then}",
        "if key in now and False}, **then}",
        (
            "tests/pipeline/test_older_runs.py::test_a_key_that_came_later_continues_"
            "under_the_value_that_means_the_old_behaviour",
        ),
    ),
    # config, evaluation
    Mutation(
        "config/instantiate.py",
        "elif name in hints and (problem := find_type_problem(value, hints[name])):",
        "elif False:",
        ("tests/cli/test_bad_input.py::test_a_wrong_setting_is_one_clear_message",),
    ),
    Mutation(
        "evaluation/held_out.py",
        '"loss": loss_sum / weight',
        '"loss": loss_sum',
        (
            "tests/evaluation/test_retain.py::test_the_loss_on_unrelated_text_is_told_before_and_after",
        ),
    ),
    Mutation(
        "evaluation/held_out.py",
        "return loss_sum / weight",
        "return loss_sum",
        (
            "tests/evaluation/test_retain.py::test_the_loss_on_unrelated_text_is_told_before_and_after",
        ),
    ),
    # data
    Mutation(
        "data/read/lines.py",
        'self.problems.append((f"{self.path}:{number}", problem))',
        'self.problems.append((f"{self.path}:{number + 1}", problem))',
        ("tests/data/read/test_lines.py::test_a_malformed_line_is_named_by_file_and_line",),
    ),
    Mutation(
        "data/read/sources.py",
        "digests = [file.digest for file in self.files]",
        "digests = [str(file.path) for file in self.files]",
        (
            "tests/data/read/test_sources.py::"
            "test_the_fingerprint_follows_the_bytes_and_not_the_place",
        ),
    ),
    Mutation(
        "data/datum.py",
        "list(weights[1:])",
        "list(weights[:-1])",
        ("tests/data/test_datum.py::test_the_shift_by_hand",),
    ),
    Mutation(
        "data/datum.py",
        "keep_from = start + excess",
        "keep_from = start + excess - 1",
        ("tests/data/test_datum.py::test_the_prompt_is_cut_by_hand",),
    ),
    Mutation(
        "data/render/renderer.py",
        "prefix if trains_all else len(prompt_ids)",
        "prefix",
        ("tests/data/render/test_render_plain.py::test_the_prompt_weighs_0_and_the_completion_1",),
    ),
    Mutation(
        "data/render/renderer.py",
        "weights[end:] = [0.0]",
        "weights[end - 1 :] = [0.0]",
        (
            "tests/data/render/test_render_chat.py::"
            "test_a_policy_trains_these_messages_each_with_its_end_of_turn",
        ),
    ),
    Mutation(
        "data/batch/collate.py",
        "positions[number, start:end] = np.arange(",
        "positions[number, start:end] = start + np.arange(",
        ("tests/data/batch/test_collate.py::test_a_packed_batch_by_hand",),
    ),
    Mutation(
        "data/batch/stream.py",
        "for rows, _ in window)",
        "for rows, _ in window[:1])",
        (
            "tests/data/batch/test_stream.py::"
            "test_every_batch_carries_the_weight_of_its_whole_accumulation_window",
        ),
    ),
    Mutation(
        "data/batch/stream.py",
        "start=skip + 1",
        "start=1",
        (
            "tests/data/batch/test_stream.py::"
            "test_going_on_from_any_step_gives_exactly_the_remaining_batches",
        ),
    ),
    Mutation(
        "data/batch/packing.py",
        "insort(rooms, (room - length, number))",
        "insort(rooms, (room, number))",
        ("tests/data/batch/test_packing.py::test_rows_of_ten_by_hand",),
    ),
    Mutation(
        "data/batch/mixture.py",
        "for number in (epoch, epoch + 1)",
        "for number in (0, 1)",
        (
            "tests/data/batch/test_mixture.py::test_a_share_of_few_rows_is_carried_over_to_the_next_epoch",
        ),
    ),
    Mutation(
        "data/batch/split.py",
        "start - begin, stop - begin",
        "start, stop",
        ("tests/training/test_oom.py::test_pairs_stay_together",),
    ),
    # launch
    Mutation(
        "launch/slurm.py",
        "days or 0) * 86400",
        "days or 0) * 3600",
        ("tests/cli/test_launch.py::test_slurms_times_in_seconds",),
    ),
    Mutation(
        "launch/slurm.py",
        "(?:API|ACCESS|PRIVATE)",
        "(?:PRIVATE)",
        ("tests/cli/test_launch.py::test_a_job_that_could_not_do_what_it_should_is_refused",),
    ),
    Mutation(
        "launch/slurm.py",
        "f\"trap '{check}' ERR\", ",
        "",
        ("tests/cli/test_launch.py::test_a_line_of_setup_that_fails_ends_the_job",),
    ),
    Mutation(
        "launch/torchrun.py",
        "--node-rank={node_rank}",
        "--node-rank=0",
        ("tests/cli/test_launch.py::test_each_machine_has_a_line_that_differs_in_its_number_only",),
    ),
    Mutation(
        "launch/slurm.py",
        "|TOKEN|",
        "|",
        ("tests/cli/test_launch.py::test_a_job_that_could_not_do_what_it_should_is_refused",),
    ),
    # lora
    Mutation(
        "lora/spec.py",
        "if self.rank < 1:",
        "if self.rank < 0:",
        ("tests/lora/test_plan.py::test_all_problems_of_a_spec_come_in_one_report",),
    ),
    Mutation(
        "lora/spec.py",
        "return self.alpha / (",
        "return self.alpha * (",
        (
            "tests/lora/test_bank.py::"
            "test_an_adapter_has_the_same_scale_in_company_as_alone_in_16_bit",
        ),
    ),
    Mutation(
        "lora/experts.py",
        "return alpha / (math.sqrt(rank)",
        "return alpha / (rank",
        ("tests/weights/test_adapter_files.py::test_peft_loads_what_was_saved_with_equal_logits",),
    ),
    Mutation(
        "lora/layouts.py",
        "b_EOR.permute(1, 2, 0)",
        "b_EOR.permute(1, 0, 2)",
        ("tests/lora/test_experts.py::test_what_peft_saves_plain_peft_loads",),
    ),
    Mutation(
        "lora/adapter_batch.py",
        "(self.adapter_ids_T[:, None] == adapter_ids_R)",
        "(self.adapter_ids_T[:, None] >= adapter_ids_R)",
        ("tests/lora/test_bank.py::test_a_mix_of_ranks_equals_peft_on_each_adapter_alone",),
    ),
    Mutation(
        "lora/inject.py",
        "manual_seed(spec.seed)",
        "manual_seed(0)",
        (
            "tests/lora/test_inject.py::"
            "test_the_global_random_state_is_untouched_and_the_seed_decides",
        ),
    ),
    Mutation(
        "lora/state.py",
        "layer._disable_adapters = was_off",
        "layer._disable_adapters = True",
        ("tests/training/test_dpo.py::test_the_gradient_does_not_depend_on_how_pairs_are_spread",),
    ),
    # loss
    Mutation(
        "loss/policy.py",
        "bound * advantages < ratio * advantages",
        "bound * advantages > ratio * advantages",
        ("tests/loss/test_policy.py::test_value_and_gradient_are_those_of_the_formula",),
    ),
    Mutation(
        "loss/policy.py",
        '(batch.extras["sequence_ratio_mask"] != 0) & ',
        "",
        (
            "tests/loss/test_policy.py::"
            "test_gspo_has_one_ratio_per_datum_and_the_gradient_of_each_token_s_own",
        ),
    ),
    Mutation(
        "loss/preference.py",
        "margins = beta * (chosen - rejected)",
        "margins = beta * (rejected - chosen)",
        (
            "tests/loss/test_preference.py::"
            "test_value_metrics_and_gradient_are_those_of_the_formula",
        ),
    ),
    Mutation(
        "loss/cross_entropy.py",
        "-(batch.weights * logprobs)",
        "-(batch.weights.abs() * logprobs)",
        (
            "tests/loss/test_target_logprobs.py::"
            "test_cross_entropy_is_minus_the_weighted_sum_by_hand",
        ),
    ),
    Mutation(
        "loss/head.py",
        "total * multiple",
        "total",
        (
            "tests/loss/test_head.py::"
            "test_a_weighted_sum_whose_weights_are_known_computes_its_logits_once",
        ),
    ),
    Mutation(
        "loss/inputs.py",
        "(tokens >= vocab_size)",
        "(tokens > vocab_size)",
        ("tests/loss/test_inputs.py::test_what_is_wrong_is_said_of_its_datum_and_field_alone",),
    ),
    # model
    Mutation(
        "model/families.py",
        '"full_attention", "sliding_attention"',
        '"full_attention", "linear_attention"',
        ("tests/model/test_families.py::test_linear_attention_cannot",),
    ),
    Mutation(
        "model/families.py",
        'gate if matrix == "gate_proj" else up',
        'up if matrix == "gate_proj" else gate',
        (
            "tests/lora/test_experts.py::"
            "test_a_shared_outer_adapter_is_saved_compact_and_expands_exactly",
        ),
    ),
    Mutation(
        "model/attention.py",
        '"is_causal": True',
        '"is_causal": False',
        ("tests/model/test_attention.py::test_outputs_and_gradients_are_those_of_the_mask",),
    ),
    Mutation(
        "model/attention.py",
        "1e-4 if is_exact else 0.05",
        "1e-4 if is_exact else 5.0",
        (
            "tests/model/test_attention.py::"
            "test_rounding_of_a_few_logits_is_no_difference_and_a_wrong_document_is",
        ),
    ),
    Mutation(
        "model/tokens.py",
        ".mean(dim=0)",
        ".sum(dim=0)",
        (
            "tests/model/test_new_tokens.py::"
            "test_rows_begin_as_the_mean_of_their_pieces_and_nothing_else_moves",
        ),
    ),
    # planner
    Mutation(
        "planner/memory.py",
        "(2 * held + 4 * words",
        "(0",
        ("tests/planner/test_trace.py::test_the_rough_bound_holds",),
    ),
    Mutation(
        "planner/trace.py",
        "(width + value.shape[3])",
        "width",
        ("tests/planner/test_trace.py::test_attention_counts_as_by_hand",),
    ),
    Mutation(
        "planner/fake_images.py",
        "*((rest,) if rest else ())",
        "*()",
        ("tests/planner/test_trace.py::test_a_row_is_as_full_of_images_as_the_rows_were",),
    ),
    # sampling
    Mutation(
        "sampling/token_sampler.py",
        "p.temperature if p.temperature > 0 else 1.0",
        "1.0",
        (
            "tests/sampling/test_token_sampler.py::test_tokens_come_in_proportion_to_their_probability",
        ),
    ),
    Mutation(
        "sampling/token_sampler.py",
        "before >= self.top_p *",
        "before >= 1.0 *",
        ("tests/sampling/test_token_sampler.py::test_what_is_cut_off_is_never_picked",),
    ),
    Mutation(
        "sampling/stop_condition.py",
        "return text if cut < 0 else text[:cut]",
        "return text",
        ("tests/sampling/test_generate.py::test_a_stop_string_ends_the_text_and_is_cut",),
    ),
    Mutation(
        "sampling/stop_condition.py",
        "if tokens[-1] in self.tokens:",
        "if tokens[0] in self.tokens:",
        ("tests/sampling/test_generate.py::test_eos_ends_a_row_and_is_its_last_token",),
    ),
    Mutation(
        "sampling/request.py",
        "request.first_number + number)",
        "request.first_number)",
        (
            "tests/sampling/test_sampler.py::"
            "test_samples_of_one_prompt_differ_and_the_prompt_is_computed_once",
        ),
    ),
    # service
    Mutation(
        "service/training_state.py",
        "if not bool(torch.isfinite(norm)):",
        "if bool(torch.isnan(norm)):",
        ("tests/service/test_clients.py::test_a_gradient_that_is_not_finite_makes_no_step",),
    ),
    Mutation(
        "service/training_state.py",
        "torch._foreach_add_(",
        "torch._foreach_copy_(",
        (
            "tests/service/test_clients.py::"
            "test_gradients_add_up_until_the_step_and_forward_adds_none",
        ),
    ),
    Mutation(
        "service/model_runner.py",
        "{request.model_id for request in requests}) > 1",
        "{request.model_id for request in requests}) > 9",
        ("tests/service/test_clients.py::test_an_adapter_that_is_not_finite_spoils_no_other",),
    ),
    Mutation(
        "service/database.py",
        "if run is None or run.owner != owner:",
        "if run is None:",
        ("tests/service/test_checkpoints.py::test_another_users_checkpoint_is_none",),
    ),
    Mutation(
        "service/checkpoints.py",
        "yield folder",
        "self._locks[run_id].release(); yield folder; self._locks[run_id].acquire()",
        ("tests/service/test_checkpoints.py::test_what_is_read_is_not_written_over_meanwhile",),
    ),
    Mutation(
        "service/checkpoints.py",
        "if checkpoint.run_id == run_id:",
        "if checkpoint.run_id != run_id:",
        (
            "tests/service/test_checkpoints.py::"
            "test_one_that_was_written_over_does_not_expire_as_the_one_before",
        ),
    ),
    # service/http
    Mutation(
        "service/http/keys.py",
        "if hmac.compare_digest(known.digest, digest):",
        "if digest:",
        ("tests/service/test_sdk.py::test_only_some_errors_are_of_http",),
    ),
    Mutation(
        "service/http/state.py",
        "if session.owner != owner:",
        "if not owner:",
        ("tests/service/test_state.py::test_request_ids_that_another_user_made_up_reach_nothing",),
    ),
    Mutation(
        "service/http/state.py",
        "self.held.pop(self.next_seq_id, None)",
        "self.held.pop(next(iter(self.held), 0), None)",
        (
            "tests/service/test_state.py::"
            "test_calls_that_wait_for_one_that_never_came_end_with_their_model",
        ),
    ),
    Mutation(
        "service/http/pending.py",
        "request.is_written = False",
        "request.is_written = True",
        ("tests/service/test_state.py::test_answers_that_a_full_disk_refused_are_written_later",),
    ),
    Mutation(
        "service/http/dependencies.py",
        "len(order.held) >= MAX_HELD",
        "len(order.held) >= 2 * MAX_HELD",
        ("tests/service/test_state.py::test_not_more_than_so_many_calls_wait_for_one",),
    ),
    # strategy
    Mutation(
        "strategy/deepspeed.py",
        '"stage3_max_live_parameters": live_elements',
        '"stage3_max_live_parameters": 10**9',
        ("tests/cli/test_plan_command.py::test_zero_gathers_and_buckets_no_more_than_it_is_told",),
    ),
    Mutation(
        "strategy/deepspeed.py",
        'min(zero["reduce_bucket_size"], num_trained)',
        'zero["reduce_bucket_size"]',
        ("tests/cli/test_plan_command.py::test_zero_gathers_and_buckets_no_more_than_it_is_told",),
    ),
    Mutation(
        "strategy/deepspeed.py",
        "torch.full_like(self._norm, -1.0)",
        "torch.full_like(self._norm, 1.0)",
        (
            "tests/strategy/test_strategies.py::"
            "test_a_strategy_computes_what_one_process_does[zero2-2]",
        ),
    ),
    Mutation(
        "strategy/state.py",
        "fragment.of_flat(state[name]).copy_(fragment.of_full(value))",
        "fragment.of_flat(state[name]).zero_()",
        (
            "tests/strategy/test_strategies.py::"
            "test_a_strategy_computes_what_one_process_does[zero2-2]",
        ),
    ),
    Mutation(
        "strategy/world.py",
        "raised = [entry for entry in problems if entry]",
        "raised = []",
        ("tests/launch/test_two_processes.py::test_a_bad_row_is_one_message",),
    ),
    # sweep
    Mutation(
        "sweep/space.py",
        "(self.high - self.low) / self.step) + 1",
        "(self.high - self.low) / self.step)",
        ("tests/sweep/test_space.py::test_a_range_is_what_hydra_means_by_it",),
    ),
    Mutation(
        "sweep/space.py",
        "if is_log and low <= 0:",
        "if is_log and low < 0:",
        ("tests/sweep/test_space.py::test_a_range_that_has_nothing_in_it_is_refused",),
    ),
    Mutation(
        "reports/comparison.py",
        "-row.last if is_maximized else row.last",
        "row.last",
        (
            "tests/reports/test_comparison.py::test_more_can_be_better_and_any_figure_can_be_compared",
        ),
    ),
    Mutation(
        "reports/comparison.py",
        "sign = -1 if self.is_maximized else 1",
        "sign = -1",
        (
            "tests/reports/test_comparison.py::test_the_best_comes_first_and_what_has_no_figure_last",
        ),
    ),
    # training
    Mutation(
        "training/module.py",
        "output.loss_sum / (piece.window_weight or 1.0)",
        "output.loss_sum / (piece.weight or 1.0)",
        ("tests/training/test_module_steps.py::test_the_logged_loss_is_the_whole_windows",),
    ),
    Mutation(
        "training/module.py",
        "zero_grad(set_to_none=True)",
        "zero_grad(set_to_none=False)",
        (
            "tests/training/test_module_steps.py::"
            "test_a_step_with_a_nan_loss_changes_neither_adapter_nor_optimiser_and_is_counted",
        ),
    ),
    Mutation(
        "training/module.py",
        "self.num_bad_in_a_row + 1 if is_bad else 0",
        "self.num_bad_in_a_row + is_bad",
        ("tests/training/test_module_steps.py::test_a_good_step_starts_the_count_anew",),
    ),
    Mutation(
        "training/optim.py",
        "(step + 1) / warmup",
        "step / warmup",
        ("tests/training/test_optim.py::test_constant_rises_and_stays",),
    ),
    Mutation(
        "training/step.py",
        "with adapters_off(model):",
        "if model:",
        ("tests/training/test_dpo.py::test_twenty_steps_are_those_of_trl",),
    ),
    # weights
    Mutation(
        "runs/checkpoint.py",
        "if _digest(path) != digest:",
        "if not _digest(path):",
        (
            "tests/runs/test_checkpoint_folders.py::"
            "test_damage_to_any_file_is_found_and_the_one_before_is_in_force",
        ),
    ),
    Mutation(
        "runs/checkpoint.py",
        "scored[:keep_best]",
        "scored[-keep_best:]",
        ("tests/runs/test_checkpoint_folders.py::test_prune_keeps_the_last_and_the_best",),
    ),
    Mutation(
        "weights/merge.py",
        "reference in planned:",
        "reference in planned[1:]:",
        ("tests/weights/test_merge.py::test_the_report_names_every_tensor_and_says_what_changed",),
    ),
    Mutation(
        "weights/merge.py",
        "if head.weight is embedding.weight:",
        "if head is embedding:",
        (
            "tests/weights/test_merge.py::"
            "test_an_adapted_unembedding_is_untied_and_the_embedding_stays",
        ),
    ),
    Mutation(
        "weights/adapter.py",
        'config.get("lora_alpha") != spec.alpha',
        'config.get("lora_alpha") is None',
        (
            "tests/weights/test_adapter_files.py::"
            "test_all_differences_of_the_config_come_in_one_report",
        ),
    ),
    Mutation(
        "runs/files.py",
        "fcntl.LOCK_SH if shared else fcntl.LOCK_EX",
        "fcntl.LOCK_SH",
        ("tests/pipeline/test_resume.py::test_two_processes_never_train_one_run",),
    ),
    Mutation(
        "runs/files.py",
        "if old.exists():",
        "if not old.exists():",
        (
            "tests/weights/test_checkpoint_safety.py::test_a_replaced_folder_survives_a_failing_rename",
        ),
    ),
    # the top level
    Mutation(
        "errors.py",
        "problems[:MAX_SHOWN]",
        "problems[: MAX_SHOWN - 1]",
        (
            "tests/data/read/test_lines.py::"
            "test_all_problems_come_in_one_report_with_20_shown_and_the_total",
        ),
    ),
    Mutation(
        "errors.py",
        "isinstance(error, RuntimeError) and any(",
        "isinstance(error, RuntimeError) or any(",
        ("tests/training/test_oom.py::test_another_error_is_not_hidden",),
    ),
    Mutation(
        "types.py",
        "self.weights.abs().sum()",
        "self.weights.sum()",
        ("tests/data/batch/test_collate.py::test_a_packed_batch_by_hand",),
    ),
    Mutation(
        "types.py",
        "min(end, last) - first, 0)",
        "min(end, last) - first - 1, 0)",
        (
            "tests/data/batch/test_mixture.py::"
            "test_the_stream_has_the_mixture_and_says_of_each_example_where_it_is_from",
        ),
    ),
    Mutation(
        "types.py",
        '"eps": self.eps > 0',
        '"eps": self.eps >= 0',
        (
            "tests/service/test_state.py::"
            "test_what_a_body_says_wrong_fails_its_call_and_keeps_the_order",
        ),
    ),
    Mutation(
        "model_input.py",
        "EncodedTextChunk(chunk.tokens[:num_positions])",
        "EncodedTextChunk(chunk.tokens)",
        ("tests/data/test_datamodule.py::test_prompts_for_samples_end_where_training_begins",),
    ),
)


class Watcher:
    """A plugin of pytest that keeps which tests failed, and by which exceptions."""

    def __init__(self) -> None:
        self.failed: dict[str, list[str]] = {}

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        """Keep a failure. pytest calls this for what fails, and not for what is skipped."""
        self.failed.setdefault(node.nodeid, []).append(call.excinfo.type.__name__)


@dataclass
class Job:
    """Tests that run in a process of their own.

    Args:
        tree: the copy that they run in.
        folder: for all that they write; emptied at the start.
    """

    tree: Path
    folder: Path
    tests: Sequence[str]
    limit_seconds: float = LIMIT_SECONDS
    pid: int = 0
    started: float = 0.0
    is_late: bool = False

    def start(self) -> None:
        """Fork, and run the tests there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.started = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._run()
            finally:
                os._exit(0)

    def _run(self) -> None:
        os.setsid()  # so that what the tests start can be ended with them
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT)
        for number, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(target, number)
        tempfile.tempdir = os.environ["TMPDIR"] = str(self.folder)
        os.environ["PYTHONPATH"] = str(self.tree)  # of processes that tests start
        sys.path[0] = str(self.tree)
        os.chdir(self.tree)
        import pytest
        import torch

        torch.set_num_threads(1)
        watcher = Watcher()
        options = ["-p", "no:cacheprovider", "-m", "not slow", "--tb=short", "-W", "ignore"]
        options += ["--basetemp", str(self.folder / "pytest")]
        options += ["-x"] if len(self.tests) == 1 else []  # the first failure says enough
        code = int(pytest.main([*options, *self.tests], plugins=[watcher]))
        home = str(getattr(sys.modules.get("lorakit"), "__file__", ""))
        found = {"code": code, "failed": watcher.failed, "home": home}
        (self.folder / "found.json").write_text(json.dumps(found), encoding="utf-8")

    def is_over(self) -> bool:
        """Whether the tests have ended. Those that take too long are ended."""
        self.is_late = time.monotonic() - self.started > self.limit_seconds
        if not self.is_late and os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            return False
        self.end(is_gone=not self.is_late)
        return True

    def end(self, *, is_gone: bool = False) -> None:
        """End the process, and whatever it started that still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if not is_gone:
            os.waitpid(self.pid, 0)

    def outcome(self) -> str:
        """``passed``, ``failed`` where each of the tests has, or why neither can be said."""
        if self.is_late:
            return f"took longer than {self.limit_seconds:.0f} s"
        file = self.folder / "found.json"
        if not file.exists():
            return "the process died"
        found = json.loads(file.read_text(encoding="utf-8"))
        if not found["home"].startswith(str(self.tree)):
            return f"lorakit was imported from {found['home'] or 'nowhere'}"
        if found["code"] == 0:
            return "passed"
        if found["code"] != 1:  # no such test, or none could be collected
            return f"pytest ended with {found['code']}"
        if all(kind in BROKEN for kinds in found["failed"].values() for kind in kinds):
            return "the file is no program any more"
        failed = {name.partition("[")[0] for name in found["failed"]} | set(found["failed"])
        silent = [test for test in self.tests if test not in failed]
        return f"not noticed by {', '.join(silent)}" if silent else "failed"

    def log(self) -> str:
        """The end of what the tests have printed."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")[-3000:]


def find_table_problems(mutations: Sequence[Mutation]) -> list[str]:
    """What is wrong with the texts of ``mutations``: whether each stands there exactly once, and
    each test too.
    """
    problems = []
    for mutation in mutations:
        count = _text_of(f"lorakit/{mutation.file}").count(mutation.old)
        if count != 1:
            problems.append(f"{mutation}: the old text stands there {count} times")
        for test in mutation.tests:
            path, _, name = test.partition("::")
            if f"\ndef {name.partition('[')[0]}(" not in _text_of(path):
                problems.append(f"{mutation}: there is no {test}")
    return problems


def _text_of(name: str) -> str:
    file = ROOT / name
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def copy_tree(to: Path) -> None:
    """Make ``to`` a copy of the checkout with what is new in it, or of what tests need.

    It is compiled, so that not every mutation does that; Python then goes by the text of a file,
    not by its time, which is too coarse.
    """
    if (ROOT / ".git").exists():
        asked = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        files = [ROOT / name for name in listed.split("\0")]
    else:
        places = [ROOT / name for name in NEEDED]
        files = [file for place in places for file in (place, *place.rglob("*"))]
    for file in files:
        if file.is_file() and "__pycache__" not in file.parts:
            copied = to / file.relative_to(ROOT)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copied)
    by_text = PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(to / "lorakit", quiet=1, invalidation_mode=by_text)


def import_third_party(folder: Path) -> None:
    """Import what tests import, apart from lorakit; ``folder`` takes what it would write."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "huggingface"),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    sys.dont_write_bytecode = True
    for name in THIRD_PARTY:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    assert not any(name.partition(".")[0] == "lorakit" for name in sys.modules)


def try_all(mutations: Sequence[Mutation], trees: Sequence[Path], folder: Path) -> int:
    """Try each mutation in one of ``trees``, print what came of it, and return how many were
    caught.
    """
    waiting, free = list(mutations), list(trees)
    running: list[tuple[Mutation, str, Job]] = []
    num_caught = 0
    try:
        while waiting or running:
            while waiting and free:
                mutation, tree = waiting.pop(0), free.pop()
                file = tree / "lorakit" / mutation.file
                text = file.read_text(encoding="utf-8")
                file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
                running.append((mutation, text, Job(tree, folder / tree.name, mutation.tests)))
                running[-1][2].start()
            for entry in [entry for entry in running if entry[2].is_over()]:
                running.remove(entry)
                mutation, text, job = entry
                (job.tree / "lorakit" / mutation.file).write_text(text, encoding="utf-8")
                free.append(job.tree)
                num_caught += _report(mutation, job)
            time.sleep(0.05)
    finally:
        for _, _, job in running:
            job.end()
    return num_caught


def _report(mutation: Mutation, job: Job) -> bool:
    """Print what came of a mutation, and return whether it was caught."""
    outcome, seconds = job.outcome(), time.monotonic() - job.started
    known = {"failed": "caught", "passed": "NOT CAUGHT"}
    print(f"{known.get(outcome, 'PROBLEM'):10} {seconds:5.1f} s  {mutation}", flush=True)
    if outcome not in known:
        print(f"{outcome}\n{job.log()}", flush=True)
    return outcome == "failed"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutations whose line has this text in it")
    options = parser.parse_args()
    started = time.monotonic()
    chosen = [mutation for mutation in MUTATIONS if options.only in str(mutation)]
    if not chosen:
        sys.exit(f"no mutation has {options.only!r} in its line")
    if problems := find_table_problems(chosen):
        sys.exit("\n".join(problems))
    with tempfile.TemporaryDirectory(prefix="lorakit-mutations-") as temporary:
        folder = Path(temporary).resolve()
        trees = [folder / f"copy{number}" for number in range(NUM_COPIES)]
        copy_tree(trees[0])
        for tree in trees[1:]:
            shutil.copytree(trees[0], tree)
        import_third_party(folder)
        tests = sorted({test for mutation in chosen for test in mutation.tests})
        unbroken = Job(trees[0], folder / "unbroken", tests, limit_seconds=2 * LIMIT_SECONDS)
        unbroken.start()
        try:
            while not unbroken.is_over():
                time.sleep(0.05)
        except BaseException:
            unbroken.end()
            raise
        if (outcome := unbroken.outcome()) != "passed":
            sys.exit(f"without any mutation: {outcome}\n{unbroken.log()}")
        seconds = time.monotonic() - started
        print(f"{len(tests)} tests pass without any mutation, {seconds:.0f} s", flush=True)
        num_caught = try_all(chosen, trees, folder / "jobs")
    seconds = time.monotonic() - started
    print(f"{num_caught} of {len(chosen)} mutations were caught, {seconds:.0f} s")
    sys.exit(num_caught < len(chosen))


if __name__ == "__main__":
    main()
