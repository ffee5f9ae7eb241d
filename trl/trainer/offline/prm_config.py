"""Settings of `PRMTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl.trainer.offline.preference_config import PreferenceConfig


@dataclass
class PRMConfig(PreferenceConfig):
    """Settings of `PRMTrainer`: those of `transformers.TrainingArguments` and `PreferenceConfig`, and the following."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of AdamW."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Maximum tokens of prompt and steps, which lose their end. None for no limit."}
    )
    max_prompt_length: int | None = field(
        default=512, metadata={"help": "Maximum tokens of a prompt; it loses its beginning. None for no limit."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Maximum tokens of all steps; they lose their end. None for no limit."}
    )
    step_separator: str = field(
        default="\n", metadata={"help": "Text that ends every step; its last token is where the step is judged."}
    )
    train_on_last_step_only: bool = field(
        default=False, metadata={"help": "Train on the label of a row's last step only; evaluations count all steps."}
    )

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: if a setting is not supported or out of its range.
        """
        super().check()
        if not self.step_separator:
            raise ValueError("step_separator='' separates nothing: give the text that ends a step")
