from __future__ import annotations

import pytest
import torch

from clp_engine import CLPConfig


def test_round_trip_and_defaults():
    config = CLPConfig(rewards=("a", "b"), default_reward_weights={"b": 1.0, "a": 0.0})
    assert config.variant == "attn"
    assert CLPConfig.from_dict(config.to_dict()) == config
    assert CLPConfig(rewards=["a"], target_modules={"v_proj", "q_proj"}).target_modules == ["q_proj", "v_proj"]
    assert torch.equal(config.default_weights(2), torch.tensor([[0.0, 1.0]] * 2))
    assert torch.equal(CLPConfig(rewards=["a", "b"]).default_weights(1), torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"rewards": []}, "rewards"),
        ({"rewards": ["a", "a"]}, "distinct"),
        ({"rewards": ["a.b"]}, "dots"),
        ({"rewards": ["a"], "variant": "attn", "target_modules": ["q_proj"]}, "choose one"),
        ({"rewards": ["a"], "variant": "mlp"}, "mlp"),
        ({"rewards": ["a"], "parameterization": "dora"}, "dora"),
        ({"rewards": ["a"], "min_kl_weight": 1.0}, "min_kl_weight"),
        ({"rewards": ["a"], "weight_domain": "cube"}, "cube"),
        ({"rewards": ["a", "b"], "default_reward_weights": {"a": 1.0}}, "missing"),
    ],
)
def test_bad_fields_are_named(fields, word):
    with pytest.raises(ValueError, match=word):
        CLPConfig(**fields)


@pytest.mark.parametrize("fields", [{"variant": "full"}, {"parameterization": "lora"}, {"train_shared": True}])
def test_what_is_not_built_says_so(fields):
    with pytest.raises(NotImplementedError, match="not built yet"):
        CLPConfig(rewards=["a"], **fields)


def test_unknown_field_on_disk_is_named():
    with pytest.raises(ValueError, match="colour"):
        CLPConfig.from_dict({"rewards": ["a"], "colour": 1})
