"""TRL's functions from logits to log-probabilities and entropies, by their names and with their arguments.

TRL 1.16 calls them where it has logits: in TPO, SDFT, SDPO, CPO, ORPO and A2PO. Its GRPO and RLOO trainers take
log-probabilities from a language-model head of their own, which makes no logits.

What differs: results are fp32 also of bf16 and fp16 logits (TRL's are rounded to them on a CPU), a common shift of the
logits costs no digits (TRL subtracts two large numbers in fp32), a token at -inf adds nothing to the entropy (there it
is NaN), an index of -100 is left out (there an error), an empty batch works (there an error). First derivative only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.ops.token_logprobs import TokenLogprobs, token_logprobs
from lsc_kernels.trainers._patch import Patch
from lsc_kernels.trainers.trl import known


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of chosen tokens: ``trl.trainer.utils.selective_log_softmax``.

    Args:
        logits: [..., V].
        index: token ids [...], or [..., K] for K of each row.
        temperature: what the logits are divided by.
        row_mask: of the shape of ``index``; where it is 0 the result is 0, without a gradient.

    Returns:
        Of the shape of ``index``, fp32 (fp64 of fp64).

    Raises:
        As :func:`lsc_kernels.token_logprobs`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0, -torch.inf]]) + 10_000
        >>> selective_log_softmax(logits, torch.tensor([1]))
        tensor([-0.6931])
        >>> selective_log_softmax(logits, torch.tensor([[1, 2]]))
        tensor([[-0.6931,    -inf]])
    """
    if index.dim() == logits.dim():
        logits = logits.unsqueeze(-2).expand(*index.shape, logits.shape[-1])
    return token_logprobs(logits, index, temperature=temperature, mask=row_mask).logprobs


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of each row in nats: ``trl.trainer.utils.entropy_from_logits``.

    Args:
        logits: [..., V].
        chunk_size: as TRL's, for calls that name it; nothing is computed in chunks here.

    Returns:
        [...], fp32 (fp64 of fp64).

    Example:
        >>> import torch
        >>> entropy_from_logits(torch.tensor([[0.0, 0.0, -torch.inf]]))
        tensor([0.6931])
    """
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, index).entropy


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> TokenLogprobs:
    """Both from one pass over the logits: ``trl.trainer.utils.selective_log_softmax_and_entropy``.

    Args:
        logits: [..., V].
        index: token ids [...].
        entropy_requires_grad: whether gradients flow through the entropy.
        temperature: what the logits are divided by.
        row_mask: [...]; where it is 0 both results are 0, without a gradient.

    Example:
        >>> import torch
        >>> logprobs, entropy = selective_log_softmax_and_entropy(torch.zeros(1, 4), torch.tensor([2]))
        >>> logprobs, entropy
        (tensor([-1.3863]), tensor([1.3863]))
    """
    both = token_logprobs(logits, index, temperature=temperature, mask=row_mask)
    return both if entropy_requires_grad else both._replace(entropy=both.entropy.detach())


PATCH = Patch(
    "trl",
    {
        f"trl.trainer.utils:{ours.__name__}": ours
        for ours in (selective_log_softmax, entropy_from_logits, selective_log_softmax_and_entropy)
    },
)


def patch() -> list[str]:
    """Put these functions in place of TRL's, in every module of TRL that has imported them so far or will.

    Returns:
        What was replaced, as ``module.function``; nothing where it has been before.

    Raises:
        MissingExtra: TRL is not installed.
        UnknownVersion: it is another version than these functions were compared with; nothing is replaced.
    """
    known.check()
    return PATCH.apply()


def unpatch() -> list[str]:
    """Put TRL's functions back; returns what was."""
    return PATCH.undo()
