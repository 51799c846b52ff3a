"""Every family of conditioning on every architecture: starts as the plain model, mixes exactly, becomes plain again.

| family      | what one weighting alone must equal                    | collapse | batch_invariant |
| ----------- | ------------------------------------------------------ | -------- | --------------- |
| full, attn, logit, pattern | the plain model with that copy added    | yes      | yes             |
| shared      | the same, with the shared part added                   | yes      | yes             |
| lora, svd, pblora | the plain model with that adapter merged         | yes      | yes             |
| soft_tokens | nothing plain: the model attends to its own tokens     | raises   | raises          |

batch_invariant raises for linear layers of a class of their own (GPT-2's Conv1D, Falcon's), whose base term is torch's.
"""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import CONFIGS, load
from mixed_linear_support import needs_cpp
from tests_support import randomise_deltas, tiny_llama

import clp_engine as clp
from clp_engine.layers import conditioned_layers

REWARDS = ["long", "short"]
FAMILIES = {
    "full": {"variant": "full"},
    "attn": {"variant": "attn"},
    "logit": {"variant": "logit"},
    "pattern": {"target_modules": r".*(mlp|fc|DenseReluDense).*"},
    "shared": {"variant": "attn", "train_shared": True},
    "lora": {"parameterization": "lora", "r": 3, "lora_alpha": 6},
    "svd": {"parameterization": "svd", "r": 3},
    "pblora": {"parameterization": "pblora", "r": 3},
    "soft_tokens": {"parameterization": "soft_tokens", "num_virtual_tokens": 3},
}
CELLS = [(family, name) for family in FAMILIES for name in CONFIGS]
W = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.0, 1.0]])


def inputs(name, rows=slice(None)):
    ids = torch.tensor([[5, 9, 3, 7, 20], [8, 4, 30, 11, 6], [17, 2, 12, 9, 25]])[rows]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if CONFIGS[name].is_encoder_decoder:
        batch["decoder_input_ids"] = ids.flip(1)[:, :4]
    return batch


def prompts(name, rows=slice(None)):
    return {key: value for key, value in inputs(name, rows).items() if key != "decoder_input_ids"}


def condition(model, family, **fields):
    return clp.get_clp_model(model, clp.CLPConfig(rewards=REWARDS, **{**FAMILIES[family], **fields}))


def logits(model, name, rows=slice(None), **weighting):
    with torch.no_grad():
        return model(**inputs(name, rows), **weighting).logits


def merged(plain, model, w):
    """The plain model with the weighted copies added to its parameters, from their names on disk alone."""
    head = plain.get_output_embeddings()
    if model.clp_config.variant == "logit":  # tied or not, the head alone has copies
        head.weight = torch.nn.Parameter(head.weight.clone())
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    sums: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for path, layer in conditioned_layers(model).items():
            views = layer.copies()
            for name, delta in _weight_deltas(views, w).items():
                parameter = parameters[f"{path}.{name}"]
                if id(parameter) in sums and torch.equal(sums[id(parameter)], delta):
                    continue  # a tied weight has one delta
                sums[id(parameter)] = delta
                if parameter.shape != delta.shape or type(plain.get_submodule(path)).__name__ == "Conv1D":
                    delta = delta.T if name == "weight" else delta
                parameter += delta
    return plain


def _weight_deltas(views, w):
    gates = {**dict(zip(REWARDS, w, strict=True)), "shared": 1.0}
    if any(key.startswith("lora_A") for key in views):
        return {
            "weight": sum(
                g * 2.0 * views[f"lora_B.{n}"] @ views[f"lora_A.{n}"] for n, g in gates.items() if n != "shared"
            )
        }
    if "svd_U.shared" in views:
        values = torch.cat([views["svd_values.shared"], *(gates[n] * views[f"svd_values.{n}"] for n in REWARDS)])
        return {"weight": views["svd_U.shared"] @ torch.diag(values) @ views["svd_V.shared"]}
    if "pb_A.shared" in views:
        (a, a_shared), (b, b_shared) = views["pb_A.shared"].split(3), views["pb_B.shared"].split(3, dim=1)
        core = sum(gates[name] * views[f"pb_M.{name}"] for name in REWARDS)
        return {"weight": b @ core @ a + b_shared @ views["pb_M.shared"] @ a_shared}
    deltas: dict[str, torch.Tensor] = {}
    for key, view in views.items():
        name, _, copy_name = key.partition(".")
        deltas[name] = deltas.get(name, 0) + gates[copy_name] * view
    return deltas


@pytest.mark.parametrize(("family", "name"), CELLS, ids=[f"{family}-{name}" for family, name in CELLS])
def test_cell(family, name, tmp_path):
    plain = load(name)
    model = condition(load(name), family)
    model.set_kernel_backend("reference")
    before = logits(plain, name)
    assert torch.equal(logits(model, name, reward_weights=W), before)
    assert torch.equal(logits(model, name, reward_weights=W[1]), before)
    randomise_deltas(model, std=0.05)
    after = logits(model, name, reward_weights=W)
    assert (after - before).abs().amax(dim=(1, 2)).min() > 1e-3
    assert torch.equal(logits(model, name, kl_weight=1.0), before)
    for row in range(3):
        alone = logits(model, name, rows=slice(row, row + 1), reward_weights=W[row])
        assert torch.allclose(after[row : row + 1], alone, atol=2e-5)
    _check_plain_forms(model, plain, name, after)
    _check_generation(model, name)
    model.set_kernel_backend("auto")
    assert torch.allclose(logits(model, name, reward_weights=W), after, atol=5e-5)
    model.save_pretrained(tmp_path)
    loaded = clp.CLPModel.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, name, reward_weights=W), logits(model, name, reward_weights=W))


def _check_plain_forms(model, plain, name, after):
    if model.clp_config.parameterization == "soft_tokens":
        with pytest.raises(NotImplementedError, match="soft_tokens"):
            model.collapse(W[0])
        return
    for row, w in enumerate(W):
        wanted = after[row : row + 1]
        one = logits(merged(copy.deepcopy(plain), model, w.tolist()), name, rows=slice(row, row + 1))
        assert torch.allclose(one, wanted, atol=5e-5)
        collapsed = model.collapse(w)
        assert type(collapsed) is type(plain)
        assert torch.allclose(logits(collapsed, name, rows=slice(row, row + 1)), wanted, atol=5e-5)


def _check_generation(model, name):
    for options in ({}, {"num_beams": 2}):
        kwargs = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
        together = model.generate(**prompts(name), reward_weights=W, **kwargs)
        for row in range(3):
            alone = model.generate(**prompts(name, slice(row, row + 1)), reward_weights=W[row], **kwargs)
            assert torch.equal(together[row : row + 1], alone)


MANY_IDS = torch.randint(2, 32, (8, 5), generator=torch.Generator().manual_seed(0))  # more rows than are streamed
MANY_W = torch.rand(8, 2, generator=torch.Generator().manual_seed(1)).softmax(dim=1)


def changed_rows(model, name):
    """Conditioned layers in which a row of a mixed batch has other bits than the row alone."""
    calls, hooks = [], []
    for path, layer in conditioned_layers(model).items():
        if layer.added:
            hooks.append(layer.register_forward_hook(lambda *call, path=path: calls.append((path, *call))))
    batch = {"input_ids": MANY_IDS, "attention_mask": torch.ones_like(MANY_IDS)}
    if CONFIGS[name].is_encoder_decoder:
        batch["decoder_input_ids"] = MANY_IDS.flip(1)[:, :4]
    with torch.no_grad():
        model(**batch, reward_weights=MANY_W)
        for hook in hooks:
            hook.remove()
        changed = []
        for path, layer, (x, *_), out in calls:
            if path.endswith("relative_attention_bias"):  # [Q, J, B * H]
                out = out.unflatten(-1, (len(MANY_W), -1)).movedim(2, 0)
            for row, w in enumerate(MANY_W):
                x_row = x[row : row + 1] if len(x) == len(MANY_W) else x
                with model._active.use(model._record(model.coefficients(1, w))):
                    alone = layer(x_row).reshape(out[row].shape)
                if not torch.equal(alone, out[row]):
                    changed.append(path)
    called = {path for path, *_ in calls}
    not_called = {path for path, layer in conditioned_layers(model).items() if layer.added and path not in called}
    assert not_called <= {"shared", "model.shared"}  # the table that encoder and decoder tie theirs to
    return set(changed)


@needs_cpp
@pytest.mark.parametrize(("family", "name"), CELLS, ids=[f"{family}-{name}" for family, name in CELLS])
def test_conditioned_layers_keep_a_rows_bits_in_any_batch(family, name):
    model = condition(load(name), family)
    assert model.kernel_backend() == "cpp"
    randomise_deltas(model, std=0.05)
    of_their_own_class = name in ("gpt2", "falcon") and family != "logit"  # Conv1D, FalconLinear
    if of_their_own_class or family == "soft_tokens":
        with pytest.raises(NotImplementedError, match=r"batch_invariant=True: .* runs its own forward"):
            model.set_kernel_backend("auto", batch_invariant=True)
        return
    model.set_kernel_backend("auto", batch_invariant=True)
    assert not changed_rows(model, name)
    reference = logits(model, name, kl_weight=1.0)  # a row of the reference is computed as the others are
    assert torch.allclose(reference, logits(load(name), name), atol=5e-5)
    if (family, name) == ("lora", "llama"):
        model.set_kernel_backend("auto")
        assert changed_rows(model, name), "no row changes anyway: the test shows nothing"
        with pytest.raises(ValueError, match=r"low_rank_linear, which .* runs on the reference"):
            model.set_kernel_backend("reference", batch_invariant=True)


@needs_cpp
def test_where_every_layer_is_conditioned_the_logits_keep_their_bits():
    """What is left to torch there, attention, goes by sequence and head."""
    model = condition(tiny_llama(hidden_size=256, intermediate_size=512), "full")
    randomise_deltas(model, std=0.02)
    model.set_kernel_backend("auto", batch_invariant=True)
    with torch.no_grad():
        together = model(MANY_IDS, reward_weights=MANY_W).logits
        alone = [model(ids[None], reward_weights=w).logits for ids, w in zip(MANY_IDS, MANY_W, strict=True)]
        assert torch.equal(together, torch.cat(alone))
        model.set_kernel_backend("auto")
        assert not torch.equal(model(MANY_IDS, reward_weights=MANY_W).logits, torch.cat(alone))
