"""token_kl in Triton: the kernels are in token_rows.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lsc_kernels.eager.kl_from_logprobs import KLOptions
from lsc_kernels.eager.token_logprobs import check_actions, counted
from lsc_kernels.triton import interpreted
from lsc_kernels.triton._launch import arrival_counters, dense, launch, operator, per_row
from lsc_kernels.triton.kl import FULL_REVERSE, KINDS
from lsc_kernels.triton.kl_from_logprobs import arguments
from lsc_kernels.triton.row_state import CHUNK
from lsc_kernels.triton.token_rows import SAVED, backward_kernel, forward_kernel

SPLIT_BELOW = 512
"""Rows: with fewer, a program per row leaves multiprocessors idle (an H200 holds about 4 programs on each of 132).

Each chunk of a row then has a program; the last one to come, by a counter of the row's, merges the chunks.
"""


class Tiles(NamedTuple):
    """How a row is read: in groups of so many tiles of so many lanes, by so many warps."""

    GROUP: int
    LANES: int
    num_warps: int


REGISTERS = {2: 128, 4: 168}
"""Of a thread of the token ops forward, by the bytes of a logit: four programs, or three, fit on a multiprocessor of
NVIDIA's.

Left to itself the assembler takes some 250, for two. Held to these, it puts aside what a group of tiles does not need,
and in 16 bits a few words of the careful way through a tile.
"""


def tiles(vocabulary: int) -> Tiles:
    """By V alone, as the order of the additions is in the result.

    1024 lanes are 8 for each of 128 threads: a load of 16 bytes in bf16, two in fp32, and 32 registers of sums. A group
    of 4 has as many for its logits, and asks 128 threads once whether it is a usual one. A vocabulary that fits in
    fewer lanes has fewer.
    """
    if vocabulary <= 128:
        return Tiles(1, 128, 1)
    if interpreted():  # which pays for tiles, not for registers
        return Tiles(1, min(triton.next_power_of_2(vocabulary), 4096), 4)
    return Tiles(4, 1024, 4)


def forward_options(policy: Tensor, ref: Tensor | None) -> dict[str, int]:
    """How the token ops read a row forward, as their kernels take it."""
    options = tiles(policy.shape[-1])._asdict()
    if torch.version.hip:
        return options
    widest = max(logits.element_size() for logits in (policy, ref) if logits is not None)
    return {**options, "maxnreg": REGISTERS[widest]}


def backward_tile(vocabulary: int) -> int:
    """2048 columns for 4 warps, 16 a thread: nothing is summed, so there is nothing else to hold."""
    if vocabulary <= 128:
        return 128
    return min(triton.next_power_of_2(vocabulary), CHUNK.value) if interpreted() else 2048


def chunks(vocabulary: int) -> int:
    return -(-vocabulary // CHUNK.value)


def rows_of(logits: Tensor) -> Tensor:
    """[..., V] as [outer, inner, V]: a copy only where more than two leading dimensions have strides of their own."""
    if logits.dim() < 3:
        return logits.view(1, -1, logits.shape[-1]) if logits.dim() == 1 else logits.unsqueeze(0)
    return logits.flatten(0, -3)


def model(rows: Tensor | None) -> tuple[Any, ...]:
    """A model's logits as the kernels take them: data, strides, and the step between columns, None for 1."""
    if rows is None:
        return None, 0, 0, None
    outer, inner, step = rows.stride()
    return rows, outer, inner, None if step == 1 else step


def aligned(rows: Tensor | None) -> bool:
    """Whether every row begins at a multiple of 16 bytes, so that loads can be 16 bytes wide."""
    if rows is None:
        return False
    outer, inner, step = rows.stride()
    in_16_bytes = 16 // rows.element_size()
    return step == 1 and rows.data_ptr() % 16 == 0 and outer % in_16_bytes == 0 == inner % in_16_bytes


def is_reverse(kind: int | None) -> bool:
    """Whether the reference is the model that a row is weighed by."""
    return kind == FULL_REVERSE.value


def temperature_of(temperatures: Tensor | None, temperature: float) -> tuple[Tensor | None, int, float]:
    return *per_row(temperatures), temperature


def split_temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """A temperature as the ops take it: per row, or one number."""
    return (temperature, 1.0) if isinstance(temperature, Tensor) else (None, temperature)


def split(rows: int, policy: Tensor) -> tuple[int, Tensor | None, Tensor | None]:
    """How many programs share a row, room for the states of its chunks, and counters of the programs that are done.

    One program, and no room, where there is one chunk; no counters where a program reads all chunks of a row.
    """
    count = chunks(policy.shape[-1])
    if count == 1:
        return 1, None, None
    states = policy.new_empty((rows, count, 10), dtype=torch.float64)
    if rows >= SPLIT_BELOW:
        return 1, states, None
    return count, states, arrival_counters(SPLIT_BELOW, policy.device)


def forward_rows(
    policy: Tensor,
    ref: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    kind: int | None,
    straight_through: bool,
    *limits: float,
) -> list[Tensor]:
    """kl, logprobs, ref_logprobs, entropy and saved; kl and ref_logprobs are empty without ``ref``."""
    policy, ref = rows_of(policy), None if ref is None else rows_of(ref)
    vocabulary = policy.shape[-1]
    if actions.is_cpu:
        check_actions(actions, vocabulary, counted(actions, mask))
    programs, states, arrivals = split(actions.numel(), policy)
    outputs = new_rows(actions, ref is not None)
    launch(
        forward_kernel, (actions.numel(), programs), policy.device, *model(policy), *model(ref),
        actions.contiguous(), dense(mask), dense(old_logprobs), *temperature_of(temperatures, temperature),
        states, arrivals, *outputs, policy.shape[1], vocabulary, *limits, kind, int(straight_through),
        is_reverse(kind), aligned(policy), aligned(ref), **forward_options(policy, ref),
    )  # fmt: skip
    return outputs


def backward_rows(
    grads: tuple[Tensor | None, ...],
    policy: Tensor,
    ref: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    kind: int | None,
    straight_through: bool,
    *limits_saved_and_wants: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients to the policy's and the reference's logits; empty where they are not wanted."""
    *limits, saved, want_policy, want_ref = limits_saved_and_wants
    vocabulary = policy.shape[-1]
    to_policy = policy.new_empty(policy.shape if want_policy else (0,))
    to_ref = actions.new_empty(0) if ref is None else ref.new_empty(ref.shape if want_ref else (0,))
    full = (
        kind is not None and KINDS[kind].startswith("full") and not straight_through and grads[0] is not None
    )
    reads_ref = want_ref or full
    policy, ref = rows_of(policy), rows_of(ref) if ref is not None and reads_ref else None
    launch(
        backward_kernel, (actions.numel(), chunks(vocabulary)), policy.device,
        *(each for grad in grads for each in per_row(grad)), *model(policy), *model(ref),
        actions.contiguous(), dense(mask), dense(old_logprobs), *temperature_of(temperatures, temperature),
        saved, to_policy if want_policy else None, to_ref if want_ref else None, policy.shape[1], vocabulary,
        *limits, kind, int(straight_through), reads_ref, aligned(policy), aligned(ref),
        TILE=backward_tile(vocabulary), num_warps=tiles(vocabulary).num_warps,
    )  # fmt: skip
    return to_policy, to_ref


def new_rows(actions: Tensor, pair: bool) -> list[Tensor]:
    def new() -> Tensor:
        return actions.new_empty(actions.shape, dtype=torch.float32)

    def pair_only() -> Tensor:
        return new() if pair else actions.new_empty(0, dtype=torch.float32)

    saved = actions.new_empty((actions.numel(), SAVED.value), dtype=torch.float64)
    return [pair_only(), new(), pair_only(), new(), saved]


@operator(
    "token_kl_forward(Tensor policy_logits, Tensor ref_logits, Tensor actions, Tensor? mask, Tensor? old_logprobs,"
    " Tensor? temperatures, float temperature, int kind, bool straight_through, float ratio_low, float ratio_high,"
    " float kl_low, float kl_high) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda policy_logits, ref_logits, actions, *_: tuple(new_rows(actions, True)),
)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(forward_rows(*arguments))


def _fake_gradients(*arguments: Any) -> tuple[Tensor, Tensor]:
    policy, ref, (want_policy, want_ref) = arguments[4], arguments[5], arguments[-2:]
    return (
        policy.new_empty(policy.shape if want_policy else (0,)),
        ref.new_empty(ref.shape if want_ref else (0,)),
    )


@operator(
    "token_kl_backward(Tensor? grad_kl, Tensor? grad_logprobs, Tensor? grad_ref_logprobs, Tensor? grad_entropy,"
    " Tensor policy_logits, Tensor ref_logits, Tensor actions, Tensor? mask, Tensor? old_logprobs,"
    " Tensor? temperatures, float temperature, int kind, bool straight_through, float ratio_low, float ratio_high,"
    " float kl_low, float kl_high, Tensor saved, bool want_policy, bool want_ref) -> (Tensor, Tensor)",
    _fake_gradients,
)
def _backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return backward_rows(arguments[:4], *arguments[4:])


_ops = torch.ops.lsc_kernels_triton


def forward(
    policy_logits: Tensor,
    ref_logits: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    temperature: float | Tensor,
    options: KLOptions,
) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _ops.token_kl_forward(
        *(policy_logits, ref_logits, actions, mask, old_logprobs),
        *(*split_temperature(temperature), *arguments(options)),
    )
    return outputs


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
    policy, ref = _ops.token_kl_backward(
        *(grad_kl, grad_logprobs, grad_ref_logprobs, grad_entropy),
        *(policy_logits, ref_logits, actions, mask, old_logprobs),
        *(*split_temperature(temperature), *arguments(options)),
        *(state, want_policy, want_ref),
    )
    return policy if want_policy else None, ref if want_ref else None
