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
        ({"rewards": "long"}, "expected a list"),
        ({"rewards": {"a", "b"}}, "expected a list"),
        ({"rewards": ["a"], "target_modules": "*q_proj"}, "no regular expression"),
        ({"rewards": ["a.b"]}, "dots"),
        ({"rewards": ["a"], "variant": "attn", "target_modules": ["q_proj"]}, "choose one"),
        ({"rewards": ["a"], "variant": "mlp"}, "mlp"),
        ({"rewards": ["a"], "parameterization": "dora"}, "dora"),
        ({"rewards": ["a"], "min_kl_weight": 1.0}, "min_kl_weight"),
        ({"rewards": ["a"], "weight_domain": "cube"}, "cube"),
        ({"rewards": ["a", "b"], "default_reward_weights": {"a": 1.0}}, "missing"),
        ({"rewards": ["a", "shared"]}, "shared"),
        ({"rewards": ["a"], "variant": "full", "parameterization": "lora"}, "all-linear"),
        ({"rewards": ["a"], "variant": "logit", "parameterization": "soft_tokens"}, "soft_tokens"),
        ({"rewards": ["a"], "kl_interpolation": "cubic"}, "cubic"),
        ({"rewards": ["a"], "copies": {"x": {"b": 1.0}}}, "names .'b'."),
        ({"rewards": ["a"], "copies": {"x": {"a": float("inf")}}}, "finite"),
        ({"rewards": ["a"], "parameterization": "lora", "r": {"b": 4}}, "must name the copies"),
        ({"rewards": ["a"], "parameterization": "lora", "r": 0}, "r must be a positive integer, got 0"),
        ({"rewards": ["a"], "parameterization": "lora", "r": True}, "r must be a positive integer, got True"),
        ({"rewards": ["a"], "parameterization": "lora", "r": 4.0}, "r must be a positive integer, got 4.0"),
        ({"rewards": ["a"], "num_virtual_tokens": 0}, "num_virtual_tokens"),
    ],
)
def test_bad_fields_are_named(fields, word):
    with pytest.raises(ValueError, match=word):
        CLPConfig(**fields)


def test_copies_of_their_own_and_shared_parts_set_the_coefficients():
    copies = {"left": {"a": 1.0}, "middle": {"a": 0.5, "b": 0.5}, "right": {"b": 1.0}}
    config = CLPConfig(rewards=["a", "b"], copies=copies)
    assert config.copy_names == ("left", "middle", "right")
    assert (config.num_copies, config.num_coefficients) == (3, 3)
    assert torch.equal(config.mixing_matrix(), torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]))
    assert CLPConfig.from_dict(config.to_dict()) == config
    assert CLPConfig(rewards=["a"]).mixing_matrix() is None
    for fields in ({"train_shared": True}, {"parameterization": "svd"}, {"parameterization": "pblora"}):
        assert CLPConfig(rewards=["a", "b"], **fields).num_coefficients == 3


def test_ranks_and_scalings_of_each_copy():
    config = CLPConfig(rewards=["a", "b"], parameterization="lora", r={"b": 4, "a": 2}, lora_alpha=8)
    assert config.ranks == [2, 4]
    assert config.scalings == [4.0, 2.0]


def test_unknown_field_on_disk_is_named():
    with pytest.raises(ValueError, match="colour"):
        CLPConfig.from_dict({"rewards": ["a"], "colour": 1})
