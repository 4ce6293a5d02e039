"""LLaMaTransformer: a decoder-only transformer with RMSNorm, rotary positions and SwiGLU.

    tokens (B, T) -> embedding (B, T, D) -> n_layers of [x + attention(norm(x)), x + feed_forward(norm(x))]
                  -> norm -> head -> logits (B, T, V), or with targets the training loss

No biases. The names of the parts are those of the Hugging Face Llama, so that export is a matter of a prefix.
Every part initializes itself while it is built: under DeepSpeed's zero.Init a loop over the finished model
would find empty parameters and skip them without a word. The module knows nothing of DeepSpeed otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsllama.errors import Problem, UserError
from dsllama.generation import KeyValueCache, generate_ids, sampling_problems

IGNORE_INDEX = -100
_STD = 0.02


def ffn_hidden_size(n_embd: int, multiple_of: int) -> int:
    """SwiGLU's hidden size: int(8 n_embd / 3), rounded up to a multiple of `multiple_of` (Shazeer 2020; Llama)."""
    return -(-int(8 * n_embd / 3) // multiple_of) * multiple_of


def parameter_count(config: Any, vocab_size: int) -> tuple[int, int]:
    """(all parameters, those without the input embedding), in closed form; a tied matrix counts as the output head."""
    width, hidden = config.n_embd, ffn_hidden_size(config.n_embd, config.multiple_of)
    kv_width = (config.n_kv_heads or config.n_heads) * (width // config.n_heads)
    block = 2 * width * width + 2 * width * kv_width + 3 * width * hidden + 2 * width
    without_embedding = config.n_layers * block + width + vocab_size * width
    return without_embedding + (0 if config.tie_embeddings else vocab_size * width), without_embedding


def vocabulary(config: Any, tokenizer_size: int) -> int:
    """Rows of the embedding: the tokenizer's, or the configuration's larger number. Raises UserError for a smaller."""
    if config.vocab_size is not None and config.vocab_size < tokenizer_size:
        rule = f"must be at least the tokenizer's {tokenizer_size}: one smaller than the tokenizer's lacks some ids"
        remedy = f"leave it out, or pad to {-(-tokenizer_size // 64) * 64}"
        raise UserError(Problem("vocab_size", rule, remedy, config.vocab_size))
    return config.vocab_size or tokenizer_size


class Linear(nn.Linear):
    """A matrix without bias that draws its weights from N(0, std)."""

    def __init__(self, in_features: int, out_features: int, std: float = _STD) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:  # nn.Linear calls it while it is built
        _draw(self.weight, self.std)


class Embedding(nn.Embedding):
    """Token embedding, drawn from N(0, 0.02)."""

    def reset_parameters(self) -> None:
        _draw(self.weight, _STD)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; fewer key-value heads than heads is grouped-query attention."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads = config.n_heads
        self.kv_heads = config.n_kv_heads or config.n_heads
        self.head_size = config.n_embd // config.n_heads
        self.dropout = config.dropout
        self.fused = config.use_flash_attention
        width, kv_width = config.n_embd, self.kv_heads * self.head_size
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, kv_width)
        self.v_proj = Linear(width, kv_width)
        self.o_proj = Linear(width, width, std=_branch_std(config))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KeyValueCache | None, layer: int) -> Tensor:
        """x: (B, T, D) -> (B, T, D); rotary: the T positions' table, see `_rotary_table`."""
        B, T, D = x.shape
        q = _rotate(self.q_proj(x).view(B, T, self.heads, self.head_size), *rotary).transpose(1, 2)
        k = _rotate(self.k_proj(x).view(B, T, self.kv_heads, self.head_size), *rotary).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_size).transpose(1, 2)
        # One query after others sees all of them; what starts a sequence is causal. Not asked as T > 1, which is
        # no plain bool to torch.compile where the length varies.
        causal = cache is None or cache.length == 0
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        dropout = self.dropout if self.training else 0.0
        if self.fused:
            out = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=causal, enable_gqa=self.kv_heads != self.heads
            )
        else:
            out = _plain_attention(q, k, v, dropout, causal)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden = ffn_hidden_size(config.n_embd, config.multiple_of)
        self.gate_proj = Linear(config.n_embd, hidden)
        self.up_proj = Linear(config.n_embd, hidden)
        self.down_proj = Linear(hidden, config.n_embd, std=_branch_std(config))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, D) -> (B, T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer: attention and SwiGLU, each on the normalized input and added to it."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.dropout = config.dropout
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KeyValueCache | None = None) -> Tensor:
        """x: (B, T, D) -> (B, T, D)."""
        x = x + self._drop(self.self_attn(self.input_layernorm(x), rotary, cache, self.layer))
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class LLaMaTransformer(nn.Module):
    """The whole model. See the module's docstring for its shape."""

    def __init__(self, config: Any, tokenizer: Any, device: str | torch.device = "cpu") -> None:
        """config: a TrainingConfig, or anything with its model fields. tokenizer: gives vocab_size, and text to
        `generate`; may be None where config.vocab_size is set. device: where the parameters are built, "meta" for
        nowhere yet. Raises UserError if config.vocab_size has no room for the tokenizer's ids."""
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        # A padded vocabulary has rows that stand for no token: generation must not choose them.
        self.known_tokens: int = config.vocab_size if tokenizer is None else tokenizer.vocab_size
        self.vocab_size = vocabulary(config, self.known_tokens)
        with torch.device(device):
            self.embed_tokens = Embedding(self.vocab_size, config.n_embd)
            self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
            self.norm = nn.RMSNorm(config.n_embd, config.eps)
            # Logits of about n_embd**-0.5 at the start: a loss of ln(vocabulary), whatever the depth and width.
            # A tied matrix takes this scale too: at 0.02 the loss would start 0.0002 n_embd nats higher.
            self.lm_head = Linear(config.n_embd, self.vocab_size, std=1 / config.n_embd)
            self._tie()
        with torch.device("cpu" if self.norm.weight.is_meta else device):
            # Not a buffer: an engine that casts the model to bf16 would round the angles' cosines for good.
            self.rotary = _rotary_table(config.max_seq_len, config.n_embd // config.n_heads, config.theta)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V); with targets (B, T) int64 -> the scalar loss in fp32.

        The loss is the sum of the cross-entropies (nats) of the positions whose target is not -100, over B * T.
        cache: keys and values of the positions before these; it is extended, and only the last position's logits
        are computed, (B, 1, V). Raises ValueError for more positions than max_seq_len.
        """
        T = tokens.shape[1]
        start = cache.length if cache is not None else 0
        if start + T > self.config.max_seq_len:
            raise ValueError(f"{start + T} positions are more than max_seq_len = {self.config.max_seq_len}")
        assert start == 0 or T == 1, "a cache is filled from its start, then extended token by token"
        x = self.embed_tokens(tokens)
        cos, sin = (table[start : start + T].to(x.device, x.dtype) for table in self.rotary)
        recompute = self.config.activation_checkpointing and self.training
        for block in self.layers:
            if recompute:
                # Saving the random state costs time at every block, and nothing is drawn without dropout.
                x = checkpoint(block, x, (cos, sin), use_reentrant=False, preserve_rng_state=bool(block.dropout))
            else:
                x = block(x, (cos, sin), cache)
        if cache is not None:
            cache.length += T
            x = x[:, -1:]
        logits = self.lm_head(self.norm(x))
        if targets is None:
            return logits
        # Divided by all positions, not by the valid ones: then micro-batches of equal size can be averaged in
        # any split, and a padded row weighs the same on any number of ranks.
        flat = logits.flatten(0, 1).float()  # the only fp32 copy; none where the model is fp32
        return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum") / targets.numel()

    def generate(
        self,
        text: str,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        eos_token: str | None = "<EOS>",
        seed: int | None = None,
        agree: Callable[[int], int] | None = None,
    ) -> str:
        """`text` and its continuation: <SOS> and the text are read, then at most `max_new_tokens` tokens drawn.

        temperature 0 is greedy; eos_token ends it, None for never; a seed of None gives another text each time. agree:
        see `generate_ids`. Training's random state and mode are left as they were.
        Raises UserError for values out of range, an unknown eos_token or a model without a tokenizer.
        """
        problems = sampling_problems(max_new_tokens, temperature, top_p, seed)
        eos_id = None
        if self.tokenizer is None:
            rule = "is needed to read text, and this model was built without one"
            problems.append(Problem("tokenizer", rule, "use generate_ids"))
        elif eos_token is not None:
            eos_id = self.tokenizer.token_to_id(eos_token)
            if eos_id is None:
                remedy = "use <EOS>, or None to go on to max_new_tokens"
                problems.append(Problem("eos_token", "is not in the vocabulary", remedy, eos_token))
        if problems:
            raise UserError(problems, "cannot generate")
        ids = [self.tokenizer.sos_id, *self.tokenizer.encode(text)]
        new = generate_ids(self, ids, max_new_tokens, temperature, top_p, eos_id, seed, agree)
        return self.tokenizer.decode([*ids, *new])

    def _apply(self, fn: Any, recurse: bool = True) -> LLaMaTransformer:
        # The table follows the parameters to another device, but keeps its fp32.
        super()._apply(fn, recurse)
        self._tie()  # of a tied matrix the above makes two where it changes the type of tensor
        if not self.norm.weight.is_meta:
            self.rotary = tuple(table.to(self.norm.weight.device) for table in self.rotary)
        return self

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.embed_tokens.weight = self.lm_head.weight


def _branch_std(config: Any) -> float:
    """Each of the 2 n_layers branches adds its variance to the residual stream (Radford et al. 2019)."""
    return _STD / math.sqrt(2 * config.n_layers)


@torch.no_grad()
def _draw(weight: Tensor, std: float) -> None:
    if weight.is_meta:
        return
    # Drawn in fp32 and then rounded, so that one seed gives one model in every precision and at every stage.
    weight.copy_(torch.normal(0.0, std, weight.shape, dtype=torch.float32, device=weight.device))


def _rotary_table(positions: int, head_size: int, theta: float) -> tuple[Tensor, ...]:
    """cos and signed sin of position * theta**(-2i / head_size), each (positions, 1, head_size) in fp32.

    RoPE (Su et al. 2021). The first half of sin is negative, as `_rotate` needs it. Computed in fp32 step by step as
    transformers does, so that the exported model turns by the same angles far out; and from integers, because
    zero.Init rounds to the model's type what torch.arange and its like return.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_size, 2).float() / head_size)
    angles = torch.outer(torch.arange(positions).float(), frequencies).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) of each head by its position's angles; x: (B, T, heads, head size)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin).type_as(x)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(head size)) v, written out; softmax in fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.shape[-1])
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return F.dropout(scores.softmax(-1), dropout).to(v.dtype) @ v
