"""`trl eval`, `trl generate` and `trl chat`: what a trained model does."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl.cli import launch, places, reward_sources
from trl.cli.arguments import Invocation
from trl.cli.catalogue import STAGES
from trl.cli.problems import Problem, UsageError
from trl.cli.run_table import existing_run
from trl.trackers import RunDirectory
from trl.untrusted import visible

_LEAVE = ("exit", "quit")


def evaluate(invocation: Invocation) -> int:
    """`trl eval RUN`: the newest checkpoint against the model that training began with."""
    run = existing_run(invocation.arguments[0])
    started = launch.Launch(run)
    if started.command in STAGES:
        raise UsageError(
            f"{places.shown_path(run)} is a run of trl {started.command}, which has no reward to compare by; trl "
            "report shows its evaluations"
        )
    resolved = started.resolved(invocation.environment, invocation.flags)
    places.check(resolved)
    reward_sources.check(resolved)
    started.check_files(resolved, any(flag.setting.path == "reward.functions" for flag in invocation.flags))
    seed = invocation.number("eval-seed")

    from trl.cli import building

    building.quiet()
    prompts, held_out = building.prompts(resolved)
    given_prompts = any(flag.setting.path == "data.prompts" for flag in invocation.flags)
    chosen = prompts if held_out is None or given_prompts else held_out
    if chosen is prompts and not given_prompts:
        sys.stderr.write(
            "the run held out no prompts: these are the ones it was trained on (--prompts takes a file of others)\n"
        )
    reward = reward_sources.build(resolved, started.folder)
    trainer = building.trainer(started.command, resolved, steps=1)
    if trainer.config.max_skipped_updates is None:  # as the run had it, so that loading finds no difference
        trainer.config.max_skipped_updates = resolved["train.max_skipped_updates"]
    try:
        if trainer.load_checkpoint(run / "checkpoints") is None:
            raise UsageError(f"{places.shown_path(run)} has no checkpoint yet: there is no trained model to evaluate")
        arguments: dict[str, Any] = {} if seed is None else {"seed": seed}
        result = trainer.evaluate(chosen, reward, generation=building.generation(resolved), **arguments)
    finally:
        reward.close()
    print(visible(str(result)))
    return 0


def generate(invocation: Invocation) -> int:
    """`trl generate RUN|MODEL --prompt TEXT`."""
    speaker = Speaker.load(invocation)
    prompts = invocation.options.get("prompt") or _lines(invocation)
    samples = invocation.number("samples")
    samples = 1 if samples is None else samples
    if samples < 1:
        raise UsageError([Problem(text=f"{samples} is less than 1", where="--samples")])
    for prompt in prompts:
        for response in speaker.respond(prompt, samples):
            print(visible(f"{prompt}{response}"))
            if samples > 1 or len(prompts) > 1:
                print("---")
    return 0


def chat(invocation: Invocation) -> int:
    """`trl chat RUN|MODEL`."""
    speaker = Speaker.load(invocation)
    messages: list[dict[str, str]] = []
    templated = bool(getattr(speaker.tokenizer, "chat_template", None))
    if not templated:
        print("This model has no chat template: it continues each text that you write.")
    print(f"{' or '.join(_LEAVE)}, or Ctrl-D, ends the conversation.")
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return 0
        if text.strip() in _LEAVE:
            return 0
        if not text.strip():
            continue
        if templated:
            messages.append({"role": "user", "content": text})
            text = speaker.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        (response,) = speaker.respond(text, 1, special_tokens=not templated)
        messages.append({"role": "assistant", "content": response})
        print(visible(response))


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """A language model that continues texts."""

    model: Any
    tokenizer: Any
    max_new_tokens: int
    temperature: float

    @classmethod
    def load(cls, invocation: Invocation) -> Speaker:
        """Loads the model of a finished run, of a folder or of a hub id.

        Raises:
            UsageError: if the run has no model yet, or an option is out of range.
        """
        name = invocation.arguments[0]
        new_tokens, temperature = 64, 1.0
        if RunDirectory.exists(name) or (not Path(name).exists() and RunDirectory.exists(Path("runs") / name)):
            run = existing_run(name)
            model = run / "model"
            if not model.resolve().is_relative_to(run) or not model.is_dir():
                shown = places.shown_path(run)
                raise UsageError(f"{shown} has no model yet: it is written at the end; trl resume {shown} trains on")
            stored = launch.stored_config(run)
            if (stored.get("algorithm") or {}).get("name") == "reward":
                raise UsageError(
                    f"{places.shown_path(run)} is a run of trl reward: its model scores texts and writes none"
                )
            new_tokens = int((stored.get("train") or {}).get("generation", {}).get("max_new_tokens", new_tokens))
            temperature = float((stored.get("ppo") or {}).get("temperature", temperature))
            name = str(model)
        given_tokens, given_temperature = invocation.number("max-new-tokens"), invocation.number("temperature", float)
        for option, value in (("max-new-tokens", given_tokens), ("temperature", given_temperature)):
            if value is not None and value <= 0:
                raise UsageError([Problem(text=f"{value} must be above 0", where=f"--{option}")])

        from trl.cli import building
        from trl.core import set_seed
        from trl.models import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
        from trl.pretrained import load_tokenizer

        building.quiet()
        place = places.place_of(name)
        seq2seq = building.is_encoder_decoder(place)
        wrapper = AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead
        loaded = wrapper.from_pretrained(place).pretrained_model.eval()
        tokenizer = load_tokenizer(place)
        set_seed(invocation.number("seed") or 0)
        return cls(
            model=loaded,
            tokenizer=tokenizer,
            max_new_tokens=given_tokens or new_tokens,
            temperature=given_temperature or temperature,
        )

    def respond(self, prompt: str, samples: int, *, special_tokens: bool = True) -> list[str]:
        """Samples continuations of a text."""
        import torch

        inputs = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=special_tokens)
        if not inputs["input_ids"].numel():
            raise UsageError("the prompt is empty")
        with torch.no_grad():
            tokens = self.model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=True, top_k=0,
                top_p=1.0, temperature=self.temperature, max_new_tokens=self.max_new_tokens,
                num_return_sequences=samples,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )  # fmt: skip
        start = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return [str(self.tokenizer.decode(row[start:], skip_special_tokens=True)) for row in tokens]


def _lines(invocation: Invocation) -> list[str]:
    """Prompts from standard input, one a line."""
    if sys.stdin.isatty():
        raise UsageError("trl generate needs --prompt TEXT, or prompts on standard input, one a line")
    return [line.rstrip("\n") for line in sys.stdin if line.strip()]
