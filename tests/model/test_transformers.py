"""The same weights in transformers' GPT-NeoX and Qwen3 give the same logits."""

import pytest
import torch

pytestmark = pytest.mark.slow


def as_gpt_neox(model):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = model.config
    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            intermediate_size=config.ff_width,
            hidden_act="gelu_pytorch_tanh",
            max_position_embeddings=model.context_length,
            use_parallel_residual=False,
            rotary_pct=1.0,
            rotary_emb_base=10_000,
            tie_word_embeddings=True,
        )
    )
    names = {
        "embedding": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm",
        "attention.out": "attention.dense",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
        "blocks": "gpt_neox.layers",
    }
    weights = renamed(without_padding(model), names)
    for n in range(config.n_layers):
        prefix = f"gpt_neox.layers.{n}.attention."
        parts = [weights.pop(f"{prefix}{name}.weight") for name in "qkv"]
        by_head = [part.view(config.n_heads, 1, config.d_head, -1) for part in parts]
        fused = torch.cat(by_head, dim=1).flatten(0, 2)
        weights[f"{prefix}query_key_value.weight"] = fused
        weights[f"{prefix}query_key_value.bias"] = torch.zeros(len(fused))
    return loaded(theirs, weights, embedding="gpt_neox.embed_in.weight")


def as_qwen3(model):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = model.config
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.d_head,
            intermediate_size=config.ff_width,
            max_position_embeddings=model.context_length,
            rope_theta=10_000.0,
            tie_word_embeddings=config.is_tied,
        )
    )
    names = {
        "embedding": "model.embed_tokens",
        "final_norm": "model.norm",
        "head": "lm_head",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.": "self_attn.",
        ".q.": ".q_proj.",
        ".k.": ".k_proj.",
        ".v.": ".v_proj.",
        ".out.": ".o_proj.",
        ".gate.": ".gate_proj.",
        ".up.": ".up_proj.",
        ".down.": ".down_proj.",
        "blocks": "model.layers",
    }
    weights = renamed(without_padding(model), names)
    return loaded(theirs, weights, embedding="model.embed_tokens.weight")


def without_padding(model):
    real = model.config.vocab_size
    is_padded = {"embedding.weight", "head.weight"}
    return {k: w[:real] if k in is_padded else w for k, w in model.state_dict().items()}


def renamed(weights, names):
    for ours, theirs in names.items():
        weights = {name.replace(ours, theirs): weight for name, weight in weights.items()}
    return weights


def loaded(theirs, weights, *, embedding):
    theirs.load_state_dict({"lm_head.weight": weights[embedding]} | weights, strict=True)
    return theirs.eval()


@torch.no_grad()
def test_logits_are_those_of_the_stock_architecture(model, tokens_BT):
    home = as_gpt_neox(model) if model.config.family == "classic" else as_qwen3(model)

    ours = model(tokens_BT)[..., : model.config.vocab_size]
    theirs = home(tokens_BT).logits

    assert ours.std() > 0.5
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


@torch.no_grad()
def test_greedy_text_is_that_of_the_stock_architecture(model, tokens_BT):
    from casallm.inference.engine import Engine
    from casallm.inference.sampling import SamplingConfig

    home = as_gpt_neox(model) if model.config.family == "classic" else as_qwen3(model)
    prompt = tokens_BT[:1, :8]

    ours = Engine(model).generate(prompt.tolist(), 24, SamplingConfig(temperature=0.0))

    theirs = home.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert ours[0] == theirs[0, 8:].tolist()
