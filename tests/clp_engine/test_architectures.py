"""Each family of decoder-only models: found by structure, steered, and its rollouts' log-probs those of training."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import GROUPED, SMALL
from tests_support import randomise_deltas

import clp_engine as clp
from clp_engine.layers import conditioned_layers
from clp_engine.logprobs import shares_prompts_exactly, token_logprobs
from clp_engine.rollout import rollout

CONFIGS = {
    "qwen2": (transformers.Qwen2Config(**GROUPED), 8),
    "mistral": (transformers.MistralConfig(**GROUPED, sliding_window=4), 8),
    "gemma2": (transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=4, final_logit_softcapping=2.0), 8),
    "phi": (transformers.PhiConfig(**SMALL, intermediate_size=48), 8),
    "gpt_neox": (transformers.GPTNeoXConfig(**SMALL, intermediate_size=48), 4),
    "bloom": (transformers.BloomConfig(**{**SMALL, "n_layer": 2, "n_head": 4}), 4),
}
PROMPTS, W = ["the cat", "read all file of the dog"], torch.tensor([[0.9, 0.1], [0.2, 0.8]])


@pytest.mark.parametrize("family", CONFIGS)
def test_logprobs_of_rollouts_and_of_training_agree(family, tokenizer):
    config, num_layers = CONFIGS[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = clp.get_clp_model(model, clp.CLPConfig(rewards=["long", "short"]))
    assert len(conditioned_layers(model)) == num_layers
    randomise_deltas(model)
    out = rollout(model, tokenizer, PROMPTS, reward_weights=W, num_generations=3, max_new_tokens=8, do_sample=True,
                  return_logits=True)  # fmt: skip
    seen = out.policy_logits_BLV.float().log_softmax(-1).gather(-1, out.completion_ids_BL.unsqueeze(-1)).squeeze(-1)
    c = model.coefficients(2, W)
    for share_prompts in {False, shares_prompts_exactly(model)}:
        with torch.no_grad():
            got = token_logprobs(model, out, c, share_prompts=share_prompts)
            reference = token_logprobs(model, out, c * 0, share_prompts=share_prompts)
        assert torch.allclose(got, seen * out.completion_mask_BL, atol=3e-5)
        assert (got - reference).abs().max() > 0.1


def test_windows_shorter_than_the_rows_take_padded_rows(tokenizer):
    """Within the window the block mask is exact; beyond it, it would let the layers see too far."""
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=9)).eval()
    model = clp.get_clp_model(model, clp.CLPConfig(rewards=["long", "short"]))
    assert shares_prompts_exactly(model)
    out = rollout(model, tokenizer, ["read all file of the dog"], num_generations=2, max_new_tokens=9, do_sample=True)
    assert out.input_ids_BT.shape[1] > 9
    c = model.coefficients(1, [0.5, 0.5])
    with torch.no_grad():
        padded, shared = (token_logprobs(model, out, c, share_prompts=share) for share in (False, True))
    assert torch.equal(padded, shared)
