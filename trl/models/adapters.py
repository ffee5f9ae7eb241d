"""PEFT adapters: attaching, loading and inspecting them, and using the disabled adapter as the reference model.

`peft` is imported only when a caller asks for an adapter.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trl.models.trunk import pretrained_part, unwrap

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
def reference_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the reference model: `model` itself with its adapters disabled.

    It equals the initial policy only if the adapter started at zero, see `adapter_starts_at_zero`.

    Args:
        model: a value-head model or language model with a PEFT adapter, possibly wrapped in DDP.

    Yields:
        The unwrapped model. Adapters and `requires_grad` flags are restored on exit.

    Raises:
        ValueError: if the model has no adapter.
    """
    peft_model = peft_part(model)
    with preserve_requires_grad(peft_model), peft_model.disable_adapter():
        yield unwrap(model)


def adapter_starts_at_zero(model: nn.Module) -> bool:
    """Whether the active adapter is currently a no-op, so that disabling it leaves the model's outputs unchanged.

    True for the default LoRA initialisation (B = 0, or A = 0 in embeddings). False for a trained adapter, and for
    adapter types or initialisations where it cannot be determined: use a copy (`create_reference_model`) as the reference then.

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
        if not isinstance(getattr(module, "active_adapters", None), list):
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
    layers = (module for module in model.modules() if isinstance(getattr(module, "active_adapters", None), list))
    parts = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return tuple(str([getattr(layer, part, None) for part in parts]) for layer in layers)


def _factors(module: nn.Module, adapter: str) -> tuple[Any, Any] | None:
    """Returns a LoRA layer's A and B matrices (A starts at 0 in embeddings, B elsewhere); None for other modules."""
    for names in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        parts = [getattr(module, name, None) or {} for name in names]
        if all(adapter in part for part in parts):
            a, b = (getattr(part[adapter], "weight", part[adapter]) for part in parts)
            return a.detach(), b.detach()
    return None


def _keeps_base_weights(config: Any) -> bool:
    """False for initialisations that change base weights (PiSSA, OLoRA ...) and for extra trained modules or biases."""
    plain_start = config.init_lora_weights in (True, "gaussian", "orthogonal") or (
        config.init_lora_weights is False  # random B: detected by inspecting B
    )
    extra = bool(getattr(config, "modules_to_save", None)) or getattr(config, "bias", "none") != "none"
    return plain_start and not extra


def trains_only_lora(model: nn.Module) -> bool:
    """Whether LoRA matrices, whose layers take activations of any dtype, are all that is trained below the value head.

    False for DoRA, adapters on bare parameters, additionally trained biases or modules, initialisations that change the
    base weights, and models with a reward adapter, which scores outside the trainer's passes.
    """
    inner = pretrained_part(model)
    if not is_peft_model(inner) or getattr(unwrap(model), "reward_adapter_name", None) is not None:
        return False
    for config in inner.peft_config.values():
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA" or not _keeps_base_weights(config):
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
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = peft.prepare_model_for_kbit_training(model)
    with _ignoring_peft_deprecation():
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
    """Silences the deprecation warning that peft triggers by using an old transformers attribute name."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r".*is_gradient_checkpointing.* is deprecated", category=FutureWarning
        )
        yield


def add_reward_adapter(peft_model: Any, source: str, adapter_name: str, weights: dict[str, torch.Tensor]) -> nn.Linear:
    """Loads a second, frozen adapter and returns its frozen score head.

    Args:
        peft_model: the policy; its active adapter and `requires_grad` flags do not change.
        source: folder or hub id of the adapter.
        adapter_name: must contain "reward", which identifies its parameters.
        weights: the adapter file's tensors, including the score head's.

    Returns:
        A linear layer from the hidden size to the number of labels.

    Raises:
        ValueError: if `adapter_name` lacks "reward" or is taken, or `weights` has no score head.
    """
    if "reward" not in adapter_name:
        raise ValueError(f"adapter_name={adapter_name!r} must contain 'reward'")
    if adapter_name in peft_model.peft_config:
        raise ValueError(f"the model already has an adapter named {adapter_name!r}")
    score = {name.rpartition(".")[2]: w for name, w in weights.items() if ".score." in f".{name}"}
    if "weight" not in score:
        raise ValueError(f"the adapter {source!r} has no score head (no tensor named score.weight)")
    with preserve_requires_grad(peft_model):
        peft_model.load_adapter(source, adapter_name, is_trainable=False)
    for name, parameter in peft_model.named_parameters():
        if adapter_name in name:
            parameter.requires_grad_(False)
    labels, width = score["weight"].shape
    head = nn.Linear(width, labels, bias="bias" in score)
    head.load_state_dict(score)
    return head.to(device=next(peft_model.parameters()).device).requires_grad_(False).eval()
