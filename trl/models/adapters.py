"""PEFT adapters: attaching, loading and inspecting them, and switching to the reference or to a reward model.

`peft` is imported only when a caller asks for an adapter.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from trl.models.trunk import base_language_model, pretrained_part, unwrap

_LORA_MATRICES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def require_peft(what: str) -> Any:
    """Imports and returns `peft`.

    Raises:
        ImportError: if peft is not installed; the message has the install command.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"{what} needs the peft library: pip install peft") from error
    return peft


def is_peft_model(model: Any) -> bool:
    """Whether `model` is a `peft.PeftModel`; does not import peft."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def peft_part(model: nn.Module) -> Any:
    """Returns the `PeftModel` inside a (possibly wrapped) value-head model or language model.

    Raises:
        ValueError: if the model has no adapter.
    """
    inner = pretrained_part(model)
    if not is_peft_model(inner):
        raise ValueError(
            f"{type(inner).__name__} has no PEFT adapter; create its reference with create_reference_model"
        )
    return inner


@contextmanager
def preserve_requires_grad(model: nn.Module) -> Iterator[None]:
    """Restores every parameter's `requires_grad` on exit, because peft changes it when switching adapters."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def adapter_mode(model: nn.Module, name: str | None) -> Iterator[nn.Module]:
    """Yields the model with one adapter active, or with all of them off.

    Args:
        model: a value-head model or language model with PEFT adapters, possibly wrapped in DDP.
        name: the adapter that takes part in forward passes, even where adapters were off; None for the base model.

    Yields:
        The unwrapped model. Active adapters, whether they are on, and `requires_grad` flags are restored on exit.

    Raises:
        ValueError: if the model has no adapter, none of this name, or one that is merged into the base weights.
    """
    peft_model = peft_part(model)
    if name is None:
        with preserve_requires_grad(peft_model), peft_model.disable_adapter():
            yield unwrap(model)
        return
    if name not in peft_model.peft_config:
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(map(repr, peft_model.peft_config))}")
    layers = list(_adapter_layers(peft_model))
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError(
            f"adapter {name!r} cannot be used while another is merged into the base weights: call unmerge_adapter() "
            "first"
        )
    active, tuner_active = peft_model.active_adapter, list(peft_model.active_adapters)
    off = [layer for layer in layers if layer.disable_adapters]
    with preserve_requires_grad(peft_model):
        try:
            peft_model.set_adapter(name)
            for layer in off:
                layer.enable_adapters(True)
            yield unwrap(model)
        finally:
            peft_model.base_model.set_adapter(tuner_active)
            peft_model.active_adapter = active
            for layer in off:
                layer.enable_adapters(False)


def reference_mode(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Context that yields the reference model: `model` with its reference adapter active, or with its adapters off.

    Without a reference adapter (`from_pretrained(reference_adapter=...)`), it equals the initial policy only if the
    adapter started at zero, see `adapter_starts_at_zero`.

    Args:
        model: as for `adapter_mode`, which this calls.
    """
    return adapter_mode(model, getattr(unwrap(model), "reference_adapter_name", None))


def adapter_starts_at_zero(model: nn.Module) -> bool:
    """Whether the active adapter is currently a no-op, so that disabling it leaves the model's outputs unchanged.

    True for the default LoRA initialisation (B = 0, or A = 0 in embeddings). False for a trained adapter, and for
    adapter types or initialisations where it cannot be determined: use a copy (`create_reference_model`) as the
    reference then.

    Raises:
        ValueError: if the model has no adapter.
    """
    peft_model = peft_part(model)
    config = peft_model.active_peft_config
    if config.is_prompt_learning or str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        return False
    if not _keeps_base_weights(config):
        return False
    products = [
        pair
        for module in peft_model.modules()
        for adapter in peft_model.active_adapters
        if (pair := _factors(module, adapter)) is not None
    ]
    return bool(products) and all(any(not bool(factor.any()) for factor in pair) for pair in products)


def check_adapters_on(model: nn.Module) -> None:
    """Checks that the adapters take part in the forward pass, without which they would get no gradient.

    Raises:
        ValueError: if an adapter is disabled or merged into the base weights, or the model has none.
    """
    for name, module in peft_part(model).named_modules():
        if not _has_adapters(module):
            continue
        for state, flag, remedy in (
            ("disabled", "disable_adapters", "enable_adapter_layers()"),
            ("merged", "merged", "unmerge_adapter()"),
        ):
            if getattr(module, flag, False) is True:
                raise ValueError(
                    f"the adapter of {name} is {state} and would get no gradient; call the PEFT model's {remedy} first"
                )


def adapter_state(model: nn.Module) -> tuple[str, ...]:
    """Describes which adapters take part in a forward pass of `model`, and at which scale; empty without adapters."""
    parts = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return tuple(str([getattr(layer, part, None) for part in parts]) for layer in _adapter_layers(model))


def _adapter_layers(model: nn.Module) -> Iterator[Any]:
    """Yields the layers that peft put adapters, or trained copies of modules, into."""
    return (module for module in model.modules() if _has_adapters(module))


def _has_adapters(module: Any) -> bool:
    # Of a transformers model, and of peft's wrapper around one, `disable_adapters` is a method.
    flags = (getattr(module, "active_adapters", None), getattr(module, "disable_adapters", None))
    return isinstance(flags[0], list) and isinstance(flags[1], bool)


def _factors(module: nn.Module, adapter: str) -> tuple[Any, Any] | None:
    """Returns a LoRA layer's A and B matrices (A starts at 0 in embeddings, B elsewhere); None for other modules."""
    for names in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        parts = [getattr(module, name, None) or {} for name in names]
        if all(adapter in part for part in parts):
            a, b = (getattr(part[adapter], "weight", part[adapter]) for part in parts)
            return a.detach(), b.detach()
    return None


def _keeps_base_weights(config: Any, *, scores: bool = False) -> bool:
    """False for initialisations that change base weights (PiSSA, OLoRA ...) and for extra trained modules or biases.

    Args:
        config: of a LoRA adapter.
        scores: whether it is a reward adapter, whose only extra module is the score head.
    """
    plain_start = config.init_lora_weights in (True, "gaussian", "orthogonal") or (
        config.init_lora_weights is False  # random B: detected by inspecting B
    )
    extra = bool(getattr(config, "modules_to_save", None)) and not scores
    return plain_start and not extra and getattr(config, "bias", "none") == "none"


def trains_only_lora(model: nn.Module) -> bool:
    """Whether LoRA matrices, whose layers take activations of any dtype, are all that is trained below the value head.

    False for DoRA, adapters on bare parameters, additionally trained biases or modules, and initialisations that change
    the base weights.
    """
    inner = pretrained_part(model)
    if not is_peft_model(inner):
        return False
    reward = getattr(unwrap(model), "reward_adapter_name", None)
    for name, config in inner.peft_config.items():
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
            return False
        if not _keeps_base_weights(config, scores=name == reward):
            return False
        if config.use_dora or getattr(config, "target_parameters", None):
            return False
    trained = [name for name, parameter in inner.named_parameters() if parameter.requires_grad]
    return bool(trained) and all(any(part in name for part in _LORA_MATRICES) for name in trained)


def attach_adapter(model: Any, peft_config: Any) -> Any:
    """Adds a new adapter configured by `peft_config` to `model`.

    Raises:
        ImportError: if peft is not installed.
        ValueError: if `peft_config` is not a `peft.PeftConfig`, or configures prompt learning.
    """
    peft = require_peft("peft_config")
    if not isinstance(peft_config, peft.PeftConfig):
        raise ValueError(f"peft_config must be a peft.PeftConfig, not {type(peft_config).__name__}")
    with _ignoring_peft_deprecation():
        if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
            model = peft.prepare_model_for_kbit_training(model)
        return checked(peft.get_peft_model(model, peft_config))


def checked(peft_model: Any) -> Any:
    """Returns `peft_model` unchanged after checking that its adapter does not shift token positions.

    Raises:
        ValueError: for prompt learning, whose virtual tokens shift every position.
    """
    config = peft_model.active_peft_config
    if config.is_prompt_learning:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise ValueError(
            f"peft_type={kind} prepends virtual tokens, which shifts every per-token value; "
            "use an adapter on the weights, such as LoraConfig"
        )
    return peft_model


def load_adapter(model: Any, source: str, *, is_trainable: bool, **hub: Any) -> Any:
    """Loads a trained adapter from a folder or hub id onto `model`."""
    peft = require_peft(f"the PEFT adapter {source!r}")
    with _ignoring_peft_deprecation():
        return checked(peft.PeftModel.from_pretrained(model, source, is_trainable=is_trainable, **hub))


@contextmanager
def _ignoring_peft_deprecation() -> Iterator[None]:
    """Silences the deprecation warnings that peft triggers by using old names of transformers."""
    with warnings.catch_warnings():
        for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable"):
            warnings.filterwarnings("ignore", message=rf".*`{name}` is deprecated", category=FutureWarning)
        yield


def add_frozen_adapter(peft_model: Any, source: str, adapter_name: str, **hub: Any) -> None:
    """Loads another adapter, frozen and inactive, onto a model; its mode and `requires_grad` flags do not change.

    Args:
        peft_model: the policy.
        source: folder or hub id of the adapter.
        adapter_name: name to give it.
        hub: hub arguments such as `revision` and `token`.

    Raises:
        ValueError: if the name is taken, or the adapter was trained on another architecture.
    """
    if adapter_name in peft_model.peft_config:
        raise ValueError(f"the model already has an adapter named {adapter_name!r}")
    training = {module: module.training for module in peft_model.modules()}
    with preserve_requires_grad(peft_model), _ignoring_peft_deprecation():
        result = peft_model.load_adapter(source, adapter_name, is_trainable=False, **hub)
    for module, was_training in training.items():  # peft switches to evaluation mode
        module.training = was_training
    if result.missing_keys:
        peft_model.delete_adapter(adapter_name)
        raise ValueError(
            f"the adapter {source!r} does not fit {type(base_language_model(peft_model)).__name__}: it lacks "
            f"{len(result.missing_keys)} weights, such as {result.missing_keys[0]}; it was trained on another "
            "architecture"
        )
    for name, parameter in peft_model.named_parameters():
        if f".{adapter_name}." in f"{name}.":
            parameter.requires_grad_(False)


def add_reward_adapter(
    peft_model: Any, source: str, adapter_name: str, weights: dict[str, torch.Tensor], **hub: Any
) -> nn.Linear:
    """Loads a second, frozen adapter and returns its frozen score head.

    Args:
        peft_model: the policy; its active adapter, mode and `requires_grad` flags do not change.
        source: folder or hub id of the adapter.
        adapter_name: must contain "reward", which identifies its parameters.
        weights: the adapter file's tensors, including the score head's.
        hub: hub arguments such as `revision` and `token`.

    Returns:
        A linear layer from the hidden size to the number of labels.

    Raises:
        ValueError: if `adapter_name` lacks "reward" or is taken, `weights` has no score head, or the adapter or its
            score head was trained on another architecture.
    """
    if "reward" not in adapter_name:
        raise ValueError(f"adapter_name={adapter_name!r} must contain 'reward'")
    score = {name.rpartition(".")[2]: w for name, w in weights.items() if ".score." in f".{name}"}
    if "weight" not in score:
        raise ValueError(f"the adapter {source!r} has no score head (no tensor named score.weight)")
    labels, width = score["weight"].shape
    size = base_language_model(peft_model).get_input_embeddings().weight.shape[1]
    if width != size:
        raise ValueError(f"the score head of {source!r} reads hidden states of size {width}; the model's have {size}")
    add_frozen_adapter(peft_model, source, adapter_name, **hub)
    head = nn.Linear(width, labels, bias="bias" in score)
    head.load_state_dict(score)
    return head.to(device=next(peft_model.parameters()).device).requires_grad_(False).eval()
