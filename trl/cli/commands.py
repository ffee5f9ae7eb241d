"""The commands: names, arguments, options, and the function of each. Read for `trl --help`, so nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option of a command, other than settings."""

    name: str  # "--out"
    meaning: str
    value: str = ""  # "FILE"; empty for a switch
    repeated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command."""

    name: str
    summary: str
    usage: str  # arguments, as in "RUN [RUN ...]"
    function: str  # "trl.cli.training:train", called with an Invocation
    arguments: tuple[int, int | None]  # fewest and most arguments
    options: tuple[Option, ...] = ()
    settings: bool = False  # takes the flags of every setting
    example: str = ""


_DRY_RUN = Option(name="--dry-run", meaning="print the settings, where each came from, and an estimate; train nothing")
_PROMPT = Option(name="--prompt", value="TEXT", meaning="a prompt; may be repeated", repeated=True)
_SEED = Option(name="--seed", value="N", meaning="random seed (default: 0)")
_NEW_TOKENS = Option(
    name="--max-new-tokens", value="N", meaning="most tokens of a response (default: that of training)"
)
_TEMPERATURE = Option(name="--temperature", value="T", meaning="sampling temperature (default: that of training)")

_ALL = (
    Command(
        name="demo",
        summary="PPO for positive film reviews with the two tiny models in this package",
        usage="[--steps N] [--seed N] [--out DIR]",
        function="trl.cli.looking:demo",
        arguments=(0, 0),
        options=(
            Option(name="--seed", value="N", meaning="random seed"),
            Option(name="--steps", value="N", meaning="PPO steps"),
            Option(name="--batch-size", value="N", meaning="reviews per step"),
            Option(name="--out", value="DIR", meaning="output folder (default: runs/demo)"),
        ),
    ),
    Command(
        name="ppo",
        summary="train a language model by PPO on a reward",
        usage="[CONFIG.yaml ...] [--SETTING VALUE ...]",
        function="trl.cli.training:train",
        arguments=(0, None),
        options=(_DRY_RUN,),
        settings=True,
        example="trl ppo run.yaml --learning-rate 1e-5",
    ),
    Command(
        name="grpo",
        summary="train a language model by GRPO, which compares several responses to each prompt",
        usage="[CONFIG.yaml ...] [--SETTING VALUE ...]",
        function="trl.cli.training:train",
        arguments=(0, None),
        options=(_DRY_RUN,),
        settings=True,
        example="trl grpo run.yaml --group-size 8",
    ),
    Command(
        name="sft",
        summary="supervised fine-tuning: train a language model on texts, chats or prompts with completions",
        usage="[CONFIG.yaml ...] [--SETTING VALUE ...]",
        function="trl.cli.training:train",
        arguments=(0, None),
        options=(_DRY_RUN,),
        settings=True,
        example="trl sft --model tiny-gpt2-reviews --data rows.jsonl --max-steps 100",
    ),
    Command(
        name="reward",
        summary="train a reward model on pairs of a chosen and a rejected response",
        usage="[CONFIG.yaml ...] [--SETTING VALUE ...]",
        function="trl.cli.training:train",
        arguments=(0, None),
        options=(_DRY_RUN,),
        settings=True,
        example="trl reward reward.yaml --held-out 200",
    ),
    Command(
        name="dpo",
        summary="train a language model on pairs of a chosen and a rejected response, without a reward model",
        usage="[CONFIG.yaml ...] [--SETTING VALUE ...]",
        function="trl.cli.training:train",
        arguments=(0, None),
        options=(_DRY_RUN,),
        settings=True,
        example="trl dpo dpo.yaml --model runs/sft/model --beta 0.1",
    ),
    Command(
        name="kto",
        summary="train a language model on single responses that are labelled as good or bad",
        usage="[CONFIG.yaml ...] [--SETTING VALUE ...]",
        function="trl.cli.training:train",
        arguments=(0, None),
        options=(_DRY_RUN,),
        settings=True,
        example="trl kto kto.yaml --model runs/sft/model",
    ),
    Command(
        name="resume",
        summary="go on with a run that was stopped, or train a finished one for longer",
        usage="RUN [--SETTING VALUE ...]",
        function="trl.cli.training:resume",
        arguments=(1, 1),
        options=(_DRY_RUN,),
        settings=True,
        example="trl resume runs/polite --steps 400",
    ),
    Command(
        name="eval",
        summary="compare a trained model with the one it started from, on the same prompts",
        usage="RUN [--SETTING VALUE ...]",
        function="trl.cli.trained:evaluate",
        arguments=(1, 1),
        options=(Option(name="--eval-seed", value="N", meaning="seed of the responses (default: 0)"),),
        settings=True,
        example="trl eval runs/polite --prompts others.jsonl",
    ),
    Command(
        name="generate",
        summary="sample from a trained model",
        usage="RUN|MODEL [--prompt TEXT]",
        function="trl.cli.trained:generate",
        arguments=(1, 1),
        options=(
            _PROMPT,
            Option(name="--samples", value="N", meaning="responses per prompt (default: 1)"),
            _NEW_TOKENS,
            _TEMPERATURE,
            _SEED,
        ),
        example='trl generate runs/polite --prompt "This film was" --samples 3',
    ),
    Command(
        name="chat",
        summary="talk to a trained model",
        usage="RUN|MODEL",
        function="trl.cli.trained:chat",
        arguments=(1, 1),
        options=(_NEW_TOKENS, _TEMPERATURE, _SEED),
        example="trl chat runs/polite",
    ),
    Command(
        name="report",
        summary="curves, health and completions of one or several runs, as an HTML file",
        usage="RUN [RUN ...] [--out FILE] [--open] [--watch]",
        function="trl.cli.looking:report",
        arguments=(1, None),
        options=(
            Option(name="--out", value="FILE", meaning="the file (default: report.html in the run)"),
            Option(name="--open", meaning="open it in a browser"),
            Option(name="--watch", meaning="serve it on this machine, live, until Ctrl-C"),
            Option(name="--port", value="N", meaning="port of --watch (default: any)"),
        ),
        example="trl report runs/polite runs/rude --open",
    ),
    Command(
        name="runs",
        summary="table of runs: algorithm, state, steps, score, KL, loss, when, where the model is",
        usage="[ROOT] [--json]",
        function="trl.cli.run_table:main",
        arguments=(0, 1),
        options=(Option(name="--json", meaning="as JSON"),),
    ),
    Command(
        name="doctor",
        summary="look for what makes training fail: in a configuration, in a run, or in this environment",
        usage="[CONFIG.yaml | RUN] [--SETTING VALUE ...]",
        function="trl.cli.looking:doctor",
        arguments=(0, 1),
        settings=True,
        example="trl doctor run.yaml",
    ),
    Command(
        name="config",
        summary="write, check or compare configurations",
        usage="init [COMMAND] [FILE] | check FILE ... | diff FILE|RUN FILE|RUN",
        function="trl.cli.configs:main",
        arguments=(1, None),
        options=(Option(name="--force", meaning="init: overwrite the file"),),
        settings=True,
        example="trl config init dpo",
    ),
    Command(
        name="completion",
        summary="completion script for a shell",
        usage="bash | zsh | fish",
        function="trl.cli.completion:main",
        arguments=(1, 1),
        example='eval "$(trl completion bash)"',
    ),
)
COMMANDS: Mapping[str, Command] = {command.name: command for command in _ALL}
