"""Generation of token ids with a key-value cache: prefill once, then one token at a time.

The context never grows past the model's max_seq_len: when it is full, its newer half is read anew and
generation goes on from there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsllama.errors import Problem, UserError


class KeyValueCache:
    """Keys and values of all layers for one batch; room for `capacity` positions, allocated at first use."""

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._kept: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, kv heads, T, head size) of a layer; returns all of its positions so far."""
        stop = self.length + k.shape[2]
        kept = self._kept[layer]
        if kept is None:
            room = (k.shape[0], k.shape[1], self.capacity, k.shape[3])
            kept = self._kept[layer] = k.new_empty(room), v.new_empty(room)
        kept[0][:, :, self.length : stop] = k
        kept[1][:, :, self.length : stop] = v
        return kept[0][:, :, :stop], kept[1][:, :, :stop]


@torch.no_grad()
def generate_ids(
    model: Any,
    ids: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    seed: int | None = None,
    agree: Callable[[int], int] | None = None,
) -> list[int]:
    """Up to `max_new_tokens` ids that continue `ids`; `eos_id` ends them and is not among them.

    model: an LLaMaTransformer, left in the mode it is in. temperature: 0 takes the likeliest id, others divide the
    logits. top_p: draw from the fewest ids that reach this probability together. seed: None takes one from the system's
    entropy; training's random state is touched in neither case. agree: gives the id that is taken for the one drawn
    here. Ranks that hold parts of one model (ZeRO-3) need it: where logits differ in a last bit, one would end alone,
    and the others wait for it in their next forward. Raises UserError for values out of range.
    """
    problems = sampling_problems(max_new_tokens, temperature, top_p, seed)
    if not ids:
        problems.append(Problem("prompt", "must hold at least one token"))
    if problems:
        raise UserError(problems, "cannot generate")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    window, device, was_training = model.config.max_seq_len, next(model.parameters()).device, model.training
    new: list[int] = []
    unread = ids[-window:]
    cache = KeyValueCache(len(model.layers), min(window, len(unread) + max_new_tokens))
    model.eval()
    try:
        with uncompiled(getattr(model, "_compiled_call_impl", None) is not None):
            for _ in range(max_new_tokens):
                if cache.length + len(unread) > window:
                    # Half, and not all but one: reading the window anew for each token would cost as much as no cache.
                    unread = (ids + new)[-max(1, window // 2) :]
                    cache = KeyValueCache(len(model.layers), window)
                logits = model(torch.tensor([unread], device=device), cache=cache)[0, -1, : model.known_tokens]
                logits = logits.double().cpu()
                if temperature == 0:
                    token = int(logits.argmax())
                else:
                    nucleus = token_probabilities(logits, temperature, top_p)
                    token = int(torch.multinomial(nucleus, 1, generator=generator))
                token = token if agree is None else agree(token)
                if token == eos_id:
                    break
                new.append(token)
                unread = [token]
    finally:
        model.train(was_training)
    return new


def uncompiled(compiled: bool) -> contextlib.AbstractContextManager[Any]:
    """Run what was compiled in place as it was before: each shape of its own would be compiled anew."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def token_probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The distribution (V,) that an id is drawn from: softmax(logits / temperature), cut to its nucleus.

    The nucleus is the fewest ids that reach top_p together, the one that crosses it among them (Holtzman et al. 2019).
    """
    # Subtracting the largest keeps a tiny temperature from overflowing; the softmax is the same.
    probabilities, order = ((logits - logits.max()) / temperature).softmax(-1).sort(descending=True, stable=True)
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    return torch.zeros_like(probabilities).scatter_(0, order, probabilities / probabilities.sum())


def sampling_problems(max_new_tokens: int, temperature: float, top_p: float, seed: int | None = None) -> list[Problem]:
    """What is wrong with these values, for a message that tells it all at once."""
    seed_fits = seed is None or 0 <= seed < 2**64
    rules = [
        ("seed", seed_fits, "must be from 0 to 2**64 - 1", "leave it out for another each time", seed),
        ("max_new_tokens", max_new_tokens >= 0, "must not be negative", "128 is a paragraph", max_new_tokens),
        ("temperature", 0 <= temperature < math.inf, "must be 0 (greedy) or more", "0.8 is usual", temperature),
        ("top_p", 0 < top_p <= 1, "must be above 0 and at most 1", "0.95 is usual, 1 takes all", top_p),
    ]
    return [Problem(name, rule, remedy, value) for name, fits, rule, remedy, value in rules if not fits]
