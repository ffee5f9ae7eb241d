"""Tests mirror the package: trl/data/loader.py is tested in tests/data/test_loader.py, or `TESTED_IN` says where."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "trl"

# Module: the test file that exercises it, and a name that both contain (a function, a setting, a statistic), or the
# module's own path. One line per module, sorted. A module with a test file of its name needs no line.
TESTED_IN = {
    "algorithms/grpo.py": ("algorithms/test_policy_gradient.py", "grpo"),
    "algorithms/ppo.py": ("conformance/test_system.py", "ppo_minibatches"),
    "cli/building.py": ("cli/test_estimate.py", "trl.cli.building"),
    "cli/commands.py": ("cli/test_app.py", "COMMANDS"),
    "cli/problems.py": ("cli/test_resolve.py", "UsageError"),
    "cli/sections.py": ("cli/test_resolve.py", "trl.cli.sections"),
    "cli/stage_templates.py": ("cli/test_stages.py", "example_rows"),
    "core.py": ("compat/test_core_functions.py", "logprobs_from_logits"),
    "data/row_helpers.py": ("data/test_formats.py", "extract_prompt"),
    "demo/outcome.py": ("demo/test_terminal.py", "DemoSettings"),
    "doctor/batch_checks.py": ("doctor/test_doctor_page.py", "padding-changes-logprobs"),
    "doctor/codes.py": ("doctor/test_examination.py", "CODES"),
    "doctor/setting_checks.py": ("doctor/test_examination.py", "check_settings"),
    "kernels/decode_graph.py": ("rollout/test_fixed_decoder.py", "fixed_attention"),
    "kernels/kv_cache.py": ("kernels/test_decode_attention.py", "GrowingLayer"),
    "kernels/triton_softmax.py": ("kernels/test_projection_on_gpu.py", "statistics"),
    "models/autos.py": ("models/test_wrapper.py", "AutoModelForCausalLMWithValueHead"),
    "models/limits.py": ("models/test_padding.py", "context_length"),
    "models/load_trunk.py": ("models/test_adapters.py", "base_model_name_or_path"),
    "models/loading.py": ("models/test_checkpoints.py", "read_value_head"),
    "models/precision.py": ("training/test_compute.py", "NarrowCopies"),
    "models/recompute.py": ("training/test_layers.py", "recompute_activations"),
    "models/saving.py": ("models/test_wrapper.py", "upload_folder"),
    "models/trunk.py": ("kernels/test_linear.py", "trl.models.trunk"),
    "protocols.py": ("conformance/test_rewards_given.py", "on_save"),
    "rewards/cache.py": ("rewards/test_as_reward.py", "ScoreCache"),
    "rewards/compose.py": ("rewards/test_as_reward.py", "RewardMix"),
    "rewards/failures.py": ("rewards/test_as_reward.py", "ErrorBudget"),
    "rewards/function.py": ("rewards/test_as_reward.py", "FunctionReward"),
    "rewards/maths.py": ("rewards/test_parts.py", "math_reward"),
    "rewards/web.py": ("rewards/test_remote.py", "check_address"),
    "rewards/worker.py": ("rewards/test_as_reward.py", "trl.rewards.worker"),
    "rollout/choice.py": ("trainer/test_policy_sampler.py", "obstacle"),
    "runs/callbacks.py": ("runs/test_managed.py", "TrainCallback"),
    "runs/evaluation.py": ("runs/test_managed.py", "evaluate_prompts"),
    "runs/inputs.py": ("runs/test_managed.py", "length_sampler"),
    "runs/keeper.py": ("trainer/test_train_survives.py", "Keeper"),
    "runs/loop_state.py": ("trainer/test_train_survives.py", "skipped_batches"),
    "runs/memory.py": ("trainer/test_train_survives.py", "rollback"),
    "runs/observer.py": ("doctor/test_watch.py", "trl.runs.observer"),
    "runs/options.py": ("trainer/test_train_survives.py", "TrainOptions"),
    "runs/rollback.py": ("trainer/test_train_survives.py", "rollback"),
    "runs/rows.py": ("runs/test_managed.py", "score/mean"),
    "runs/samples.py": ("runs/test_managed.py", "finish_reason"),
    "runs/signals.py": ("faults/test_signals.py", "SIGTERM"),
    "runs/spikes.py": ("trainer/test_train_survives.py", "SpikeSettings"),
    "runs/watching.py": ("doctor/test_watch.py", "UnfitRun"),
    "state/encoding.py": ("training/test_resume.py", "no_tensors"),
    "state/fingerprints.py": ("training/test_resume.py", "Fingerprints"),
    "state/tensorfile.py": ("state/test_checkpoints.py", "safetensors_pieces"),
    "trackers/records.py": ("trackers/test_run_directory.py", "read_completions"),
    "trainer/base.py": ("trainer/test_card.py", "create_model_card"),
    "trainer/construction.py": ("trainer/test_odd_use.py", "create_reference_model"),
    "trainer/kl_controllers.py": ("conformance/test_rewards_kl.py", "AdaptiveKLController"),
    "trainer/offline/answer_logprobs.py": ("trainer/offline/test_dpo_trainer.py", "ref_model"),
    "trainer/offline/dpo_config.py": ("trainer/offline/test_dpo_trainer.py", "DPOConfig"),
    "trainer/offline/kto_config.py": ("trainer/offline/test_kto_trainer.py", "KTOConfig"),
    "trainer/offline/preference_config.py": ("trainer/offline/test_dpo_trainer.py", "activation_offloading"),
    "trainer/offline/preference_stage.py": ("trainer/offline/test_reward_trainer.py", "compute_loss"),
    "trainer/offline/prm_config.py": ("trainer/offline/test_prm_trainer.py", "step_separator"),
    "trainer/offline/referenced_config.py": ("trainer/offline/test_dpo_trainer.py", "precompute_ref_log_probs"),
    "trainer/offline/referenced_stage.py": ("trainer/offline/test_dpo_trainer.py", "caches_reference"),
    "trainer/offline/reward_config.py": ("trainer/offline/test_reward_trainer.py", "RewardConfig"),
    "trainer/offline/sft_config.py": ("trainer/offline/test_sft_trainer.py", "activation_offloading"),
    "trainer/offline/stage_config.py": ("trainer/offline/test_stage.py", "compute_dtype"),
    "trainer/policy_trainer.py": ("compat/test_ppo_trainer.py", "prepare_dataloader"),
    "trainer/ppo_compat.py": ("compat/test_ppo_trainer.py", "train_minibatch"),
    "trainer/ppo_config.py": ("compat/test_names_and_signatures.py", "PPOConfig"),
    "trainer/ppo_settings.py": ("trainer/test_ppo_trainer.py", "missing_eos_penalty"),
    "trainer/reporting.py": ("compat/test_ppo_trainer.py", "log_stats"),
    "trainer/resumable.py": ("training/test_resume.py", "save_checkpoint"),
    "trainer/step_arguments.py": ("trainer/test_bad_input.py", "response_masks"),
    "training/batched.py": ("trainer/test_score_while_sampling.py", "evaluate_in_batches"),
    "training/evaluator.py": ("trainer/test_ppo_trainer.py", "with_frozen_states"),
    "training/loop.py": ("training/test_guards.py", "Updater"),
    "training/optimizers.py": ("training/test_narrow_moments.py", "make_adam"),
    "training/peak.py": ("kernels/test_streaming_adam.py", "memory/peak_mb"),
    "training/run_state.py": ("training/test_resume.py", "kl_ctl"),
    "training/setup.py": ("algorithms/test_policy_gradient.py", "Setup"),
}

# Re-exports and command lines.
UNTESTED_NAMES = ("__init__.py", "__main__.py")


def mirrored(module: str) -> Path:
    folder, _, name = module.rpartition("/")
    return TESTS / folder / f"test_{name}"


def names(text: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


MODULES = sorted(
    path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name not in UNTESTED_NAMES
)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_a_test_file_of_its_name_or_a_line_in_the_table(module: str) -> None:
    assert mirrored(module).exists() or module in TESTED_IN, (
        f"write {mirrored(module)} or add trl/{module} to TESTED_IN"
    )


@pytest.mark.parametrize("module", TESTED_IN)
def test_a_line_names_a_test_file_that_mentions_its_module(module: str) -> None:
    assert (PACKAGE / module).exists(), f"trl/{module} is gone: remove its line from TESTED_IN"
    assert not mirrored(module).exists(), f"trl/{module} has a test file of its name: remove its line from TESTED_IN"
    test, name = TESTED_IN[module]
    path = f"trl.{module.removesuffix('.py').replace('/', '.')}"
    assert name == path or names((PACKAGE / module).read_text(encoding="utf-8"), name), f"trl/{module} has no {name}"
    assert names((TESTS / test).read_text(encoding="utf-8"), name), f"tests/{test} does not mention {name}"


def test_the_table_is_sorted() -> None:
    assert list(TESTED_IN) == sorted(TESTED_IN)


LONG_FILE, LONG_FUNCTION = 400, 60


def too_long(path: Path) -> list[str]:
    """A module's name if it is long, and the names of its long functions; a docstring does not count as length."""
    text = path.read_text(encoding="utf-8")
    module = path.relative_to(PACKAGE).as_posix()
    found = [module] if text.count("\n") > LONG_FILE else []
    for owner in (node for node in ast.walk(ast.parse(text)) if hasattr(node, "body")):
        for node in owner.body if isinstance(owner.body, list) else []:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                documented = ast.get_docstring(node, clean=False) is not None
                first = node.body[1 if documented and len(node.body) > 1 else 0]
                lines = (node.end_lineno or 0) - first.lineno + 1 + node.body[0].lineno - node.lineno
                if lines > LONG_FUNCTION:
                    name = f"{owner.name}.{node.name}" if isinstance(owner, ast.ClassDef) else node.name
                    found.append(f"{module} {name}")
    return found


def test_what_is_long_has_a_reason() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Long files and functions")[1].split("\n## ")[0]
    reasons = set()
    for where in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE):
        names = re.findall(r"`(.*?)`", where)
        reasons |= {names[0], *(f"{names[0]} {name}" for name in names[1:])}
    long = {name for path in sorted(PACKAGE.rglob("*.py")) for name in too_long(path)}
    assert long <= reasons, f"give a reason in docs/architecture.md for {sorted(long - reasons)}, or make it shorter"
