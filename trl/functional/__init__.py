"""Pure masked maths on tensors: no models, no state, no dependency but torch."""

from trl.functional.advantages import gae, last_true, shape_rewards
from trl.functional.kl import adaptive_kl_coef, exact_kl, k1, k1_abs, k2, k3
from trl.functional.logprobs import entropy, token_logprobs, token_logprobs_and_entropy
from trl.functional.losses import PolicyLoss, ValueLoss, importance_weights, policy_loss, value_loss
from trl.functional.masked import masked_mean, masked_moments, masked_sum, masked_var, masked_whiten
from trl.functional.moments import Moments, update_moments

__all__ = [
    "Moments",
    "PolicyLoss",
    "ValueLoss",
    "adaptive_kl_coef",
    "entropy",
    "exact_kl",
    "gae",
    "importance_weights",
    "k1",
    "k1_abs",
    "k2",
    "k3",
    "last_true",
    "masked_mean",
    "masked_moments",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "policy_loss",
    "shape_rewards",
    "token_logprobs",
    "token_logprobs_and_entropy",
    "update_moments",
    "value_loss",
]
