"""`python -m tests.compat.without_peft FOLDER`: a new interpreter in which `import peft` fails.

Prints as JSON what `test_without_peft.py` asks for, a traceback where a part fails. One interpreter does all of it, as the
imports cost most of the time.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

sys.modules["peft"] = None  # type: ignore[assignment]


def old_submodules() -> list[str]:
    import trl

    return [trl.trainer.utils.__name__, trl.models.modeling_base.__name__]


def every_name() -> list[str]:
    names: dict[str, Any] = {}
    exec("from trl import *\nimport trl, trl.core, trl.models, trl.trainer", names)
    trl = names["trl"]
    assert not trl.is_peft_available()
    for name in trl.__all__:
        getattr(trl, name)
    return sorted(set(trl.__all__) - set(names))


def loading() -> list[Any]:
    import torch

    from tests.helpers import tiny_gpt2
    from trl import AutoModelForCausalLMWithValueHead, create_reference_model

    tiny_gpt2().save_pretrained(sys.argv[1])
    model = AutoModelForCausalLMWithValueHead.from_pretrained(sys.argv[1])
    create_reference_model(model)
    return [model.is_peft_model, list(model(input_ids=torch.tensor([[4, 5]]))[2].shape)]


def step() -> float:
    from tests.compat.test_ppo_trainer import QUERIES, RESPONSES, SCORES, trainer

    return float(trainer().step(QUERIES, RESPONSES, SCORES)["ppo/loss/total"])


# In this order: the first is about `import trl` alone.
PARTS: tuple[Callable[[], Any], ...] = (old_submodules, every_name, loading, step)


def main() -> None:
    results: dict[str, Any] = {}
    for part in PARTS:
        try:
            results[part.__name__] = part()
        except BaseException:
            results[part.__name__] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
