"""The model against naive loops, counted shapes, published initialisations, and the compiler."""

import cmath
import math

import pytest
import torch

from casallm.estimate.architecture import NAMED_SIZES, ModelConfig, count_params, named_size
from casallm.model.gpt import GPT, Lookup, build_gpt, rotate
from casallm.model.loss import TrainingLoss


def naive_rotation(vector_K, position):
    half = len(vector_K) // 2
    turned = [0.0] * len(vector_K)
    for i in range(half):
        angle = position * 10_000.0 ** (-2 * i / len(vector_K))
        z = complex(vector_K[i], vector_K[i + half]) * cmath.exp(1j * angle)
        turned[i], turned[i + half] = z.real, z.imag
    return torch.tensor(turned, dtype=torch.float64)


def naive_attention(attention, x_TD):
    """One position, one head and one key at a time, in double precision."""

    def heads(projection, norm, x_D, position):
        split = (projection.weight.double() @ x_D).view(-1, attention.d_head)
        if norm is not None and hasattr(norm, "weight"):
            split = split / (split.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        return split if position is None else [naive_rotation(h.tolist(), position) for h in split]

    keys = [heads(attention.k, attention.k_norm, x_D, t) for t, x_D in enumerate(x_TD)]
    values = [heads(attention.v, None, x_D, None) for x_D in x_TD]
    outputs = []
    for t, x_D in enumerate(x_TD):
        queries = heads(attention.q, attention.q_norm, x_D, t)
        group = len(queries) // len(keys[0])
        mixed = []
        for h, query in enumerate(queries):
            scores = [query @ keys[s][h // group] / math.sqrt(len(query)) for s in range(t + 1)]
            weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
            mixed.append(sum(w * values[s][h // group] for s, w in enumerate(weights)))
        bias = 0.0 if attention.out.bias is None else attention.out.bias.double()
        outputs.append(attention.out.weight.double() @ torch.cat(mixed) + bias)
    return torch.stack(outputs)


@torch.no_grad()
def test_attention_equals_a_naive_loop(model):
    x_BTD = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    attention = model.blocks[1].attention

    y_BTD = attention(x_BTD, Lookup(*model._rotations(None, 9), None, None))

    expected = torch.stack([naive_attention(attention, x_TD.double()) for x_TD in x_BTD])
    assert (y_BTD - expected).abs().max() < 1e-5  # fp32 rounding of sums over 32 products


def test_rotation_is_multiplication_by_unit_complex_numbers(model):
    x_BTHK = torch.randn(2, 11, 4, 8)

    y_BTHK = rotate(x_BTHK, *model._rotations(None, 11))

    for b, t, h in ((0, 0, 0), (1, 3, 2), (0, 10, 3)):
        expected = naive_rotation(x_BTHK[b, t, h].tolist(), t)
        assert torch.allclose(y_BTHK[b, t, h].double(), expected, atol=1e-5)


@torch.no_grad()
def test_no_position_sees_the_future(model, tokens_BT):
    changed_BT = tokens_BT.clone()
    changed_BT[:, 25:] = (changed_BT[:, 25:] + 1) % 100

    before, after = model(tokens_BT), model(changed_BT)

    assert torch.allclose(before[:, :25], after[:, :25], atol=1e-5)
    assert not torch.allclose(before[:, 25:], after[:, 25:], atol=1e-2)


@torch.no_grad()
def test_padding_changes_no_real_position(model, tokens_BT):
    lengths = (40, 17, 1)
    padded_BT = tokens_BT.clone()
    for row, length in enumerate(lengths):
        padded_BT[row, length:] = 0

    batched = model(padded_BT)

    for row, length in enumerate(lengths):
        alone = model(tokens_BT[row : row + 1, :length])
        assert torch.allclose(batched[row, :length], alone[0], atol=1e-5)


@torch.no_grad()
def test_packed_documents_are_as_alone(model, tokens_BT):
    lengths = (13, 1, 26)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(3, -1)
    offsets = torch.tensor([0, *lengths * 3]).cumsum(0).to(torch.int32)

    packed = model(tokens_BT, positions, offsets)

    ends = torch.tensor(lengths).cumsum(0).tolist()
    for end, length in zip(ends, lengths, strict=True):
        alone = model(tokens_BT[:, end - length : end])
        assert torch.allclose(packed[:, end - length : end], alone, atol=1e-5)


@torch.no_grad()
def test_only_distances_between_positions_matter(model, tokens_BT):
    shifted = model(tokens_BT, torch.arange(7, 47).expand(3, -1))

    assert torch.allclose(shifted, model(tokens_BT), atol=1e-4)


@pytest.mark.parametrize("name", NAMED_SIZES)
def test_counted_parameters_are_those_of_the_real_model(name):
    with torch.device("meta"):
        model = GPT(named_size(name), context_length=16)

    assert sum(p.numel() for p in model.parameters()) == count_params(named_size(name))


@pytest.mark.parametrize(
    "changes",
    [{"n_kv_heads": 2}, {"d_ff": 100}, {"is_tied": False}, {"vocab_size": 129}],
    ids=lambda changes: next(iter(changes)),
)
def test_every_dial_of_the_shape_is_counted(changes):
    config = ModelConfig(
        **{"n_layers": 3, "d_model": 64, "n_heads": 4, "vocab_size": 128} | changes
    )

    model = build_gpt(config, 16)

    assert sum(p.numel() for p in model.parameters()) == count_params(config)
    assert model(torch.tensor([[127, 0]])).shape == (1, 2, config.padded_vocab_size)


def test_the_reference_has_344_180_736_parameters():
    with torch.device("meta"):
        model = GPT(named_size("350m"), context_length=2048)

    assert sum(p.numel() for p in model.parameters()) == 344_180_736


def test_classic_starts_as_gpt_2_did():
    config = ModelConfig(family="classic", n_layers=8, d_model=128, n_heads=4, vocab_size=1024)
    weights = build_gpt(config, 16, seed=3).state_dict()

    for name, weight in weights.items():
        if weight.ndim == 2:
            is_output = name.endswith((".out.weight", ".down.weight"))
            expected = 0.02 / math.sqrt(2 * 8) if is_output else 0.02
            # The deviation of n draws scatters by 1/sqrt(2n); their mean by 1/sqrt(n).
            assert weight.std() == pytest.approx(expected, rel=4 / math.sqrt(2 * weight.numel()))
            assert abs(weight.mean()) < 5 * expected / math.sqrt(weight.numel())
        else:
            assert torch.all(weight == (0.0 if name.endswith("bias") else 1.0))


def test_modern_blocks_start_as_the_identity():
    config = ModelConfig(n_layers=3, d_model=64, n_heads=2, vocab_size=256, is_tied=False)
    model = build_gpt(config, 16, seed=3)
    tokens_BT = torch.arange(16)[None]

    embedded = model.embedding(tokens_BT)

    assert torch.equal(model.hidden(tokens_BT), model.final_norm(embedded))
    for weight in (model.embedding.weight, model.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    for weight in (model.blocks[0].attention.v.weight, model.blocks[2].mlp.gate.weight):
        assert weight.std().item() == pytest.approx(64**-0.5, rel=0.05)


@pytest.mark.parametrize("family", ["classic", "modern"])
def test_the_first_loss_is_that_of_guessing(family):
    config = ModelConfig(family=family, n_layers=4, d_model=128, n_heads=4, vocab_size=4096)
    inputs_BT, targets_BT = torch.randint(0, 4096, (2, 4, 32)).unbind()

    loss = TrainingLoss(build_gpt(config, 32))(inputs_BT, targets_BT) / 128

    assert loss.item() == pytest.approx(math.log(4096), rel=0.03)


def test_a_seed_means_the_same_weights_everywhere(config):
    torch.manual_seed(123)
    first = build_gpt(config, 16, seed=5).state_dict()
    directly = GPT(config, 16)
    directly.reset_parameters(5)
    other = build_gpt(config, 16, seed=6).state_dict()

    assert all(torch.equal(first[name], w) for name, w in directly.state_dict().items())
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_weights_do_not_depend_on_the_context_length(config):
    short, long = build_gpt(config, 16, seed=5), build_gpt(config, 32, seed=5)

    assert long.load_state_dict(short.state_dict(), strict=True)
    assert torch.equal(short(torch.arange(16)[None]), long(torch.arange(16)[None]))


def test_a_model_built_for_a_checkpoint_only_needs_its_weights(model, tokens_BT):
    blank = build_gpt(model.config, model.context_length, seed=None)

    blank.load_state_dict(model.state_dict())

    assert torch.equal(blank(tokens_BT), model(tokens_BT))


def test_casting_the_weights_leaves_the_rotations_exact(model):
    exact = model._rotations(None, 48)

    cast = model.to(torch.bfloat16)

    assert all(map(torch.equal, exact, cast._rotations(None, 48)))
    assert cast(torch.arange(48)[None]).dtype == torch.bfloat16


def test_autocast_halves_the_residual_stream_and_keeps_gradients_in_fp32(model, tokens_BT):
    with torch.autocast("cpu", torch.bfloat16):
        hidden_BTD = model.hidden(tokens_BT)
    hidden_BTD.float().square().sum().backward()

    assert hidden_BTD.dtype == torch.bfloat16
    assert model.embedding.weight.grad.dtype == torch.float32
    difference = (hidden_BTD.float() - model.hidden(tokens_BT)).abs()
    assert difference.mean() < 0.05  # bf16 keeps 8 bits: a few parts in a thousand of about 1


@pytest.mark.parametrize("is_autocast", [False, True], ids=["fp32", "bf16"])
def test_the_training_step_is_one_graph(model, tokens_BT, is_autocast):
    torch._dynamo.reset()
    loss = TrainingLoss(model)
    traced = torch.compile(loss, backend="eager", fullgraph=True, dynamic=False)

    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        value, expected = traced(tokens_BT, tokens_BT), loss(tokens_BT, tokens_BT)

    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("is_autocast", [False, True], ids=["fp32", "bf16"])
def test_compiled_losses_and_gradients_are_those_of_the_plain_model(model, tokens_BT, is_autocast):
    torch._dynamo.reset()
    loss = TrainingLoss(model)
    compiled = torch.compile(loss, fullgraph=True, dynamic=False)

    results = []
    for module in (loss, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            value = module(tokens_BT, tokens_BT)
        names, parameters = zip(*model.named_parameters(), strict=True)
        results.append(
            (value, dict(zip(names, torch.autograd.grad(value, parameters), strict=True)))
        )

    (plain, plain_grads), (fast, fast_grads) = results
    # bf16 keeps 8 bits, and the compiler rounds to it in fewer places.
    tolerance = 5e-2 if is_autocast else 1e-5
    assert fast.item() == pytest.approx(plain.item(), rel=tolerance)
    for name, gradient in plain_grads.items():
        assert (fast_grads[name] - gradient).norm() < tolerance * gradient.norm(), name
