"""The engine against the plain model: one conversation, several, more than there are slots."""

import pytest
import torch

from casallm.errors import ConfigError
from casallm.estimate.architecture import ModelConfig
from casallm.inference import engine as engine_module
from casallm.inference.engine import Engine
from casallm.inference.sampling import SamplingConfig
from casallm.model.gpt import build_gpt

GREEDY = SamplingConfig(temperature=0.0)
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8], [60, 61], [9, 9, 9, 9]]


@pytest.fixture(scope="module", params=["classic", "modern"])
def model(request):
    torch.set_num_threads(1)
    config = ModelConfig(family=request.param, n_layers=2, d_model=32, n_heads=4, vocab_size=100)
    model = build_gpt(config, 48)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


@torch.no_grad()
def greedy_by_hand(model, prompt, n_new):
    """The whole sequence through the model for every token, no cache, padding cut off."""
    tokens = list(prompt)
    for _ in range(n_new):
        logits_V = model(torch.tensor([tokens]))[0, -1, : model.config.vocab_size]
        tokens.append(int(logits_V.argmax()))
    return tokens[len(prompt) :]


def test_greedy_text_is_that_of_the_plain_model(model):
    generated = Engine(model, n_slots=len(PROMPTS)).generate(PROMPTS, 20, GREEDY)

    assert generated == [greedy_by_hand(model, prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("n_slots", [1, 2, 3])
def test_text_does_not_depend_on_the_company(model, n_slots):
    sampling = SamplingConfig(temperature=0.9, top_p=0.95, seed=3)

    few = Engine(model, n_slots).generate(PROMPTS, 15, sampling)

    assert few == Engine(model, n_slots=5).generate(PROMPTS, 15, sampling)


def test_a_stop_id_ends_its_own_prompt_and_is_left_out(model):
    free = Engine(model, n_slots=2).generate(PROMPTS, 12, GREEDY)
    stop = free[0][4]

    stopped = Engine(model, n_slots=2).generate(PROMPTS, 12, GREEDY, stop_ids=[stop])

    expected = [text[: text.index(stop)] if stop in text else text for text in free]
    assert stopped == expected


def test_the_stream_yields_what_generate_returns(model):
    pairs = list(Engine(model, n_slots=2).stream(PROMPTS, 6, GREEDY))

    generated = Engine(model, n_slots=2).generate(PROMPTS, 6, GREEDY)
    for index, text in enumerate(generated):
        assert [token for i, token in pairs if i == index] == text
    assert pairs[0][0] == 0
    assert pairs[1][0] == 1  # two prompts take turns


def test_the_stream_computes_only_what_is_asked_for(model):
    engine = Engine(model)

    next(engine.stream([[1, 2, 3]], 30, GREEDY))

    assert engine.held_tokens(0) == [1, 2, 3]


def test_a_longer_conversation_computes_only_what_is_new(model, monkeypatch):
    engine = Engine(model, n_slots=2)
    engine.prefill(1, [1, 2, 3, 4])
    passes = []
    forward = engine._forward
    monkeypatch.setattr(engine, "_forward", lambda s, t: passes.append((s, t)) or forward(s, t))

    scores_V = engine.prefill(1, [1, 2, 3, 7, 8])

    assert passes == [([1], [[7, 8]])]
    assert torch.allclose(scores_V, Engine(model).prefill(0, [1, 2, 3, 7, 8]), atol=1e-5)


def test_the_same_conversation_again_gives_the_same_scores(model):
    engine = Engine(model)

    first = engine.prefill(0, [4, 5, 6])

    assert torch.allclose(engine.prefill(0, [4, 5, 6]), first, atol=1e-5)
    assert torch.allclose(engine.prefill(0, [4, 5]), Engine(model).prefill(0, [4, 5]), atol=1e-5)


def test_long_prompts_are_read_in_chunks(model, monkeypatch):
    prompt = [n % 100 for n in range(40)]
    whole = Engine(model).prefill(0, prompt)
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 7)

    assert torch.allclose(Engine(model).prefill(0, prompt), whole, atol=1e-5)


def test_padded_ids_have_no_score(model):
    engine = Engine(model)

    assert engine.prefill(0, [1]).shape == (100,)
    assert engine.decode({0: 2}).shape == (1, 100)


def test_scores_come_in_the_order_of_the_slots_named(model):
    engine = Engine(model, n_slots=3)
    engine.prefill(0, [1])
    engine.prefill(2, [2])

    both = engine.decode({2: 5, 0: 6})

    assert torch.allclose(both[0], Engine(model).prefill(0, [2, 5]), atol=1e-5)
    assert torch.allclose(both[1], Engine(model).prefill(0, [1, 6]), atol=1e-5)


def test_weights_in_bf16_generate_as_well(model):
    in_bf16 = build_gpt(model.config, model.context_length)
    in_bf16.load_state_dict(model.state_dict())
    in_bf16.to(torch.bfloat16)

    scores_V = Engine(in_bf16).prefill(0, PROMPTS[2])

    exact = Engine(model).prefill(0, PROMPTS[2])
    assert (scores_V.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([[]], 5, "the prompt is empty: begin it with the tokenizer's <|bos|>"),
        ([[1]], 0, "max_new_tokens is 0: ask for at least one new token"),
        (
            [[1], [1] * 40],
            9,
            "40 tokens and 9 new ones do not fit into the context of 48: shorten the prompt or ask"
            " for fewer new tokens",
        ),
    ],
    ids=["empty", "nothing", "too long"],
)
def test_what_cannot_be_generated_is_refused_before_anything_is(
    model, prompts, max_new_tokens, message
):
    with pytest.raises(ConfigError) as refusal:
        Engine(model).stream(prompts, max_new_tokens)

    assert str(refusal.value) == message


def test_the_whole_context_can_be_filled(model):
    generated = Engine(model).generate([[1] * 40], 8, GREEDY)

    assert generated == [greedy_by_hand(model, [1] * 40, 8)]
