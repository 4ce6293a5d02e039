"""Generation against a loop without a cache, against transformers, and against probabilities known beforehand."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from dsllama.errors import UserError
from dsllama.generation import KeyValueCache, generate_ids, token_probabilities
from dsllama.model import LLaMaTransformer
from tests.models import lively_model, model_config, random_tokens, transformers_twin

PROMPT = [0, 7, 33, 4]
SHAPES: list[dict[str, Any]] = [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1, "use_flash_attention": False}]

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def greedy_without_cache(model: LLaMaTransformer, ids: list[int], count: int) -> list[int]:
    """Reads everything anew for each token; of a context that is too long it keeps the newer half of the window."""
    window = model.config.max_seq_len
    context, new = ids[-window:], []
    for _ in range(count):
        if len(context) > window:
            context = context[-(window // 2) :]
        new.append(int(model(torch.tensor([context]))[0, -1].argmax()))
        context = [*context, new[-1]]
    return new


def model_with_known_probabilities(probabilities: list[float]) -> LLaMaTransformer:
    """Gives each token this probability, whatever came before: only the head's weights are left to speak."""
    model = LLaMaTransformer(model_config(vocab_size=len(probabilities)), None)
    with torch.no_grad():
        for block in model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.embed_tokens.weight.fill_(1.0)  # the norm of ones is ones
        model.lm_head.weight.copy_((torch.tensor(probabilities).log() / 32).unsqueeze(1).expand(-1, 32))
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_ids_are_those_of_a_loop_without_cache(shape: dict[str, Any]) -> None:
    model = lively_model(model_config(**shape))
    assert generate_ids(model, PROMPT, 60, temperature=0) == greedy_without_cache(model, PROMPT, 60)


@pytest.mark.parametrize("shape", SHAPES)
def test_with_a_cache_the_logits_are_those_of_the_last_position_alone(shape: dict[str, Any]) -> None:
    model, tokens = lively_model(model_config(**shape)), random_tokens(2, 12)
    cache = KeyValueCache(2, 12)
    with torch.no_grad():
        whole = model(tokens)
        torch.testing.assert_close(model(tokens[:, :9], cache=cache), whole[:, 8:9])
        for position in range(9, 12):
            step = model(tokens[:, position : position + 1], cache=cache)
            torch.testing.assert_close(step, whole[:, position : position + 1])


@pytest.mark.parametrize("prompt_length", [1, 63, 64, 65, 200])
def test_generation_goes_on_past_max_seq_len_by_reading_the_newer_half_anew(prompt_length: int) -> None:
    model, prompt = lively_model(model_config()), random_tokens(prompt_length).tolist()
    ids = generate_ids(model, prompt, 130, temperature=0)
    assert ids == greedy_without_cache(model, prompt, 130)


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 2}, {"tie_embeddings": True}])
def test_greedy_ids_are_those_of_transformers(shape: dict[str, Any]) -> None:
    model = lively_model(model_config(**shape))
    prompt = torch.tensor([PROMPT])
    theirs = transformers_twin(model).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=50, do_sample=False, eos_token_id=None
    )
    assert generate_ids(model, PROMPT, 50, temperature=0) == theirs[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.15, 0.5, 0.05, 0.3]),
        (0.5, 1.0, [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),  # p**2, normalized
        (1.0, 0.6, [0, 0.625, 0, 0.375]),  # 0.3 crosses 0.6 and belongs to it
        (1.0, 0.85, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        (1.0, 1e-9, [0, 1, 0, 0]),
        (1e-307, 1.0, [0, 1, 0, 0]),  # though logits / temperature is infinite
    ],
)
def test_temperature_and_top_p_shape_the_distribution_as_defined(
    temperature: float, top_p: float, expected: list[float]
) -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64).log() + 100
    torch.testing.assert_close(token_probabilities(logits, temperature, top_p), torch.tensor(expected).double())


def test_ids_are_drawn_with_these_frequencies() -> None:
    model, draws = model_with_known_probabilities([0.1, 0.4, 0.3, 0.2]), 2000
    counts = Counter(generate_ids(model, [0], draws, temperature=1.0, top_p=0.75, seed=0))
    for token, probability in enumerate([0, 4 / 9, 3 / 9, 2 / 9]):
        deviation = math.sqrt(draws * probability * (1 - probability))
        assert abs(counts[token] - draws * probability) <= 4 * deviation


def test_generating_leaves_the_random_state_and_the_mode_of_training_as_they_were() -> None:
    for training in (True, False):
        model = lively_model(model_config(dropout=0.5)).train(training)
        before = torch.get_rng_state()
        generate_ids(model, PROMPT, 5)
        generate_ids(model, PROMPT, 5, seed=1)
        assert torch.equal(before, torch.get_rng_state())
        assert {module.training for module in model.modules()} == {training}


def test_one_seed_gives_one_text_and_none_gives_another_each_time() -> None:
    model = LLaMaTransformer(model_config(), None)  # near uniform: 30 tokens never agree by chance
    assert generate_ids(model, PROMPT, 30, seed=4) == generate_ids(model, PROMPT, 30, seed=4)
    assert generate_ids(model, PROMPT, 30, seed=4) != generate_ids(model, PROMPT, 30, seed=5)
    assert generate_ids(model, PROMPT, 30) != generate_ids(model, PROMPT, 30)


def test_the_end_token_ends_it_and_is_left_out() -> None:
    model = lively_model(model_config())
    ids = generate_ids(model, PROMPT, 30, temperature=0)
    assert generate_ids(model, PROMPT, 30, temperature=0, eos_id=ids[9]) == ids[: ids.index(ids[9])]


def test_rows_that_only_pad_the_vocabulary_are_never_chosen(tiny_data: Any) -> None:
    size = tiny_data.tokenizer.vocab_size
    model = lively_model(model_config(vocab_size=size + 100), tiny_data.tokenizer)
    with torch.no_grad():
        model.lm_head.weight[size:] *= 10
    greedy, drawn = (generate_ids(model, PROMPT, 30, temperature) for temperature in (0, 1))
    assert max(greedy + drawn) < size


def test_a_model_that_learned_a_sentence_continues_it(tiny_data: Any) -> None:
    tokenizer, sentence = tiny_data.tokenizer, "the quick brown fox jumps over the lazy dog"
    torch.manual_seed(0)
    model = LLaMaTransformer(model_config(vocab_size=None), tokenizer)
    ids = torch.tensor([[tokenizer.sos_id, *tokenizer.encode(sentence), tokenizer.eos_id]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.generate("the quick", temperature=0) == sentence
    assert model.generate("", max_new_tokens=len(ids[0]) - 2, temperature=0, eos_token=None) == sentence


def test_the_prompt_comes_first_and_as_it_was_given(tiny_data: Any) -> None:
    model = lively_model(model_config(vocab_size=None), tiny_data.tokenizer)
    for prompt in ("", "the dog", "a literal <EOS> and \u00fcml\u00e4ut \U0001f600"):
        assert model.generate(prompt, max_new_tokens=0) == prompt
        assert model.generate(prompt, max_new_tokens=5, seed=0).startswith(prompt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens = -1: must not be negative"),
        ({"temperature": -0.1}, "temperature = -0.1: must be 0 (greedy) or more"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"top_p": 0}, "top_p = 0: must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"eos_token": "<END>"}, "eos_token = '<END>': is not in the vocabulary"),
        ({"max_new_tokens": -1, "temperature": -1, "top_p": 2, "eos_token": "<END>"}, "4 problems"),
    ],
)
def test_values_out_of_range_are_the_users_error(tiny_data: Any, arguments: dict[str, Any], message: str) -> None:
    model = LLaMaTransformer(model_config(vocab_size=None), tiny_data.tokenizer)
    with pytest.raises(UserError) as error:
        model.generate("the", **arguments)
    assert message in str(error.value)


def test_an_empty_prompt_of_ids_is_the_users_error_together_with_the_rest() -> None:
    with pytest.raises(UserError, match=r"2 problems(.|\n)*top_p(.|\n)*prompt: must hold at least one token"):
        generate_ids(LLaMaTransformer(model_config(), None), [], 5, top_p=0)


def test_text_for_a_model_without_tokenizer_is_the_users_error() -> None:
    with pytest.raises(UserError, match="tokenizer: is needed to read text"):
        LLaMaTransformer(model_config(), None).generate("the")


def test_generating_from_a_compiled_model_compiles_nothing() -> None:
    compilations = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    model = lively_model(model_config())
    expected = generate_ids(model, PROMPT, 10, temperature=0)
    model.compile(backend=backend)
    assert generate_ids(model, PROMPT, 10, temperature=0) == expected
    assert compilations == 0
    model(random_tokens(1, 8))
    assert compilations == 1
