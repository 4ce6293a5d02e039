"""Every number that follows from a configuration, computed in this one place and printed at the start.

FLOPs per token are the PaLM count (Chowdhery et al. 2022, appendix B): 6 N + 12 n_layers n_embd T, with N the
parameters without the input embedding; it is the count that published MFU figures use.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsllama import rules
from dsllama.config import TrainingConfig
from dsllama.errors import UserError
from dsllama.model import ffn_hidden_size, parameter_count
from dsllama.sizes import readable

DEFAULT_VOCABULARY = 8192


@dataclass(frozen=True)
class Derived:
    """What follows from TrainingConfig, world size and vocabulary. Sizes in tokens unless the name says otherwise."""

    world_size: int
    vocab_size: int
    head_size: int
    ffn_hidden: int
    gradient_accumulation_steps: int
    sequences_per_update: int
    updates: int
    total_tokens: int
    parameters: int
    parameters_without_embedding: int
    flops_per_token: int

    def lines(self, config: TrainingConfig) -> list[str]:
        """A table for people: what was derived and from what."""
        kv_heads = config.n_kv_heads or config.n_heads
        return [
            f"model        {readable(self.parameters)} parameters ({readable(self.parameters_without_embedding)} "
            f"without the input embedding): {config.n_layers} layers, width {config.n_embd}, {config.n_heads} heads of "
            f"{self.head_size} ({kv_heads} key-value), SwiGLU {self.ffn_hidden}, vocabulary {self.vocab_size:,}",
            f"update       {config.tokens_per_update:,} tokens = {config.batch_size} sequences x {config.max_seq_len} "
            f"tokens x {self.world_size} ranks x {self.gradient_accumulation_steps} accumulation",
            f"run          {self.updates:,} updates = {readable(self.total_tokens)} tokens, "
            f"{config.schedule} schedule, {config.warmup_iterations:,} of warmup",
            f"cost         {self.flops_per_token / 1e9:,.3g} GFLOP per token (PaLM count), "
            f"{self.flops_per_token * self.total_tokens:.3g} FLOP in all",
        ]


def derive(config: TrainingConfig, world_size: int, vocab_size: int) -> Derived:
    """All derived numbers. Raises UserError if tokens_per_update is no whole number of micro-steps on so many ranks."""
    if problems := rules.check_world_size(config, world_size):
        raise UserError(problems, "the configuration is wrong")
    sequences = config.tokens_per_update // config.max_seq_len
    updates = -(-config.training_tokens // config.tokens_per_update)
    total, without_embedding = parameter_count(config, vocab_size)
    return Derived(
        world_size=world_size,
        vocab_size=vocab_size,
        head_size=config.n_embd // config.n_heads,
        ffn_hidden=ffn_hidden_size(config.n_embd, config.multiple_of),
        gradient_accumulation_steps=sequences // (config.batch_size * world_size),
        sequences_per_update=sequences,
        updates=updates,
        total_tokens=updates * config.tokens_per_update,
        parameters=total,
        parameters_without_embedding=without_embedding,
        flops_per_token=6 * without_embedding + 12 * config.n_layers * config.n_embd * config.max_seq_len,
    )
