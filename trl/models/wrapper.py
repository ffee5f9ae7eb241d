"""`PreTrainedModelWrapper`: a transformers language model with a value head, and its loading and saving.

It is long because it documents all of TRL 0.4.6's public methods; the modules beside it do most of their work.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from trl.import_utils import cache_keyword
from trl.models import adapters, loading
from trl.models.load_trunk import load_trunk
from trl.models.merging import save_merged
from trl.models.padding import forward_inputs
from trl.models.predictions import PredictionRequest, predict
from trl.models.saving import save_value_head_model
from trl.models.trunk import (
    base_language_model,
    evaluation_mode,
    forward_parameters,
    has_lm_head,
    is_encoder_decoder,
    watch_last_hidden_state,
)
from trl.models.value_head import ValueHead
from trl.pretrained import check_adapter_format, hub_arguments, trusted

logger = logging.getLogger(__name__)

W = TypeVar("W", bound="PreTrainedModelWrapper")


class _Architectures:
    """Classes accepted as `pretrained_model`; includes `peft.PeftModel` once peft has been imported."""

    def __get__(self, instance: Any, owner: Any = None) -> tuple[type, ...]:
        import sys

        from transformers import PreTrainedModel

        peft = sys.modules.get("peft")
        return (PreTrainedModel,) if peft is None else (PreTrainedModel, peft.PeftModel)


class PreTrainedModelWrapper(nn.Module):
    """Base class of the value-head models: loading, saving and adapters. Use one of its subclasses.

    `state_dict` returns the plain model's keys plus `v_head.*`; parameters are named `pretrained_model.*` and
    `v_head.*`; `load_state_dict` accepts both spellings.

    Args:
        pretrained_model: a transformers model with a language-model head, or a `peft.PeftModel` around one.
        kwargs: arguments of `ValueHead`.
    """

    transformers_parent_class: ClassVar[Any] = None
    lm_head_namings: ClassVar[list[str]] = ["lm_head", "embed_out"]
    supported_args: ClassVar[tuple[str, ...] | None] = None
    supported_modules: ClassVar[tuple[str, ...]] = ("v_head",)
    supported_rm_modules: ClassVar[tuple[str, ...]] = ("score",)
    supported_pretrained_model_architectures: ClassVar[Any] = _Architectures()

    def __init__(self, pretrained_model: Any = None, **kwargs: Any) -> None:
        super().__init__()
        if not isinstance(pretrained_model, self.supported_pretrained_model_architectures):
            raise ValueError(
                f"pretrained_model must be a transformers or PEFT model, not {type(pretrained_model).__name__}; "
                f"{type(self).__name__}.from_pretrained loads one by name or folder"
            )
        unknown = sorted(set(kwargs) - set(self.supported_args or ()))
        if unknown:
            raise ValueError(f"unknown arguments {unknown}; the value head accepts {list(self.supported_args or ())}")
        if not has_lm_head(pretrained_model, self.lm_head_namings):
            name = type(base_language_model(pretrained_model)).__name__
            raise ValueError(
                f"{name} has no language-model head; load it with "
                f"{getattr(self.transformers_parent_class, '__name__', 'an auto class')}.from_pretrained instead"
            )
        self.is_peft_model = adapters.is_peft_model(pretrained_model)
        if self.is_peft_model:
            adapters.checked(pretrained_model)
        self.is_sequential_parallel = False
        self.pretrained_model = pretrained_model
        self.v_head = ValueHead(self.config, **kwargs)
        self.commits: dict[str, str | None] = {}
        """Sources that `from_pretrained` read: hub ids with the commit of their revision, folders with None."""
        # Reward adapter: a frozen adapter with a score head, which is not part of the state dict.
        self.reward_score: nn.Linear | None = None
        self.reward_adapter_name: str | None = None
        self.reference_adapter_name: str | None = None
        """The frozen adapter that makes the base the reference of the KL; None for the base alone."""

    # -- computing ----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        *,
        cache: Any = None,
        float32_logits: bool = True,
        request: PredictionRequest | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns logits, loss and values; or, with `request`, per-token log-probabilities, entropies and values.

        Args:
            input_ids: [B, T] tokens; the queries of an encoder-decoder.
            past_key_values: key-value cache, for models that take one.
            attention_mask: [B, T], True or 1 on tokens.
            return_past_key_values: return the key-value cache as a fourth value.
            cache: the name of `past_key_values` in transformers >= 5.24; pass one or the other.
            float32_logits: False keeps the model's dtype, which halves the memory in half precision.
            request: the `N` tokens to score; only for models whose `trl.models.predictions.abilities` say `projects`.
            kwargs: forwarded to the model, such as `position_ids`, `labels`, `decoder_input_ids`, `logits_to_keep`.

        Returns:
            logits [B, T, V], the loss (None without labels) and float32 values [B, T]. For an encoder-decoder, `T` is
            the decoder's length. `logits_to_keep` narrows the logits but never the values. With `request`, three `[N]`
            float32 tensors.

        Raises:
            ValueError: if both `past_key_values` and `cache` are given.
        """
        kwargs.pop("return_dict", None)
        if cache is not None and past_key_values is not None:
            raise ValueError("past_key_values and cache are two names for one argument: pass only one of them")
        if (cache := past_key_values if cache is None else cache) is not None:
            kwargs[cache_keyword(forward_parameters(self))] = cache
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        kwargs["input_ids"] = input_ids
        with watch_last_hidden_state(self.pretrained_model) as captured:
            if request is not None:
                logprobs, entropies, _ = predict(self.pretrained_model, kwargs, request)
            else:
                output = self.pretrained_model(**kwargs)
        if captured.value is None:
            raise RuntimeError(f"{type(self.pretrained_model).__name__} did not run its decoder in forward")
        if request is not None:
            return logprobs, entropies, self.v_head(captured.value.flatten(0, 1)[request.rows]).squeeze(-1)
        logits, loss = output.logits, output.get("loss")
        values = self.v_head(captured.value).squeeze(-1)
        if float32_logits and logits.dtype != torch.float64:
            logits = logits.float()
        if self.is_sequential_parallel and input_ids is not None:
            logits, values = logits.to(input_ids.device), values.to(input_ids.device)
        return (logits, loss, values, output.past_key_values) if return_past_key_values else (logits, loss, values)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the language model's `generate`.

        `custom_generate` runs code from a repository, so it needs `trust_remote_code=True`.
        """
        if kwargs.get("custom_generate") is not None:
            kwargs["trust_remote_code"] = trusted(kwargs)
        if args and self.is_peft_model:
            kwargs["inputs"], args = args[0], args[1:]  # peft's generate takes keywords only
        return self.pretrained_model.generate(*args, **kwargs)

    @contextmanager
    def watch_values(self) -> Iterator[Callable[[], Tensor]]:
        """Yields a function that returns float32 values [B, 1] for the last column of the latest forward pass.

        For code that calls `pretrained_model` directly, as sampling does.
        """
        with watch_last_hidden_state(self.pretrained_model) as captured:

            def values() -> Tensor:
                assert captured.value is not None, "no forward pass was made"
                return self.v_head(captured.value[:, -1:]).squeeze(-1)

            yield values

    def compute_reward_score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        ppo_adapter_name: str = "default",
        **kwargs: Any,
    ) -> Tensor:
        """Scores tokens with the reward adapter, without gradients and with dropout off.

        Active adapters, `requires_grad` flags and training modes are afterwards as they were before.

        Args:
            input_ids: [B, T] tokens, padded on either side.
            attention_mask: [B, T], True or 1 on tokens; positions are counted from it.
            ppo_adapter_name: adapter to activate afterwards, if it is not "default".
            kwargs: forwarded to the model, such as `decoder_input_ids`.

        Returns:
            Scores [B, T, labels], or [B, decoder's length, labels].

        Raises:
            ValueError: if no reward adapter was loaded, or there is no adapter of that name.
        """
        if self.reward_score is None or self.reward_adapter_name is None:
            raise ValueError("this model has no reward adapter: pass reward_adapter= to from_pretrained")
        names = self.pretrained_model.peft_config
        if ppo_adapter_name not in names and ppo_adapter_name != "default":
            raise ValueError(f"ppo_adapter_name={ppo_adapter_name!r} must be one of {sorted(names)}")
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if attention_mask is not None and not self.is_encoder_decoder:
            inputs = forward_inputs(self, input_ids, attention_mask)
        keep = forward_parameters(self).get("logits_to_keep")
        if keep is not None:  # none are needed
            # Prefer an index: a slice is non-contiguous, and torch then multiplies each row with a copy of the weights.
            by_index = "Tensor" in str(keep.annotation)
            inputs["logits_to_keep"] = torch.zeros(1, dtype=torch.long, device=input_ids.device) if by_index else 1
        with evaluation_mode(self.pretrained_model), torch.no_grad():
            with adapters.adapter_mode(self, self.reward_adapter_name):
                with watch_last_hidden_state(self.pretrained_model) as captured:
                    self.pretrained_model(**(inputs | kwargs))
        if ppo_adapter_name != "default":
            with adapters.preserve_requires_grad(self.pretrained_model):
                self.pretrained_model.set_adapter(ppo_adapter_name)
        assert captured.value is not None
        return self.reward_score(captured.value.to(self.reward_score.weight.dtype))

    # -- loading ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls: type[W], pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> W:
        """Builds a value-head model from a hub id, a folder or a model object.

        Args:
            pretrained_model_name_or_path: hub id or folder (of a language model, a saved value-head model or a PEFT
                adapter), a transformers model, or a `peft.PeftModel`.
            model_args: passed to transformers.
            kwargs: arguments of `ValueHead`; `peft_config` (adds a new adapter), `is_trainable` (continue training a
                loaded adapter), `reward_adapter` and `reward_adapter_name` (a frozen adapter used for scoring),
                `reference_adapter` and `reference_adapter_name` (a frozen adapter that makes the base the reference of
                the KL), `allow_pickle` (read legacy `.bin` files, with `weights_only=True`); everything else
                goes to transformers, and is ignored with a warning beside a model object. The dtype defaults to
                float32, `trust_remote_code` to False.

        Returns:
            A model of this class, with the saved value head if there is one.

        Raises:
            ValueError: for a model without a language-model head, unusable arguments, pickled weights, or a model
                that needs the checkpoint's own code.
            ImportError: for an adapter when peft is not installed.
        """
        head_args = {name: kwargs.pop(name) for name in cls.supported_args or () if name in kwargs}
        peft_config = kwargs.pop("peft_config", None)
        is_trainable = kwargs.pop("is_trainable", False)
        reward_adapter = kwargs.pop("reward_adapter", None)
        reward_adapter_name = kwargs.pop("reward_adapter_name", "reward_adapter")
        reference_adapter = kwargs.pop("reference_adapter", None)
        reference_adapter_name = kwargs.pop("reference_adapter_name", "reference")
        allow_pickle = kwargs.pop("allow_pickle", False)

        kwargs.pop(
            "layer_norm_names", None
        )  # scripts of TRL 0.4 give it to peft's 8-bit preparation, which takes it no more
        if (old_token := kwargs.pop("use_auth_token", None)) is not None:
            kwargs.setdefault("token", old_token)
        source = loading.as_source(pretrained_model_name_or_path)
        hub = hub_arguments(kwargs)
        if source is not None:
            if cls.transformers_parent_class is None:
                raise ValueError(f"{cls.__name__} cannot load a model: use one of its subclasses")
            model, has_adapter, commits = load_trunk(
                cls.transformers_parent_class,
                source,
                *model_args,
                is_trainable=is_trainable,
                allow_pickle=allow_pickle,
                **kwargs,
            )
        else:
            model, has_adapter = pretrained_model_name_or_path, adapters.is_peft_model(pretrained_model_name_or_path)
            commits = {}
            loading.ignore_beside_object(model_args, kwargs)
        if peft_config is not None:
            if has_adapter:
                raise ValueError("peft_config would add a second adapter to a model that has one; omit peft_config")
            model = adapters.attach_adapter(model, peft_config)

        wrapper = cls(model, **head_args)
        wrapper.commits = commits
        head: dict[str, Tensor] = {}
        if source is not None:
            head = loading.read_value_head(source, hub, allow_pickle=allow_pickle)
            if not head:
                logger.info("%r has no value head: initialised a fresh one", source)
                if has_adapter and not allow_pickle:
                    loading.warn_of_unread_pickle(source, hub)
        wrapper.post_init(head)
        hub = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}  # of the policy
        if reward_adapter is not None:
            wrapper.add_and_load_reward_modeling_adapter(
                reward_adapter, reward_adapter_name, allow_pickle=allow_pickle, **hub
            )
        if reference_adapter is not None:
            wrapper.add_reference_adapter(reference_adapter, reference_adapter_name, allow_pickle=allow_pickle, **hub)
        return wrapper

    def post_init(self, state_dict: Mapping[str, Tensor]) -> None:
        """Loads the value head from the `v_head.*` entries of `state_dict`, if there are any, and places it.

        Called by `from_pretrained`. The head goes to the output embeddings' device.

        Raises:
            ValueError: if the shapes do not match, or part of the model is offloaded to CPU or disk.
        """
        prefix = loading.VALUE_HEAD_PREFIX
        head = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        if head:
            expected = {name: tuple(t.shape) for name, t in self.v_head.state_dict().items()}
            shapes = {name: tuple(t.shape) for name, t in head.items()}
            if shapes != expected:
                raise ValueError(f"the saved value head has shapes {shapes}, but this model needs {expected}")
            self.v_head.load_state_dict(head)
        device_map = getattr(base_language_model(self), "hf_device_map", None) or {}
        devices = set(device_map.values())
        if len(devices) > 1 and devices & {"cpu", "disk"}:
            raise ValueError(f"device_map={device_map} offloads layers to CPU or disk, which training does not support")
        embeddings = base_language_model(self).get_output_embeddings()
        self.v_head.to(self.pretrained_model.device if embeddings is None else embeddings.weight.device)
        self.is_sequential_parallel = len(devices) > 1

    def add_and_load_reward_modeling_adapter(
        self,
        adapter_model_id: Any,
        adapter_name: str = "reward_model_adapter",
        *,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> None:
        """Loads a frozen reward adapter with its score head, for `compute_reward_score`.

        Args:
            adapter_model_id: folder or hub id of a LoRA adapter trained for sequence classification.
            adapter_name: name to give the adapter; must contain "reward".
            allow_pickle: read `adapter_model.bin`, with `weights_only=True`.
            hub: hub arguments such as `revision` and `token`.

        Raises:
            ValueError: if this model has no adapter of its own, or the reward adapter has no score head.
        """
        if not self.is_peft_model:
            raise ValueError("reward_adapter needs a model that trains an adapter: pass peft_config as well")
        source = os.fspath(adapter_model_id)
        weights = loading.read_adapter_weights(source, hub, allow_pickle=allow_pickle)
        self.reward_score = adapters.add_reward_adapter(self.pretrained_model, source, adapter_name, weights, **hub)
        self.reward_adapter_name = adapter_name

    def add_reference_adapter(
        self, adapter_model_id: Any, adapter_name: str = "reference", *, allow_pickle: bool = False, **hub: Any
    ) -> None:
        """Loads a frozen adapter that, on the base, is the reference of the KL.

        Pass the adapter that the policy starts from where that is a trained one: without it, `PPOTrainer` would copy
        the whole model.

        Args:
            adapter_model_id: folder or hub id of an adapter.
            adapter_name: name to give the adapter.
            allow_pickle: read `adapter_model.bin`, with `weights_only=True`.
            hub: hub arguments such as `revision` and `token`.

        Raises:
            ValueError: if this model has no adapter of its own, or already has a reference adapter.
        """
        if not self.is_peft_model:
            raise ValueError("reference_adapter needs a model that trains an adapter: pass peft_config as well")
        if self.reference_adapter_name is not None:
            raise ValueError(f"the model already has the reference adapter {self.reference_adapter_name!r}")
        source = os.fspath(adapter_model_id)
        check_adapter_format(source, hub, allow_pickle=allow_pickle)
        adapters.add_frozen_adapter(self.pretrained_model, source, adapter_name, **hub)
        self.reference_adapter_name = adapter_name

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the plain model's entries plus `v_head.*`; takes torch's `destination`, `prefix` and `keep_vars`."""
        state = self.pretrained_model.state_dict(*args, **kwargs)
        kwargs |= {"destination": state, "prefix": kwargs.get("prefix", "") + loading.VALUE_HEAD_PREFIX}
        return self.v_head.state_dict(**kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # Submodules look up their entries under `pretrained_model.`, a prefix that `state_dict` omits.
        prefixes = (f"{prefix}pretrained_model.", f"{prefix}v_head.", f"{prefix}reward_score.")
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(prefixes)]:
            state_dict[f"{prefix}pretrained_model.{key[len(prefix) :]}"] = state_dict.pop(key)
        if self.reward_score is not None:  # frozen, not part of `state_dict`
            for name, tensor in self.reward_score.state_dict().items():
                state_dict.setdefault(f"{prefix}reward_score.{name}", tensor)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves the language model (or adapter) in transformers' (or peft's) format, and the value head next to it.

        Args:
            *args: the folder, then further positional arguments of the language model's `save_pretrained`.
            **kwargs: arguments of the language model's `save_pretrained`, such as `max_shard_size`; `state_dict` may
                be this wrapper's; `push_to_hub=True` with `repo_id` uploads the folder.
        """
        save_value_head_model(self, *args, **kwargs)

    def save_merged(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Saves a plain transformers folder with the active adapter merged in, and the value head next to it.

        The folder needs no peft, and its logits are this model's, up to rounding. This model does not change.

        Args:
            save_directory: target folder; created if missing.
            **kwargs: arguments of transformers' `save_pretrained`, such as `max_shard_size`.

        Raises:
            ValueError: if the model has no adapter, its base is quantized, or the adapter is off or merged already.
        """
        save_merged(self, save_directory, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Uploads the files that `save_pretrained` writes.

        Args:
            *args: the repository id; the repository is created if it does not exist.
            **kwargs: `commit_message`, `private`, `token`, `revision` and `create_pr` apply to the upload; the rest
                go to `save_pretrained`.
        """
        repo_id = args[0] if args else kwargs.pop("repo_id")
        with tempfile.TemporaryDirectory() as folder:
            return save_value_head_model(self, folder, push_to_hub=True, repo_id=repo_id, **kwargs)

    # -- the language model's own -------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The language model's configuration."""
        return base_language_model(self).config

    @property
    def generation_config(self) -> Any:
        """The language model's generation defaults."""
        return base_language_model(self).generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        base_language_model(self).generation_config = value

    @property
    def device(self) -> torch.device:
        """The language model's device."""
        return self.pretrained_model.device

    @property
    def dtype(self) -> torch.dtype:
        """The language model's dtype; the value head is float32."""
        return base_language_model(self).dtype

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model encodes queries and decodes responses."""
        return is_encoder_decoder(self)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return base_language_model(self).get_input_embeddings()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resizes the language model's vocabulary."""
        return self.pretrained_model.resize_token_embeddings(*args, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Trades compute for memory by recomputing activations in the backward pass."""
        base = base_language_model(self)
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs)
        if self.is_peft_model:
            base.enable_input_require_grads()  # otherwise adapters in checkpointed layers get no gradient

    def gradient_checkpointing_disable(self) -> None:
        """Undoes `gradient_checkpointing_enable`."""
        base = base_language_model(self)
        disable = getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable
        disable()
        if self.is_peft_model:
            base.disable_input_require_grads()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Disables the PEFT adapter inside the `with` block.

        Raises:
            ValueError: if the model has no adapter.
        """
        with adapters.adapter_mode(self, None):
            yield
