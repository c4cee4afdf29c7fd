"""Per-token KL between policy and reference policy: the definition.

With log p and log q the log-softmax of the two rows and d_v = log p_v - log q_v:

    full         KL(p || q) = sum_v p_v d_v
    full_reverse KL(q || p) = -sum_v q_v d_v
    k1 ... k3    from d_a at the action: see kl_from_logprobs
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager import kl_from_logprobs, token_logprobs
from lsc_kernels.eager.kl_from_logprobs import KLOptions
from lsc_kernels.eager.token_logprobs import log_softmax


def difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p - log q, 0 where they are equal, also where both are -inf."""
    return torch.where(log_p == log_q, 0.0, log_p - log_q)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension: never negative, +inf where q misses what p has."""
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * difference(log_p, log_q))
    misses = (log_q == -torch.inf) & (log_p > -torch.inf)
    return token_logprobs.row_sum(torch.where(misses, torch.inf, terms)).clamp_min(0.0)


def _kl(
    log_p: Tensor, log_q: Tensor, d: Tensor, log_weight: Tensor | None, options: KLOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL [...], and the factors of its gradient: on d log ratio, on d divergence, and on log pi(a)."""
    match options.kind:
        case "full":
            value, own = divergence(log_p, log_q), torch.ones_like(d)
        case "full_reverse":
            value, own = divergence(log_q, log_p), torch.ones_like(d)
        case _:
            value, own = kl_from_logprobs.estimate(d, options), kl_from_logprobs.slope(d, options)
    sampled = options.straight_through or not options.kind.startswith("full")
    if sampled:
        own = kl_from_logprobs.slope(d, options)
    kl, own, on_logprob = kl_from_logprobs.clamp_and_weigh(value, own, d, log_weight, options, sampled)
    zero = torch.zeros_like(own)
    return (kl, own, zero, on_logprob) if sampled else (kl, zero, own, on_logprob)


def forward(
    policy_logits: Tensor,
    ref_logits: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    temperature: float | Tensor,
    options: KLOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (kl, logprobs, ref_logprobs, entropy, state). The state is the reference's log-probabilities in fp64; the
    rest is computed again in backward."""
    kept, vocabulary = token_logprobs.counted(actions, mask), policy_logits.shape[-1]
    token_logprobs.check_actions(actions, vocabulary, kept)
    log_p, log_q = log_softmax(policy_logits, temperature), log_softmax(ref_logits, temperature)
    logprobs, ref_logprobs = (
        token_logprobs.at_action(log_p, actions),
        token_logprobs.at_action(log_q, actions),
    )
    log_weight = None if old_logprobs is None else logprobs - old_logprobs.double()
    kl, _, _, _ = _kl(log_p, log_q, difference(logprobs, ref_logprobs), log_weight, options)
    entropy = token_logprobs.row_sum(token_logprobs.minus_p_log_p(log_p))
    outputs = [
        token_logprobs.of_rows(output, actions, vocabulary, kept)
        for output in (kl, logprobs, ref_logprobs, entropy)
    ]
    if torch.float64 not in (policy_logits.dtype, ref_logits.dtype):
        outputs = [output.float() for output in outputs]
    return outputs[0], outputs[1], outputs[2], outputs[3], ref_logprobs


def backward(
    grad_kl: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_ref_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    policy_logits: Tensor,
    ref_logits: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    temperature: float | Tensor,
    options: KLOptions,
    state: Tensor,
    want_policy: bool,
    want_ref: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The table of gradients, x and y the two models' logits over the temperature; y is read for a divergence and for
    a gradient to the reference only:

    ================  =====================================  ==========================
    output            d / d x_v                              d / d y_v
    ================  =====================================  ==========================
    log p_a           1[v = a] - p_v                         0
    log q_a           0                                      1[v = a] - q_v
    entropy           -p_v (log p_v + entropy)               0
    KL(p || q)        p_v (d_v - KL)                         q_v - p_v
    KL(q || p)        p_v - q_v                              -q_v (d_v + KL)
    k(d_a)            k'(d_a) (1[v = a] - p_v)               -k'(d_a) (1[v = a] - q_v)
    ================  =====================================  ==========================
    """
    kept, vocabulary = token_logprobs.counted(actions, mask), policy_logits.shape[-1]
    log_p = log_softmax(policy_logits, temperature)
    p = log_p.exp()
    log_q, q = log_p, p  # where the reference is not read
    if want_ref or options.kind.startswith("full"):
        log_q = log_softmax(ref_logits, temperature)
        q = log_q.exp()
    index = actions.long().clamp(0, vocabulary - 1).unsqueeze(-1)
    one_hot = torch.zeros_like(p).scatter_(-1, index, 1.0)
    logprobs, ref_logprobs = token_logprobs.at_action(log_p, actions), state
    log_weight = None if old_logprobs is None else logprobs - old_logprobs.double()
    _, on_ratio, on_divergence, on_logprob = _kl(
        log_p, log_q, difference(logprobs, ref_logprobs), log_weight, options
    )

    def upstream(grad: Tensor | None) -> Tensor:
        return torch.zeros_like(logprobs) if grad is None else torch.where(kept, grad.double(), 0.0)

    def chain(grad: Tensor, factor: Tensor) -> Tensor:
        return torch.where(
            grad == 0, 0.0, grad * factor
        )  # an overflowed slope that nobody asked for is not NaN

    to_kl, to_entropy = upstream(grad_kl), upstream(grad_entropy)
    to_logprobs = upstream(grad_logprobs) + chain(to_kl, on_logprob)
    to_ref_logprobs = upstream(grad_ref_logprobs) - chain(to_kl, on_ratio)
    to_divergence = chain(to_kl, on_divergence).unsqueeze(-1)

    divisor = temperature.double().unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    grad_policy = grad_ref = None
    if want_policy:
        grad = to_logprobs.unsqueeze(-1) * (one_hot - p)
        terms = token_logprobs.minus_p_log_p(log_p)
        grad = grad + to_entropy.unsqueeze(-1) * (terms - p * token_logprobs.row_sum(terms).unsqueeze(-1))
        if options.kind == "full":
            grad = grad + to_divergence * _by_first(log_p, log_q)
        elif options.kind == "full_reverse":
            grad = grad + to_divergence * (p - q)
        grad_policy = token_logprobs.of_rows(grad / divisor, actions, vocabulary, kept).to(
            policy_logits.dtype
        )
    if want_ref:
        grad = to_ref_logprobs.unsqueeze(-1) * (one_hot - q)
        if options.kind == "full":
            grad = grad + to_divergence * (q - p)
        elif options.kind == "full_reverse":
            grad = grad + to_divergence * _by_first(log_q, log_p)
        grad_ref = token_logprobs.of_rows(grad / divisor, actions, vocabulary, kept).to(ref_logits.dtype)
    return grad_policy, grad_ref


def _by_first(log_p: Tensor, log_q: Tensor) -> Tensor:
    """d KL(p || q) / d x_v = p_v (d_v - KL), 0 where p_v is 0."""
    kl = divergence(log_p, log_q).unsqueeze(-1)
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (difference(log_p, log_q) - kl))
