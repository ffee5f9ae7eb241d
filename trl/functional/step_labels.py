"""Process reward models: the probability that a step is right, and its loss against a label."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def step_logits(outputs: Tensor) -> Tensor:
    """Log-odds that a step is right, from a classifier's outputs at its last token.

    Args:
        outputs: `[..., 1]` log-odds, or `[..., 2]` outputs of the labels wrong and right, whose difference they are.

    Returns:
        `[...]` log-odds.

    Raises:
        ValueError: if there are more outputs.
    """
    if outputs.shape[-1] not in (1, 2):
        raise ValueError(f"a step classifier has 1 or 2 outputs, not {outputs.shape[-1]}: set num_labels=2")
    return outputs[..., -1] - outputs[..., 0] if outputs.shape[-1] == 2 else outputs[..., 0]


def step_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """-q log σ(z) − (1 − q) log σ(−z): cross-entropy of a step's label.

    Lightman et al. 2023 (arXiv:2305.20050) with labels 0 and 1; Wang et al. 2024 (arXiv:2312.08935, eq. 5) with soft
    ones.

    Args:
        logits: `[...]` log-odds z that a step is right.
        targets: `[...]` labels q in [0, 1].

    Returns:
        `[...]` losses.
    """
    return -targets * logsigmoid(logits) - (1 - targets) * logsigmoid(-logits)
