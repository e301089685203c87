"""Any architecture: tiny random models of many types, each masked, cut and trained for two steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from helpers import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

from toolkit.config.schema import MaskConfig, OptimConfig, TrainConfig
from toolkit.data.batches import Batch, collate
from toolkit.data.examples import Example
from toolkit.distributed import World
from toolkit.engine.local import LocalEngine
from toolkit.errors import MaskError, ModelError
from toolkit.loss import supervised_loss
from toolkit.mask.apply import apply_mask, trainable_parameters, untie_head
from toolkit.mask.layer_mask import LayerMask, build_mask
from toolkit.models.inspect import inspect
from toolkit.prefix.split import split, split_is_exact

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DELTA_NET = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
HEADS = {"head_dim": 8}
GEMMA4 = {**HEADS, "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 8}
ALL_HEADS = {"num_key_value_heads": 4}


@dataclass(frozen=True)
class Kind:
    """A model type: what its configuration adds to ``SMALL``, and what it calls its parts."""

    config: dict[str, Any] = field(default_factory=dict)
    blocks: str = "model.layers"
    head: str = "lm_head"
    unreached: tuple[str, ...] = ()
    """Ends of names that no gradient reaches: routing biases, which other training code sets by counting."""


def gpt(**config: Any) -> Kind:
    return Kind({"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, **config}, "transformer.h")


CUT = {
    "afmoe": Kind({**EXPERTS, "num_dense_layers": 1, "sliding_window": 6, **HEADS}, unreached=(".expert_bias",)),
    "apertus": Kind(),
    "arcee": Kind(),
    "bamba": Kind({"attn_layer_indices": [1, 3], **MAMBA2}),
    "biogpt": Kind(blocks="biogpt.layers", head="output_projection"),
    "bitnet": Kind(),
    "bloom": Kind({"n_layer": 4, "n_head": 4}, "transformer.h"),
    "codegen": gpt(rotary_dim=4),
    "cohere": Kind(),
    "cohere2": Kind({"sliding_window": 6, **HEADS}),
    "ctrl": Kind({"n_embd": 32, "n_layer": 4, "n_head": 4, "dff": 48}, "transformer.h"),
    "deepseek_v2": Kind({**ROUTED, **LATENT, **ALL_HEADS}),
    "deepseek_v3": Kind({**ROUTED, **LATENT, **ALL_HEADS, "n_shared_experts": 1}),
    "dots1": Kind({**ROUTED, "n_shared_experts": 1, **HEADS}),
    "ernie4_5": Kind(HEADS),
    "ernie4_5_moe": Kind(
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
        unreached=(".e_score_correction_bias",),
    ),
    "exaone4": Kind({"sliding_window": 6, "sliding_window_pattern": 2}),
    "exaone_moe": Kind({**EXPERTS, "n_group": 1, "topk_group": 1, "sliding_window": 6}),
    "falcon": Kind({"ffn_hidden_size": 48}, "transformer.h"),
    "falcon_h1": Kind({**MAMBA2, "mamba_d_ssm": 64, "mamba_n_groups": 1, **HEADS}),
    "falcon_mamba": Kind({"state_size": 8, "time_step_rank": 4}, "backbone.layers"),
    "gemma": Kind(HEADS),
    "gemma2": Kind({"sliding_window": 6, **HEADS}),
    "gemma3_text": Kind({"sliding_window": 6, "sliding_window_pattern": 2, **HEADS}),
    "gemma4_text": Kind({**GEMMA4, "hidden_size_per_layer_input": 0}),
    "glm": Kind(HEADS),
    "glm4": Kind(HEADS),
    "glm4_moe": Kind({**ROUTED, "n_shared_experts": 1, **HEADS}),
    "gpt2": gpt(),
    "gpt_bigcode": gpt(),
    "gpt_neo": Kind(
        {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 6},
        "transformer.h",
    ),
    "gpt_neox": Kind(blocks="gpt_neox.layers"),
    "gpt_oss": Kind({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, **HEADS}),
    "gptj": gpt(rotary_dim=4),
    "granite": Kind({"tie_word_embeddings": True}),
    "granitemoe": Kind({"num_local_experts": 4, "num_experts_per_tok": 2}),
    "helium": Kind(HEADS),
    "hyperclovax": Kind(),
    "jamba": Kind(
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4}
    ),
    "lfm2": Kind({"layer_types": ["conv", "full_attention"] * 2}),
    "llama": Kind(),
    "llama4_text": Kind({"num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 8, **HEADS}),
    "mamba": Kind({"state_size": 8, "time_step_rank": 4}, "backbone.layers"),
    "minimax": Kind({"num_local_experts": 4, "num_experts_per_tok": 2, **HEADS}),
    "mistral": Kind({"sliding_window": 6}),
    "mixtral": Kind({"num_local_experts": 4}),
    "mpt": Kind({"d_model": 32, "n_layers": 4, "n_heads": 4, "expansion_ratio": 2}, "transformer.blocks"),
    "nanochat": Kind(HEADS),
    "nemotron": Kind(HEADS),
    "olmo": Kind(),
    "olmo2": Kind(),
    "olmoe": Kind(EXPERTS),
    "openai-gpt": gpt(),
    "opt": Kind({"ffn_dim": 48, "word_embed_proj_dim": 16}, "model.decoder.layers"),
    "phi": Kind(),
    "phi3": Kind(),
    "phimoe": Kind({"num_local_experts": 4}),
    "qwen2": Kind({"tie_word_embeddings": True}),
    "qwen2_moe": Kind({**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3": Kind(HEADS),
    "qwen3_moe": Kind({**EXPERTS, **HEADS}),
    "qwen3_next": Kind({**EXPERTS, **DELTA_NET, **HEADS, "shared_expert_intermediate_size": 16}),
    "recurrent_gemma": Kind({"attention_window_size": 6, "lru_width": 32}),
    "seed_oss": Kind(HEADS),
    "smollm3": Kind(),
    "solar_open": Kind({**ROUTED, **HEADS}),
    "stablelm": Kind(),
    "starcoder2": Kind({"sliding_window": 6}),
    "xglm": Kind({"d_model": 32, "num_layers": 4, "ffn_dim": 48, "attention_heads": 4}),
}
"""Types that give the whole model's logits wherever they are cut (Gemma 4 where it has no inputs per layer)."""

UNCUT = {
    # puts a prompt of its own before the token ids
    "cpmant": Kind({"dim_head": 8, "dim_ff": 48, "prompt_types": 4, "prompt_length": 4, "segment_types": 4},
                   "cpmant.encoder.layers"),
    # carries four streams, and its upper blocks read the keys and values of lower ones
    "gemma3n_text": Kind(
        {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "laurel_rank": 8,
         "activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
         "sliding_window": 6, **HEADS}
    ),
    # every block looks the token ids up in a table
    "gemma4_text:per layer": Kind({**GEMMA4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}),
    # runs through the same blocks several times
    "hrm_text": Kind({"H_cycles": 1, "L_cycles": 2}, "model.L_module.layers"),
}  # fmt: skip
"""Types that cannot be cut, each with the reason."""

OTHER = {
    "rwkv": Kind({"context_length": 64, "rescale_every": 2}, "rwkv.blocks", "head"),
    "xlm-roberta": Kind({"is_decoder": True, "tie_word_embeddings": True}, "roberta.encoder.layer", "lm_head.decoder"),
    "zamba2": Kind(
        {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 4, "mamba_d_state": 8,
         "chunk_size": 8, "adapter_rank": 4, **ALL_HEADS}
    ),
}  # fmt: skip
"""Types with a test of their own."""


def make(name: str) -> Any:
    torch.manual_seed(0)
    kind = {**CUT, **UNCUT, **OTHER}[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name.partition(":")[0], **{**SMALL, **kind.config}))


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """One row alone, and three of which one is padded."""
    generator = torch.Generator().manual_seed(1)
    rows = [tuple(torch.randint(3, 60, (length,), generator=generator).tolist()) for length in (17, 11, 17)]
    return [collate([Example(rows[0], 9)], 0), collate([Example(row, 5) for row in rows], 0)]


def last_two_and_head(model: Any, kind: Kind) -> set[str]:
    """What ``last:2, head`` means, by names alone."""
    chosen = (f"{kind.blocks}.2.", f"{kind.blocks}.3.", f"{kind.head}.")
    return {name for name, _ in model.named_parameters() if name.startswith(chosen)}


def build(model: Any, *train: str, tied: Literal["error", "untie"] = "untie") -> LayerMask:
    return build_mask(MaskConfig(train=list(train), tied=tied), inspect(model))


def masked(model: Any, *train: str) -> LayerMask:
    """Lay the mask onto the model, untying its head if need be."""
    mask = build(model, *train)
    apply_mask(model, mask, inspect(model))
    return mask


def two_steps(model: Any, mask: LayerMask, boundary: int | None, batches: list[Batch]) -> set[str]:
    """Names of the tensors, buffers included, that two optimizer steps change."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prefix, suffix = split(model.train(), inspect(model), boundary)
    train = TrainConfig(learning_rate=1e-2, warmup_ratio=0)
    parameters = trainable_parameters(suffix.model, mask)
    engine = LocalEngine(suffix, parameters, mask.groups, train, OptimConfig(), 2, World())
    for batch in batches:
        loss = supervised_loss(engine.forward, prefix(batch) if prefix else None, batch, len(batch.targets))
        engine.backward(loss, is_last=True)
        engine.update()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("name", CUT)
def test_the_mask_names_the_last_blocks_and_the_head_and_two_steps_change_just_them(
    name: str, batches: list[Batch]
) -> None:
    model, kind = make(name), CUT[name]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    mask = masked(model, "last:2", "head")
    assert set(mask.names) == last_two_and_head(model, kind)
    assert f"{kind.head}.weight" in mask.names
    assert (mask.boundary, mask.tied) == (2, "untie" if tied else "no")
    changed = two_steps(model, mask, mask.boundary, batches)
    assert changed == {tensor for tensor in mask.names if not tensor.endswith(kind.unreached)}


@pytest.mark.parametrize("name", CUT)
def test_the_halves_give_the_whole_models_logits_bit_for_bit(name: str, batches: list[Batch]) -> None:
    model = make(name).eval()
    for boundary in (1, 2, 4):
        prefix, suffix = split(model, inspect(model), boundary)
        assert prefix is not None
        for batch in batches:
            with torch.no_grad():
                whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
                assert torch.equal(whole[batch.supervised], suffix.eval().logits(prefix.eval()(batch), batch))
        assert split_is_exact(model, prefix, suffix, batches[0])


@pytest.mark.parametrize("name", [*CUT, *UNCUT])
def test_the_loss_in_tiles_is_that_of_the_whole_models_logits(name: str, batches: list[Batch]) -> None:
    """Whatever the type does before its head or to what the head gives: losses and gradients, cut or not."""
    model = make(name).eval()
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        untie_head(model, inspect(model))
    prefix, suffix = split(model, inspect(model), 2 if name in CUT else None)
    found = suffix.settle(prefix(batches[0]) if prefix else None, batches[0])
    assert found.tiled is (name != "cpmant"), found
    for batch in batches:
        loss = suffix(prefix(batch) if prefix else None, batch)
        loss.backward()
        parameters = dict(suffix.model.named_parameters())
        gradients = {key: p.grad for key, p in parameters.items() if p.grad is not None}
        model.zero_grad()
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(logits[batch.supervised], batch.targets, reduction="sum")
        expected.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert f"{CUT.get(name, UNCUT.get(name)).head}.weight" in gradients
        for key, gradient in gradients.items():
            assert torch.allclose(gradient, parameters[key].grad, rtol=1e-3, atol=1e-4), key
        model.zero_grad()


@pytest.mark.parametrize("name", UNCUT)
def test_a_type_that_cannot_be_cut_is_found_out_and_trained_whole(name: str, batches: list[Batch]) -> None:
    model, kind = make(name), UNCUT[name]
    mask = masked(model, "last:2", "head")
    assert set(mask.names) == last_two_and_head(model, kind)
    prefix, suffix = split(model, inspect(model), mask.boundary)
    assert prefix is not None
    assert not any(split_is_exact(model, prefix, suffix, batch) for batch in batches)
    assert two_steps(model, mask, None, batches) == set(mask.names)


def test_a_type_that_rescales_its_own_weights_is_refused() -> None:
    model = make("rwkv").train()
    with pytest.raises(ModelError, match=r"changes its own weights in a forward pass \(first rwkv\.blocks"):
        split(model, inspect(model), 3)


def test_a_tie_is_seen_also_where_the_head_is_named_before_the_embeddings(batches: list[Batch]) -> None:
    model = make("xlm-roberta")
    assert next(iter(model.state_dict())).startswith("lm_head")
    with pytest.raises(MaskError, match=r"selects lm_head\.decoder\.weight, but .* one tensor \(roberta\.embeddings"):
        build(model, "head", tied="error")
    with pytest.raises(
        MaskError, match=r"untie is not possible: lm_head\.bias shares the tensor lm_head\.decoder\.bias"
    ):
        build(model, "head")
    mask = masked(model, "last:2")
    prefix, suffix = split(model, inspect(model), 2)
    assert prefix is not None
    assert split_is_exact(model, prefix, suffix, batches[1])
    assert two_steps(model, mask, 2, batches) == set(mask.names)


def test_tensors_that_blocks_share_train_in_all_of_them_or_in_none(batches: list[Batch]) -> None:
    model = make("zamba2")
    with pytest.raises(MaskError, match=r"selects model\.layers\.3\.shared.* but not model\.layers\.1\.shared"):
        build(model, "last:2")
    with pytest.raises(MaskError, match="untie is not possible"):
        build(model, "blocks:1,3", "head")
    mask = masked(model, "blocks:1,3")
    assert mask.boundary == 1
    prefix, suffix = split(model, inspect(model), 1)
    assert prefix is not None
    assert not split_is_exact(model, prefix, suffix, batches[0])  # block 1 reads the embeddings again
    names = dict(model.named_parameters())
    assert two_steps(model, mask, None, batches) & set(names) == set(mask.names)
    assert not any(".shared_transformer." in name and ".layers.3." in name for name in mask.names)


def test_the_documentation_counts_these_types() -> None:
    types = {name.partition(":")[0] for name in (*CUT, *UNCUT, *OTHER)}
    assert f"Of {len(types)} model types" in (ROOT / "docs/split.md").read_text(encoding="utf-8")
    assert f"Tested on {len(types)} model types" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
