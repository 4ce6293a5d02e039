"""Rules between fields of a TrainingConfig, each with the nearest values that would keep it.

A rule names the fields that it reads, so that it is left out when one of them is already wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dsllama.errors import Problem
from dsllama.sizes import nearest_divisors, nearest_multiples

if TYPE_CHECKING:
    from dsllama.config import TrainingConfig

Rule = Callable[["TrainingConfig"], Iterator[Problem]]
_RULES: list[tuple[frozenset[str], Rule]] = []


def check(config: TrainingConfig, skip: set[str]) -> list[Problem]:
    """Every rule that is broken, leaving out the rules that read a field in `skip`."""
    return [problem for fields, rule in _RULES if not fields & skip for problem in rule(config)]


def check_world_size(config: TrainingConfig, world_size: int) -> list[Problem]:
    """Whether tokens_per_update is a whole number of micro-steps on `world_size` ranks."""
    if world_size < 1:
        return [Problem("world_size", "must be at least 1", "give the ranks over all hosts", world_size)]
    micro_step = config.batch_size * config.max_seq_len * world_size
    if config.tokens_per_update % micro_step == 0:
        return []
    sequences, remainder = divmod(config.tokens_per_update, config.max_seq_len)
    remedy = f"use tokens_per_update {_or(nearest_multiples(config.tokens_per_update, micro_step))}"
    if remainder == 0 and sequences % world_size == 0:
        remedy += f", or batch_size {_or(nearest_divisors(config.batch_size, sequences // world_size))}"
    elif remainder == 0 and sequences % config.batch_size == 0:
        remedy += f", or {_or(nearest_divisors(world_size, sequences // config.batch_size))} ranks"
    product = f"{config.batch_size} x {config.max_seq_len} x {world_size} = {micro_step}"
    rule = f"must be a multiple of batch_size x max_seq_len x ranks = {product}"
    return [Problem("tokens_per_update", rule, remedy, config.tokens_per_update)]


def _or(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def _rule(*fields: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.append((frozenset(fields), rule))
        return rule

    return register


@_rule("tokens_per_update", "batch_size", "max_seq_len")
def _update_is_whole_micro_steps(c: TrainingConfig) -> Iterator[Problem]:
    yield from check_world_size(c, 1)


@_rule("n_embd", "n_heads")
def _heads_divide_width(c: TrainingConfig) -> Iterator[Problem]:
    remedy = f"use n_embd {_or(nearest_multiples(c.n_embd, 2 * c.n_heads))}"
    if c.n_embd % c.n_heads:
        remedy += f", or n_heads {_or(nearest_divisors(c.n_heads, c.n_embd))}"
        yield Problem("n_embd", f"must be a multiple of n_heads = {c.n_heads}", remedy, c.n_embd)
    elif c.n_embd // c.n_heads % 2:
        size = f"gives heads of odd size n_embd / n_heads = {c.n_embd // c.n_heads}"
        yield Problem("n_embd", f"{size}; rotary embedding turns pairs of channels", remedy, c.n_embd)


@_rule("n_heads", "n_kv_heads")
def _kv_heads_divide_heads(c: TrainingConfig) -> Iterator[Problem]:
    if c.n_kv_heads is not None and c.n_heads % c.n_kv_heads:
        remedy = f"use {_or(nearest_divisors(c.n_kv_heads, c.n_heads))}"
        yield Problem("n_kv_heads", f"must divide n_heads = {c.n_heads}", remedy, c.n_kv_heads)


@_rule("max_lr", "min_lr", "schedule")
def _rate_falls(c: TrainingConfig) -> Iterator[Problem]:
    if c.schedule != "constant" and c.min_lr > c.max_lr:
        yield Problem("min_lr", f"must not be above max_lr = {c.max_lr}", f"use {c.max_lr / 10:g}", c.min_lr)


@_rule("warmup_iterations", "training_tokens", "tokens_per_update", "schedule")
def _warmup_ends(c: TrainingConfig) -> Iterator[Problem]:
    updates = -(-c.training_tokens // c.tokens_per_update)
    if c.schedule != "constant" and c.warmup_iterations >= updates:
        yield Problem(
            "warmup_iterations",
            f"must be below the {updates} updates of this run (training_tokens / tokens_per_update)",
            f"use {min(updates - 1, max(updates // 20, 1))}",
            c.warmup_iterations,
        )


@_rule("keep_last", "keep_every", "keep_best", "keep_weights", "validation_tokens", "checkpoint_format")
def _retention_makes_sense(c: TrainingConfig) -> Iterator[Problem]:
    if c.keep_last is None:
        for name in ("keep_every", "keep_best", "keep_weights"):
            if getattr(c, name):
                yield Problem(name, "needs keep_last: without it all are kept", "use keep_last 2", getattr(c, name))
    if c.keep_best and not c.validation_tokens:
        rule = "needs validation_tokens: the best are those with the lowest validation loss"
        yield Problem("keep_best", rule, "hold some tokens out, such as validation_tokens 1M", c.keep_best)
    if c.keep_weights and c.checkpoint_format != "portable":
        rule = "needs checkpoint_format portable: in DeepSpeed's own files weights and optimizer are not apart"
        yield Problem("keep_weights", rule, "use checkpoint_format portable, or keep_weights false", True)
