"""Old module paths and names of TRL 0.4 to 0.11: where each lives here, or what to use instead.

`lookup(__name__)` is the `__getattr__` of every module that TRL had, too: it returns our object (the same one, never a
copy) or raises an `ImportError` that says which releases had the name and what to use. An `ImportError`, since Python
replaces the text of an `AttributeError` in `from trl import name` with its own.

Modules that have no file here are served by one finder at the end of `sys.meta_path`, which Python asks only about
names that no file answers. Files of three lines would be visible to editors, but fifty of them would say nothing but
"use something else", and `trl/models/utils.py` and `trl/trainer/utils.py` would share a file name.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Module here: the old names that it defines or exports.
_HOMES = {
    "trl.core": """PPODecorators WANDB_PADDING clip_by_value convert_to_scalar entropy_from_logits flatten_dict
        logprobs_from_logits masked_mean masked_var masked_whiten set_seed stack_dicts stats_to_np""",
    "trl.data.constant_length": "ConstantLengthDataset",
    "trl.data.formats": """apply_chat_template extract_prompt is_conversational maybe_apply_chat_template
        maybe_extract_prompt maybe_unpair_preference_dataset unpair_preference_dataset""",
    "trl.data.sequence_collators": "DataCollatorForCompletionOnlyLM",
    "trl.import_utils": """is_bitsandbytes_available is_diffusers_available is_liger_kernel_available
        is_llmblender_available is_npu_available is_openai_available is_peft_available is_pil_available
        is_torch_greater_2_0 is_transformers_greater_than is_unsloth_available is_wandb_available is_xpu_available""",
    "trl.models": """AutoModelForCausalLMWithValueHead AutoModelForSeq2SeqLMWithValueHead PreTrainedModelWrapper
        SUPPORTED_ARCHITECTURES ValueHead create_reference_model setup_chat_format unwrap_model_for_generation""",
    "trl.models.chat_format": "ChatMlSpecialTokens FORMAT_MAPPING",
    "trl.models.reference": "LAYER_PATTERNS",
    "trl.trainer": "AdaptiveKLController BaseTrainer FixedKLController ModelConfig PPOConfig RunningMoments",
    "trl.trainer.offline.dpo_config": "DPOConfig",
    "trl.trainer.offline.dpo_trainer": "DPOTrainer",
    "trl.trainer.offline.kto_config": "KTOConfig",
    "trl.trainer.offline.kto_trainer": "KTOTrainer",
    "trl.trainer.offline.reward_config": "RewardConfig",
    "trl.trainer.offline.reward_trainer": "RewardDataCollatorWithPadding RewardTrainer compute_accuracy",
    "trl.trainer.model_config": "get_kbit_device_map get_peft_config get_quantization_config",
    "trl.trainer.offline.sft_config": "SFTConfig",
    "trl.trainer.offline.sft_trainer": "SFTTrainer",
    "trl.trainer.peft_saving": "PeftSavingCallback",
    "trl.trainer.utils": "exact_div",
}
# Old module: names that were also to be had there. A module without a file here exists in this table alone.
_PLACES = {
    "trl": """is_bitsandbytes_available is_diffusers_available is_liger_kernel_available is_llmblender_available
        is_npu_available is_openai_available is_pil_available is_wandb_available is_xpu_available""",
    "trl.data_utils": """apply_chat_template extract_prompt is_conversational maybe_apply_chat_template
        maybe_extract_prompt maybe_unpair_preference_dataset unpair_preference_dataset""",
    "trl.extras.best_of_n_sampler": "SUPPORTED_ARCHITECTURES",
    "trl.models": "is_diffusers_available",
    "trl.models.modeling_base": """LAYER_PATTERNS PreTrainedModelWrapper create_reference_model is_npu_available
        is_peft_available is_transformers_greater_than is_xpu_available""",
    "trl.models.modeling_value_head": """AutoModelForCausalLMWithValueHead AutoModelForSeq2SeqLMWithValueHead
        PreTrainedModelWrapper ValueHead is_npu_available is_xpu_available""",
    "trl.models.utils": """AutoModelForCausalLMWithValueHead AutoModelForSeq2SeqLMWithValueHead ChatMlSpecialTokens
        FORMAT_MAPPING PreTrainedModelWrapper SUPPORTED_ARCHITECTURES setup_chat_format unwrap_model_for_generation""",
    "trl.trainer": """ConstantLengthDataset DPOConfig DPOTrainer DataCollatorForCompletionOnlyLM KTOConfig KTOTrainer
        RewardConfig RewardTrainer SFTConfig SFTTrainer compute_accuracy is_diffusers_available""",
    "trl.trainer.dpo_config": "DPOConfig",
    "trl.trainer.dpo_trainer": "DPOConfig DPOTrainer",
    "trl.trainer.kto_config": "KTOConfig",
    "trl.trainer.kto_trainer": "KTOConfig KTOTrainer",
    "trl.trainer.reward_config": "RewardConfig",
    "trl.trainer.reward_trainer": "RewardConfig RewardDataCollatorWithPadding RewardTrainer compute_accuracy",
    "trl.trainer.model_config": "flatten_dict",
    "trl.trainer.ppo_config": "exact_div flatten_dict is_wandb_available",
    "trl.trainer.ppo_trainer": """AdaptiveKLController BaseTrainer FixedKLController PPOConfig PPODecorators
        PreTrainedModelWrapper RunningMoments SUPPORTED_ARCHITECTURES WANDB_PADDING clip_by_value convert_to_scalar
        create_reference_model entropy_from_logits flatten_dict is_npu_available is_torch_greater_2_0 is_xpu_available
        logprobs_from_logits masked_mean masked_var masked_whiten set_seed stack_dicts stats_to_np
        unwrap_model_for_generation""",
    "trl.trainer.sft_config": "SFTConfig",
    "trl.trainer.sft_trainer": """ConstantLengthDataset DataCollatorForCompletionOnlyLM PeftSavingCallback SFTConfig
        SFTTrainer is_peft_available""",
    "trl.trainer.utils": """AdaptiveKLController ConstantLengthDataset DataCollatorForCompletionOnlyLM FixedKLController
        ModelConfig PeftSavingCallback RewardDataCollatorWithPadding RunningMoments compute_accuracy
        get_kbit_device_map get_peft_config get_quantization_config is_peft_available is_unsloth_available
        is_xpu_available""",
}

_OTHER_TRL = "a newer TRL, in an environment of its own"
_OLD_TRL = "TRL 0.11, in an environment of its own"
# What to use: the releases that had a name: the names. Those with a dot are modules, or names in one module alone.
_NEVER: Mapping[str, Mapping[str, str]] = {
    "trl.data.formats.prepare": {"0.7-0.11": "trl.extras.dataset_formatting"},
    "trl.data.pairs.AnswerCollator": {"0.5-0.11": "trl.trainer.utils.DPODataCollatorWithPadding"},
    "DPOConfig(loss_type=...)": {"0.9-0.11": "FDivergenceConstants FDivergenceType"},
    _OTHER_TRL: {
        "0.7-0.11": "IterativeSFTTrainer trl.trainer.iterative_sft_trainer trl.trainer.utils.neftune_post_forward_hook",
        "0.8-0.11": "CPOConfig CPOTrainer ORPOConfig ORPOTrainer trl.commands init_zero_verbose trl.trainer.cpo_config "
        "trl.trainer.cpo_trainer trl.trainer.orpo_config trl.trainer.orpo_trainer",
        "0.10-0.11": """BCOConfig BCOTrainer OnlineDPOConfig OnlineDPOTrainer trl.trainer.bco_config
            trl.trainer.bco_trainer trl.trainer.online_dpo_config trl.trainer.online_dpo_trainer
            trl.trainer.utils.add_bos_token_if_needed trl.trainer.utils.add_eos_token_if_needed""",
        "0.11": """GKDConfig GKDTrainer GeometricMixtureWrapper NashMDConfig NashMDTrainer XPOConfig XPOTrainer
            trl.trainer.gkd_config trl.trainer.gkd_trainer trl.trainer.nash_md_config trl.trainer.nash_md_trainer
            trl.trainer.utils.DataCollatorForChatML trl.trainer.xpo_config trl.trainer.xpo_trainer""",
    },
    _OLD_TRL + " (this library trains language models only)": {
        "0.6-0.11": """DDPOConfig DDPOPipelineOutput DDPOSchedulerOutput DDPOStableDiffusionPipeline DDPOTrainer
            DefaultDDPOStableDiffusionPipeline trl.models.modeling_sd_base trl.trainer.ddpo_config
            trl.trainer.ddpo_trainer trl.trainer.utils.PerPromptStatTracker""",
        "0.7-0.11": "trl.models.sd_utils",
        "0.9-0.11": """AlignPropConfig AlignPropTrainer trl.models.auxiliary_modules trl.trainer.alignprop_config
            trl.trainer.alignprop_trainer""",
    },
    "PPOTrainer.train(prompts, reward=...)": {
        "0.9": "trl.trainer.utils.OnpolicyRuntimeConfig",
        "0.9-0.11": "trl.trainer.ppov2_config trl.trainer.ppov2_trainer",
        "0.10-0.11": "trl.trainer.utils.OnPolicyConfig trl.trainer.utils.OnlineTrainerState",
        "0.11": "PPOv2Config PPOv2Trainer",
    },
    "OnlineTrainer with an algorithm from trl.algorithms": {
        "0.9-0.11": "trl.trainer.rloo_config trl.trainer.rloo_trainer",
        "0.11": "RLOOConfig RLOOTrainer",
        "0.14-1.16": "GRPOConfig GRPOTrainer",
    },
    "ppo_trainer.step(..., response_masks=...), which leaves out the tokens that a tool wrote": {
        "0.7-0.11": "TextEnvironment TextHistory trl.environment",
    },
    "trl.rewards.JudgeReward": {
        "0.10-0.11": """BaseJudge BasePairwiseJudge BaseRankJudge HfPairwiseJudge OpenAIPairwiseJudge PairRMJudge
            RandomPairwiseJudge RandomRankJudge trl.trainer.judges""",
    },
    "PPOTrainer.train, which shows progress, records completions and takes a TrainCallback": {
        "0.8-0.11": "RichProgressCallback",
        "0.9-0.11": "SyncRefModelCallback trl.trainer.utils.print_rich_table",
        "0.10-0.11": "WinRateCallback trl.trainer.callbacks",
        "0.11": "LogCompletionsCallback",
    },
    "a dataclass of your own and transformers.HfArgumentParser": {
        "0.8": "DpoScriptArguments SftScriptArguments",
        "0.8-0.11": "TrlParser",
        "0.9-0.11": "DPOScriptArguments SFTScriptArguments",
    },
    "tokenizer.apply_chat_template": {
        "0.9-0.10": "trl.trainer.utils.SIMPLE_QUERY_CHAT_TEMPLATE",
        "0.9-0.11": "trl.trainer.utils.SIMPLE_SFT_CHAT_TEMPLATE",
        "0.11": "trl.trainer.utils.SIMPLE_CHAT_TEMPLATE",
    },
    "ImportError": {"0.8-0.11": "OptionalDependencyNotAvailable"},
    "from_pretrained(..., dtype=torch.bfloat16), or PPOConfig(dtype='bfloat16')": {
        "0.7-0.11": "peft_module_casting_to_bf16",
    },
    "PPODecorators.empty_device_cache, or torch.accelerator.empty_cache": {"0.10-0.11": "empty_cache"},
    "torch.randn": {"0.7-0.11": "trl.core.randn_tensor"},
    "ppo_trainer.create_model_card": {"0.4-0.11": "trl.trainer.ppo_trainer.MODEL_CARD_TEMPLATE"},
    "dict": {"0.7-0.11": "trl.trainer.ppo_config.JSONDict"},
    "PPOConfig(tracker_kwargs={'wandb': {'tags': [...]}})": {"0.4-0.6": "trl.trainer.ppo_config.autotag"},
    "a test of os.environ": {"0.9-0.11": "trl.env_utils"},
    "deepspeed's own functions": {
        "0.8-0.11": "trl.models.utils.add_hooks trl.models.utils.remove_hooks",
        "0.9-0.11": """trl.models.utils.get_all_parameters trl.models.utils.iter_params
            trl.trainer.utils.prepare_deepspeed""",
    },
    "torch.exp and torch.clamp": {"0.9-0.11": "trl.trainer.utils.cap_exp trl.trainer.utils.get_exp_cap"},
    "torch.argmax on the last dimension of the mask": {"0.9-0.11": "trl.trainer.utils.first_true_indices"},
    "torch.nn.utils.rnn.pad_sequence": {"0.9-0.11": "trl.trainer.utils.pad"},
    "ppo_trainer.generate, which returns each response up to its end": {
        "0.9-0.11": "trl.trainer.utils.generate trl.trainer.utils.truncate_response",
        "0.10-0.11": "trl.trainer.utils.batch_generation trl.trainer.utils.truncate_right",
    },
    "ppo_trainer.batched_forward_pass": {"0.9-0.11": "trl.trainer.utils.forward"},
    "trl.rewards.ClassifierReward": {"0.9-0.11": "trl.trainer.utils.get_reward"},
    "tokenizer.batch_decode(..., skip_special_tokens=True)": {"0.11": "trl.trainer.utils.decode_and_strip_padding"},
    "RunningMoments": {"0.6-0.11": "trl.trainer.utils.get_global_statistics"},
    "the keyword arguments of push_to_hub": {"0.7-0.11": "trl.trainer.utils.trl_sanitze_kwargs_for_tagging"},
}


def _entries(table: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yields each name with its releases and what to use instead."""
    for instead, by_release in table.items():
        for releases, names in by_release.items():
            yield from ((name, (releases.replace("-", " to "), instead)) for name in names.split())


ALIASES = {module: tuple(names.split()) for module, names in _PLACES.items()}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
_GONE = dict(_entries(_NEVER))


def advice(path: str) -> str | None:
    """Says what to use instead of `path`, a module or a name in a module; None if the table has no such name."""
    name = path.rpartition(".")[2]
    if entry := _GONE.get(path) or _GONE.get(name):
        from trl import __version__

        releases, instead = entry
        return f"{path} is not part of trl {__version__} (TRL {releases} had it): use {instead}"
    return None


def lookup(module: str) -> Callable[[str], Any]:
    """Returns the `__getattr__` of `module`, for the old names that it does not define itself.

    Args:
        module: full name, such as "trl.trainer.utils".

    Returns:
        A function of a name. It raises ImportError for names of TRL 0.4 to 0.11 that are not here, and AttributeError
        for names that TRL did not have either.
    """

    def __getattr__(name: str) -> Any:
        path = f"{module}.{name}"
        if name in ALIASES.get(module, ()):
            return getattr(importlib.import_module(_HOME_OF[name]), name)
        if path in ALIASES:
            return importlib.import_module(path)
        if text := advice(path):
            raise ImportError(text, name=path)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


class _OldModules:
    """Finder and loader of old modules that have no file here; `importlib.abc` would take longer to load than `trl`."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Returns a spec for a module of aliases.

        Raises:
            ModuleNotFoundError: if TRL 0.4 to 0.11 had the module and it is not here; says what to use.
        """
        loader: Any = self
        if name in ALIASES:
            return ModuleSpec(name, loader, origin=__file__)
        if name in _GONE:
            raise ModuleNotFoundError(advice(name), name=name)
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        """Leaves it to Python to make the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Fills a module of aliases, whose names load on first use."""
        vars(module).update(
            __doc__="Old names of TRL, from their homes in this library (see trl.legacy).",
            __all__=list(ALIASES[module.__name__]),
            __getattr__=lookup(module.__name__),
        )


_FINDER: Any = _OldModules()


def install() -> None:
    """Makes the old modules importable; a second call changes nothing."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
