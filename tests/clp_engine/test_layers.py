"""Layers on their own: what conditions what, odd base layers, shared parts, copies that are mixes, refusals by name."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from architectures import GROUPED, SMALL, load
from tests_support import randomise_deltas, tiny_llama

import clp_engine as clp
from clp_engine.layers import conditioned_layers, named_copies
from clp_engine.layers.norm import norm_arithmetic

IDS = torch.tensor([[5, 9, 3, 7], [8, 4, 30, 11]])
W = torch.tensor([[1.0, 0.0], [0.2, 0.8]])


def condition(model, **fields):
    return clp.get_clp_model(model, clp.CLPConfig(**{"rewards": ["a", "b"], **fields}))


def test_memory_is_the_copies_and_nothing_else():
    model = tiny_llama()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    size = sum(parameter.numel() for parameter in model.parameters())
    condition(model, variant="full")
    own = {name: p.data_ptr() for name, p in model.named_parameters() if not p.requires_grad}
    assert own == before
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * size  # tied embeddings count once


@pytest.mark.parametrize("fields", [{"variant": "full"}, {"parameterization": "lora"}])
def test_peak_memory_is_the_copies_whatever_the_weightings(fields):
    from bench.memory import measure_peak

    model = tiny_llama(hidden_size=256, intermediate_size=512)
    measure_peak(lambda: {}, "cpu")  # the profiler's own first use
    peak = measure_peak(
        lambda: {n: p for n, p in condition(model, **fields).named_parameters() if p.requires_grad}, "cpu"
    )
    assert abs(peak["allocator"]) < 0.25  # MiB beside some MiB of copies: a norm's probe, a seed of an adapter
    randomise_deltas(model)
    model(IDS, reward_weights=W)
    peaks = [
        measure_peak(lambda w=w: {"logits": model(IDS, reward_weights=w).logits.detach()}, "cpu")["allocator"]
        for w in (W, W.flip(0), torch.rand(2, 2).softmax(-1))
    ]
    assert max(peaks) - min(peaks) < 0.01


def test_a_tied_head_has_the_embeddings_copies():
    model = condition(tiny_llama(), variant="full")
    assert model.lm_head.deltas is model.model.embed_tokens.deltas
    names = [name for name in named_copies(model) if "lm_head" in name or "embed_tokens" in name]
    assert names == ["model.embed_tokens.weight.a", "model.embed_tokens.weight.b"]
    alone = condition(tiny_llama(), variant="logit", train_shared=True)
    assert alone.lm_head.deltas.shape[1] == 2
    assert alone.model.embed_tokens.deltas.shape[1] == 1


def test_shared_parts_follow_lambda_alone():
    model = condition(tiny_llama(), train_shared=True, min_kl_weight=0.1)
    assert {layer.clp.shared for layer in conditioned_layers(model).values()} == {True, False}
    randomise_deltas(model)
    for layer in conditioned_layers(model).values():
        if not layer.clp.shared:
            layer.deltas.data.zero_()
    by_weights = [model(IDS, reward_weights=w).logits for w in ([1.0, 0.0], [0.3, 0.7])]
    assert torch.equal(*by_weights)
    assert not torch.allclose(by_weights[0], model(IDS, reward_weights=[1.0, 0.0], kl_weight=0.5).logits, atol=1e-3)
    assert torch.equal(model(IDS, kl_weight=1.0).logits, tiny_llama()(IDS).logits)
    with pytest.raises(ValueError, match=r"coefficients has shape \[2, 2\].* takes a tensor \[B, 3\].*lambda"):
        model(IDS, coefficients=W)


def test_copies_of_mixed_rewards_are_the_mixing_matrix_times_the_weights():
    copies = {"left": {"a": 1.0}, "middle": {"a": 0.5, "b": 0.5}}
    model = condition(tiny_llama(), copies=copies)
    randomise_deltas(model)
    got = model(IDS, reward_weights=W).logits
    assert torch.equal(got, model(IDS, coefficients=torch.tensor([[1.0, 0.5], [0.2, 0.5]])).logits)
    assert {name.rsplit(".", 1)[-1] for name in named_copies(model)} == {"left", "middle"}


def test_adapters_of_different_ranks():
    model = condition(tiny_llama(), parameterization="lora", r={"a": 2, "b": 5}, lora_alpha={"a": 2, "b": 10})
    randomise_deltas(model)
    layer = model.model.layers[0].self_attn.q_proj
    assert {name: tuple(view.shape) for name, view in layer.copies().items()} == {
        "lora_A.a": (2, 32), "lora_B.a": (32, 2), "lora_A.b": (5, 32), "lora_B.b": (32, 5)
    }  # fmt: skip
    views = layer.copies()
    delta = 0.2 * views["lora_B.a"] @ views["lora_A.a"] + 0.8 * 2 * views["lora_B.b"] @ views["lora_A.b"]
    assert torch.allclose(model.collapse([0.2, 0.8]).model.layers[0].self_attn.q_proj.weight, layer.weight + delta)


def test_adapters_beside_quantised_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao's own deprecation
        plain = torch.ao.quantization.quantize_dynamic(tiny_llama(), {torch.nn.Linear}, dtype=torch.qint8)
    before = plain(IDS).logits
    with pytest.raises(NotImplementedError, match=r"q_proj \(Linear\) is quantised.*lora"):
        condition(copy.deepcopy(plain))
    model = condition(plain, parameterization="lora", r=2)
    assert torch.equal(model(IDS, reward_weights=W).logits, before)
    randomise_deltas(model)
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 4, 32)
    gates = W.repeat_interleave(2, dim=1)[:, None] * 4.0  # lora_alpha 8 over r 2
    wanted = layer.plain_class.forward(layer, x) + (x @ layer.lora_A.T * gates) @ layer.lora_B.T
    with model._active.use(model._record(W)):
        assert torch.allclose(layer(x), wanted, atol=1e-5)
    with pytest.raises(NotImplementedError, match="quantised"):
        model.collapse([0.5, 0.5])


@pytest.mark.parametrize("name", ["gemma", "llama", "gpt2", "t5", "falcon"])
def test_norms_are_known_by_what_they_do(name):
    norms = {path: m for path, m in load(name).named_modules() if "norm" in type(m).__name__.lower()}
    kinds = {norm_arithmetic(norm, path).kind for path, norm in norms.items()}
    assert kinds == {"layer" if name in ("gpt2", "falcon") else "rms"}


class MaxNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        return self.weight * x / x.abs().amax(dim=-1, keepdim=True)


def test_other_norms_are_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"final \(MaxNorm\) is neither an RMSNorm nor a LayerNorm"):
        norm_arithmetic(MaxNorm(), "final")


def test_fused_experts_and_flattened_batches_are_refused_by_name():
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**GROUPED, num_local_experts=2))
    with pytest.raises(NotImplementedError, match=r"mlp.* holds .*choose others with target_modules"):
        condition(mixtral, variant="full")
    opt = transformers.OPTForCausalLM(transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32))
    model = condition(opt, target_modules=["fc1"])
    randomise_deltas(model)
    with pytest.raises(ValueError, match=r"leading sizes \[8\].*flattened batches"):
        model(IDS, reward_weights=W)


def test_soft_tokens_leave_the_cache_alone():
    model = condition(tiny_llama(), parameterization="soft_tokens", num_virtual_tokens=3)
    randomise_deltas(model, std=1.0)
    whole = model(IDS, reward_weights=W).logits
    first = model(IDS[:, :2], reward_weights=W, use_cache=True)
    assert first.past_key_values.get_seq_length() == 2
    rest = model(IDS[:, 2:], reward_weights=W, past_key_values=first.past_key_values).logits
    assert torch.allclose(torch.cat([first.logits, rest], dim=1), whole, atol=1e-5)


@pytest.mark.parametrize("fields", [{"variant": "full"}, {"parameterization": "lora"}])
def test_layers_pickle_and_collapsed_models_know_nothing_of_copies(fields):
    model = condition(load("gemma"), **fields)
    randomise_deltas(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(IDS, reward_weights=W).logits, model(IDS, reward_weights=W).logits)
    plain = model.collapse([0.5, 0.5])
    assert {type(m) for m in plain.modules()} == {type(m) for m in load("gemma").modules()}
    fresh = load("gemma")
    for name, module in plain.named_modules():
        assert vars(module).keys() == vars(fresh.get_submodule(name)).keys(), name
    assert b"clp_engine" not in pickle.dumps(plain)
    assert plain.state_dict().keys() == load("gemma").state_dict().keys()
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not [name for name, p in plain.named_parameters() if p.data_ptr() in pointers]


def test_fold_serves_the_same_policy_with_a_copy_less():
    model = condition(load("gpt2"), variant="full")
    randomise_deltas(model, std=0.05)
    folded = model.fold()
    assert sum(view.numel() for view in named_copies(folded).values()) * 2 == sum(
        view.numel() for view in named_copies(model).values()
    )
    assert torch.allclose(folded(IDS, reward_weights=W).logits, model(IDS, reward_weights=W).logits, atol=2e-5)
    with pytest.raises(ValueError, match=r"kl_weight=0.5 .*folded"):
        folded(IDS, reward_weights=W, kl_weight=0.5)
    with pytest.raises(ValueError, match="folded"):
        folded.save_pretrained("nowhere")
    with pytest.raises(NotImplementedError, match="full deltas"):
        condition(load("gpt2"), parameterization="lora").fold()


@pytest.mark.parametrize("fields", [{"parameterization": "lora"}, {"parameterization": "svd"}, {}])
def test_a_tied_heads_own_copies_leave_the_embedding_alone(fields):
    model = condition(tiny_llama(), variant="logit", **fields)
    randomise_deltas(model)
    wanted = model(IDS, reward_weights=[0.5, 0.5]).logits
    plain = model.collapse([0.5, 0.5])
    assert torch.allclose(plain(IDS).logits, wanted, atol=2e-5)
    assert torch.equal(plain.model.embed_tokens.weight, tiny_llama().model.embed_tokens.weight)
    plain.tie_weights()  # as resizing does
    assert torch.allclose(plain(IDS).logits, wanted, atol=2e-5)
    if not fields:
        folded = model.fold()
        folded.tie_weights()
        assert torch.allclose(folded(IDS, reward_weights=[0.5, 0.5]).logits, wanted, atol=2e-5)


@pytest.mark.parametrize("parameterization", ["delta", "lora", "svd", "pblora", "soft_tokens"])
def test_copies_beside_a_float64_base(parameterization):
    model = condition(tiny_llama().double(), parameterization=parameterization)
    randomise_deltas(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(IDS, reward_weights=W).logits.dtype == torch.float64


def test_sums_of_16_bit_copies_are_rounded_once():
    model = condition(tiny_llama())
    randomise_deltas(model)
    model.to(torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    wide = layer.weight.float() + torch.einsum("k,nkd->nd", torch.tensor([0.3, 0.7]), layer.deltas.float())
    assert torch.equal(model.collapse([0.3, 0.7]).model.layers[0].self_attn.q_proj.weight, wide.bfloat16())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", [{"variant": "full"}, {"parameterization": "lora"}])
def test_checkpointing_enabled_before_conditioning_and_learnable_coefficients(family, use_reentrant):
    gradients = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        plain = tiny_llama()
        if checkpoints:
            plain.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model = condition(plain, **family).train()
        randomise_deltas(model)
        model.enable_input_require_grads()
        c = W.clone().requires_grad_()
        model(IDS, coefficients=c, use_cache=False).logits.square().mean().backward()
        gradients.append([c.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for whole, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(whole, recomputed, atol=1e-6)


def test_hooked_models_collapse():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    plain = tiny_llama()
    add_hook_to_module(plain, AlignDevicesHook(io_same_device=True))
    model = condition(plain)
    randomise_deltas(model)
    got = model.collapse([0.5, 0.5])(IDS).logits
    assert torch.allclose(got, model(IDS, reward_weights=[0.5, 0.5]).logits, atol=2e-5)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_proj", "k_prj"], r"'k_prj' of target_modules=.* near names: \['k_proj'"),
        (["vproj"], r"near names: .*'v_proj'"),
        (r".*\.q_prj", r"near names: .*'q_proj'.*a string is a regular expression of the whole path"),
        ("q_proj", "a string is a regular expression of the whole path"),
    ],
)
def test_targets_that_match_nothing_list_near_names(targets, words):
    with pytest.raises(ValueError, match=words):
        condition(tiny_llama(), target_modules=targets)


@pytest.mark.parametrize("given", [torch.tensor([0.5, 0.5]), W.tolist(), torch.ones(2, 3)])
def test_coefficients_of_another_form_are_refused_by_name(given):
    with pytest.raises(ValueError, match=r"coefficients has shape .* takes a tensor \[B, 2\]"):
        condition(tiny_llama())(IDS, coefficients=given)


def test_what_cannot_be_conditioned_leaves_the_model_as_it_was():
    model = tiny_llama()
    model.model.norm = MaxNorm()
    with pytest.raises(NotImplementedError, match=r"model.norm \(MaxNorm\)"):
        condition(model, variant="full")
    assert not conditioned_layers(model)
    with pytest.raises(NotImplementedError, match=r"lm_head has copies of its size: resize before"):
        condition(tiny_llama(), variant="logit").resize_token_embeddings(64)
    with pytest.raises((ValueError, RuntimeError), match="cuda"):
        condition(tiny_llama(), parameterization="lora").set_kernel_backend("cuda")
