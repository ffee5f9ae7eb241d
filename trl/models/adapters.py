"""PEFT: which adapters a model carries, and where its reference model comes from.

`peft` is imported where a caller has asked for an adapter, and nowhere else.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trl.models.trunk import unwrap

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def require_peft(what: str) -> Any:
    """The `peft` module.

    Raises:
        ImportError: with the line that installs it, if it is missing.
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
    """The `PeftModel` in a (possibly wrapped) value-head model or language model.

    Raises:
        ValueError: if there is none.
    """
    inner = unwrap(model)
    inner = getattr(inner, "pretrained_model", inner)
    if not is_peft_model(inner):
        raise ValueError(
            f"{type(inner).__name__} carries no PEFT adapter; make its reference with create_reference_model"
        )
    return inner


@contextmanager
def preserve_requires_grad(model: nn.Module) -> Iterator[None]:
    """Restores on leaving which parameters are trained: peft's switches between adapters change it."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


@contextmanager
def reference_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the model whose numbers are the reference's: `model` itself with its adapters off.

    Those numbers are the starting policy's only if the adapter started at zero: see `adapter_starts_at_zero`.

    Args:
        model: a value-head model or language model with a PEFT adapter, possibly wrapped by DDP.

    Yields:
        The unwrapped model. Adapters, and which parameters are trained, are restored on leaving.

    Raises:
        ValueError: if the model carries no adapter.
    """
    peft_model = peft_part(model)
    with preserve_requires_grad(peft_model), peft_model.disable_adapter():
        yield unwrap(model)


def adapter_starts_at_zero(model: nn.Module) -> bool:
    """Whether the active adapter changes nothing at present, so that the disabled adapter is this very model.

    True for the usual LoRA start (B = 0, or A = 0 in embeddings). False for an adapter that was trained before, and for any kind or start of
    adapter of which it can't be told: a reference must then be a `frozen_copy`.

    Raises:
        ValueError: if the model carries no adapter.
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
    """Refuses a model whose adapters take no part in its passes, so that no gradient would reach them.

    Raises:
        ValueError: if they are switched off or merged into the base, or the model carries none.
    """
    for name, module in peft_part(model).named_modules():
        for state in ("disable_adapters", "merged"):
            if isinstance(getattr(module, "active_adapters", None), list) and getattr(module, state, False) is True:
                off = state == "disable_adapters"
                what, way = ("off", "enable_adapter_layers()") if off else ("merged", "unmerge_adapter()")
                raise ValueError(
                    f"the adapter of {name} is {what}: nothing would reach it; call {way} of the PEFT model first"
                )


def _factors(module: nn.Module, adapter: str) -> tuple[Any, Any] | None:
    """The two matrices whose product a LoRA layer adds (embeddings start with A = 0, others with B = 0)."""
    for names in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        parts = [getattr(module, name, None) or {} for name in names]
        if all(adapter in part for part in parts):
            a, b = (getattr(part[adapter], "weight", part[adapter]) for part in parts)
            return a.detach(), b.detach()
    return None


def _keeps_base_weights(config: Any) -> bool:
    """False for the starts that change the base weights (PiSSA, OLoRA ...) and for modules trained beside LoRA."""
    plain_start = config.init_lora_weights in (True, "gaussian", "orthogonal") or (
        config.init_lora_weights is False  # random B: told apart by looking at B
    )
    extra = bool(getattr(config, "modules_to_save", None)) or getattr(config, "bias", "none") != "none"
    return plain_start and not extra


def stands_on_frozen_base(model: nn.Module) -> bool:
    """Whether all that is trained under the value head are LoRA's matrices, whose layers take activations of any dtype.

    False for DoRA, for adapters on bare parameters, for biases and modules trained beside LoRA, for starts that change the
    base weights, and with a reward adapter, which scores outside of the trainer's passes.
    """
    wrapper: Any = unwrap(model)
    inner = getattr(wrapper, "pretrained_model", wrapper)
    if not is_peft_model(inner) or getattr(wrapper, "reward_adapter_name", None) is not None:
        return False
    for config in inner.peft_config.values():
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA" or not _keeps_base_weights(config):
            return False
        if config.use_dora or getattr(config, "target_parameters", None):
            return False
    trained = [name for name, parameter in inner.named_parameters() if parameter.requires_grad]
    return bool(trained) and all(any(part in name for part in _FACTORS) for name in trained)


def frozen_copy(model: nn.Module) -> Any:
    """A copy of the unwrapped `model`, adapters included, in evaluation mode and without gradients."""
    clone = copy.deepcopy(unwrap(model)).eval()
    for parameter in clone.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return clone


def attach_adapter(model: Any, peft_config: Any) -> Any:
    """A fresh adapter on `model` as `peft_config` describes it.

    Raises:
        ImportError: if peft is missing.
        ValueError: if `peft_config` is none, or describes virtual tokens rather than weights.
    """
    peft = require_peft("peft_config")
    if not isinstance(peft_config, peft.PeftConfig):
        raise ValueError(f"peft_config must be a peft.PeftConfig, not {type(peft_config).__name__}")
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = peft.prepare_model_for_kbit_training(model)
    with _own_warnings_only():
        return checked(peft.get_peft_model(model, peft_config))


def checked(peft_model: Any) -> Any:
    """`peft_model` itself, if token positions mean the same with and without its adapter.

    Raises:
        ValueError: for prompt learning, whose virtual tokens shift every position.
    """
    config = peft_model.active_peft_config
    if config.is_prompt_learning:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise ValueError(
            f"peft_type={kind} puts virtual tokens before the text, which shifts every per-token value; "
            "use an adapter of weights such as LoraConfig"
        )
    return peft_model


def load_adapter(model: Any, source: str, *, is_trainable: bool, **hub: Any) -> Any:
    """`model` with the trained adapter of a folder or hub id."""
    peft = require_peft(f"the PEFT adapter {source!r}")
    with _own_warnings_only():
        return checked(peft.PeftModel.from_pretrained(model, source, is_trainable=is_trainable, **hub))


@contextmanager
def _own_warnings_only() -> Iterator[None]:
    """Keeps quiet what peft's releases ask of later transformers under an older name."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r".*is_gradient_checkpointing.* is deprecated", category=FutureWarning
        )
        yield


def add_reward_adapter(peft_model: Any, source: str, adapter_name: str, weights: dict[str, torch.Tensor]) -> nn.Linear:
    """Loads a second, frozen adapter and returns its frozen score head.

    Args:
        peft_model: the policy, whose active adapter and trained parameters stay as they are.
        source: folder or hub id of the adapter.
        adapter_name: a name that contains "reward", so that its parameters can be told apart.
        weights: the adapter file's tensors, among them the score head's.

    Returns:
        A linear layer of hidden size to number of labels.
    """
    if "reward" not in adapter_name:
        raise ValueError(f"adapter_name={adapter_name!r} must contain 'reward'")
    if adapter_name in peft_model.peft_config:
        raise ValueError(f"the model already has an adapter named {adapter_name!r}")
    score = {name.rpartition(".")[2]: w for name, w in weights.items() if ".score." in f".{name}"}
    if "weight" not in score:
        raise ValueError(f"the adapter {source!r} holds no score head (no tensor named score.weight)")
    with preserve_requires_grad(peft_model):
        peft_model.load_adapter(source, adapter_name, is_trainable=False)
    for name, parameter in peft_model.named_parameters():
        if adapter_name in name:
            parameter.requires_grad_(False)
    labels, width = score["weight"].shape
    head = nn.Linear(width, labels, bias="bias" in score)
    head.load_state_dict(score)
    first = next(peft_model.parameters())
    return head.to(device=first.device).requires_grad_(False).eval()
