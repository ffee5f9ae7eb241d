"""Settings that the stages on preferences share, and how old constructors' arguments become settings."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from trl.trainer.offline.stage_config import StageConfig

P = TypeVar("P", bound="PreferenceConfig")


@dataclass
class PreferenceConfig(StageConfig):
    """Settings of `RewardTrainer`, `DPOTrainer` and `KTOTrainer` alike."""

    # Settings of TRL that are not supported: the values that change nothing, and what to do instead.
    unsupported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "activation_offloading": (
            (False,),
            "set gradient_checkpointing=True, which saves as much memory on one device",
        ),
        "router_aux_loss_coef": ((None, 0.0), "leave it out: mixtures of experts train without a balancing loss"),
    }

    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    pad_to_multiple_of: int | str | None = field(
        default=None,
        metadata={"help": "Make the number of columns of a batch a multiple of this; auto and None do not."},
    )
    activation_offloading: bool = field(default=False, metadata={"help": "Not supported."})
    router_aux_loss_coef: float | None = field(default=None, metadata={"help": "Not supported."})

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: if a setting is not supported or out of its range.
        """
        super().__post_init__()
        if isinstance(self.pad_to_multiple_of, str):
            none = self.pad_to_multiple_of.lower() in ("auto", "none", "null")
            self.pad_to_multiple_of = None if none else int(self.pad_to_multiple_of)
        self.check()

    def check(self) -> None:
        """Checks the settings again, after some were changed.

        Raises:
            ValueError: if a setting is not supported or out of its range.
        """
        for name, (harmless, remedy) in self.unsupported.items():
            if getattr(self, name) not in harmless:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported: {remedy}")
        for name in (
            "max_length",
            "max_prompt_length",
            "max_target_length",
            "max_completion_length",
            "pad_to_multiple_of",
        ):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be positive, or None for no limit")


def with_old_arguments(args: P, given: Mapping[str, Any], refused: Mapping[str, tuple[Any, ...]]) -> P:
    """Returns the settings with what an older constructor took as arguments.

    Args:
        args: the settings; not changed.
        given: arguments by name; None leaves a setting as it is.
        refused: arguments that are no settings, with the values that change nothing.

    Raises:
        TypeError: if an argument is unknown.
        ValueError: if an argument is not supported, or contradicts `args`.
    """
    settings = {entry.name: entry for entry in fields(args)}
    changed = copy.copy(args)
    for name, value in given.items():
        if name in refused:
            if refused[name] and value not in refused[name]:
                raise ValueError(f"{name}={value!r} is not supported: leave it out")
        elif name not in settings:
            raise TypeError(
                f"unexpected argument {name!r}: expected an argument in the documentation or a setting of "
                f"{type(args).__name__}"
            )
        elif value is not None:
            entry = settings[name]
            default = entry.default if entry.default_factory is MISSING else entry.default_factory()
            before = getattr(args, name)
            if before not in (default, value, [value]):
                raise ValueError(
                    f"{name}={value!r} contradicts {type(args).__name__}({name}={before!r}): set it in one of them "
                    "alone"
                )
            setattr(changed, name, value)
    if vars(changed) == vars(args):
        return args
    changed.check()
    return changed


def with_quantization(args: P, model: Any, quantization_config: Any) -> P:
    """Returns the settings with a quantization that `from_pretrained` carries out; without one as they are.

    Raises:
        ValueError: if the model is loaded already.
    """
    if quantization_config is None:
        return args
    if not isinstance(model, str):
        raise ValueError(
            f"quantization_config is for a model given as an id or folder, but model is a {type(model).__name__}: pass "
            "it to its from_pretrained"
        )
    changed = copy.copy(args)
    given: Any = args.model_init_kwargs or {}
    changed.model_init_kwargs = {**given, "quantization_config": quantization_config}
    return changed
