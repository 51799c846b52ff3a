"""A conditioned model under what people do to models: cast, copied, pickled, placed on devices, run in threads."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from tests_support import randomise_deltas, tiny_bart, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

import clp_engine as clp
from clp_engine.layers import DeltaLinear, conditioned_layers

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
W, OTHER = torch.tensor([[1.0, 0.0], [0.3, 0.7]]), torch.tensor([[0.2, 0.8], [0.6, 0.4]])


def condition(plain, rewards=("long", "short")):
    model = clp.get_clp_model(plain, clp.CLPConfig(rewards=list(rewards)))
    randomise_deltas(model, 0.3)
    return model


@pytest.fixture
def model():
    return condition(tiny_llama())


def gradients(model):
    return [layer.deltas.grad for layer in conditioned_layers(model).values()]


class Outputs(TorchDispatchMode):
    """The sizes of what operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        given = {id(x.untyped_storage()) for x in args if isinstance(x, torch.Tensor)}
        self.sizes |= {t.numel() for t in made if isinstance(t, torch.Tensor) and id(t.untyped_storage()) not in given}
        return out


def test_autocast_casts_activations_and_no_delta(model):
    """Deltas have a size that nothing else has, and no operator makes anything of that size."""
    model = condition(tiny_llama(), rewards=["a", "b", "c", "d", "e"])
    sizes = {layer.deltas.numel() for layer in conditioned_layers(model).values()}
    weights = torch.tensor([[0.2] * 5, [0.0, 0.1, 0.2, 0.3, 0.4]])
    with torch.no_grad():
        expected = model(input_ids=IDS, reward_weights=weights).logits
        with torch.autocast("cpu", torch.bfloat16), Outputs() as made:
            got = model(input_ids=IDS, reward_weights=weights).logits
    assert got.dtype == torch.bfloat16
    assert not sizes & made.sizes
    # bfloat16 rounds each activation once, by 2^-9 of it; four layers of blocks add up.
    assert (got.float() - expected).abs().max() <= 2**-5 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, reward_weights=weights).logits.float().square().mean().backward()
    assert all(grad.dtype == torch.float32 and grad.abs().max() > 0 for grad in gradients(model))


def test_a_copy_is_a_model_of_its_own(model):
    """Also where blocks are checkpointed: the copy's recompute runs under the copy's weighting."""
    expected = gradients_of(copy.deepcopy(model), W)
    model.train().enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": False})
    copied = copy.deepcopy(model)
    loss = copied(input_ids=IDS, reward_weights=W, use_cache=False).logits.square().mean()
    with torch.no_grad():
        model(input_ids=IDS, reward_weights=OTHER, use_cache=False)
    loss.backward()
    for got, wanted in zip(gradients(copied), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    assert all(grad is None for grad in gradients(model))


def gradients_of(model, weights):
    model.zero_grad()
    model(input_ids=IDS, reward_weights=weights, use_cache=False).logits.square().mean().backward()
    return gradients(model)


FRESH = """
import pickle, sys, torch
model, cls, logits = pickle.load(sys.stdin.buffer)
assert type(model) is cls and cls.__name__ == "CLPLlamaForCausalLM", type(model)
ids, weights = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[1.0, 0.0], [0.3, 0.7]])
with torch.no_grad():
    assert torch.equal(model(input_ids=ids, reward_weights=weights, use_cache=False).logits, logits)
"""


def test_a_fresh_process_unpickles_model_and_class(model):
    with torch.no_grad():
        logits = model(input_ids=IDS, reward_weights=W, use_cache=False).logits
    data = pickle.dumps((model, type(model), logits))
    done = subprocess.run([sys.executable, "-c", FRESH], input=data, env=with_path(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def with_path():
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class Named(type(clp.get_clp_model(tiny_llama(), clp.CLPConfig(rewards=["a"])))):
    """A class that a user derives; pickle finds it by its name, as any other."""


def test_derived_classes_and_torch_save(model, monkeypatch):
    # pytest's importlib mode leaves test modules out of sys.modules under their names.
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or type(sys)(__name__))
    monkeypatch.setattr(sys.modules[__name__], "Named", Named, raising=False)
    assert pickle.loads(pickle.dumps(Named)) is Named
    buffer = io.BytesIO()
    torch.save(model, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert type(loaded) is type(model)
    assert loaded._active is not model._active
    assert {layer.clp.active for layer in conditioned_layers(loaded).values()} == {loaded._active}
    assert torch.equal(loaded(input_ids=IDS, reward_weights=W).logits, model(input_ids=IDS, reward_weights=W).logits)


@torch.no_grad()
def test_train_and_eval_reach_the_conditioned_layers():
    model = condition(tiny_llama(attention_dropout=0.5))
    model.train()
    assert all(layer.training for layer in conditioned_layers(model).values())
    torch.manual_seed(0)
    dropped = model(input_ids=IDS, reward_weights=W).logits
    model.eval()
    assert not any(layer.training for layer in conditioned_layers(model).values())
    first, second = (model(input_ids=IDS, reward_weights=W).logits for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.allclose(dropped, first, atol=1e-3)


@torch.no_grad()
def test_casting_the_model_casts_its_deltas_and_casting_the_base_does_not(model):
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model(input_ids=IDS, reward_weights=W).logits
    narrow = condition(tiny_llama().to(torch.bfloat16))
    assert {layer.deltas.dtype for layer in conditioned_layers(narrow).values()} == {torch.float32}
    cast = copy.deepcopy(model).to(torch.bfloat16)
    assert {parameter.dtype for parameter in cast.parameters()} == {torch.bfloat16}
    for bfloat16 in (narrow, cast):
        got = bfloat16(input_ids=IDS, reward_weights=W).logits
        assert got.dtype == torch.bfloat16
        assert (got.float() - expected).abs().max() <= 2**-4 * expected.abs().max()
        together = bfloat16.generate(IDS, reward_weights=W, **options)
        alone = bfloat16.generate(IDS[1:], reward_weights=W[1:], **options)
        assert torch.equal(together[1:, : alone.shape[1]], alone)
    back = cast.to(torch.float32)
    assert back(input_ids=IDS, reward_weights=W).logits.dtype == torch.float32


@pytest.fixture
def saved(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_models_loaded_with_a_device_map(saved, model):
    from transformers import AutoModelForCausalLM

    loaded = condition(AutoModelForCausalLM.from_pretrained(saved, device_map="cpu"))
    expected = model(input_ids=IDS, reward_weights=W).logits
    assert torch.equal(loaded(input_ids=IDS, reward_weights=W).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("plain", [tiny_llama, tiny_bart])
def test_models_with_accelerates_hooks(plain):
    """As for a device_map over several devices: hooks replace the forward of the model and of its blocks."""
    from accelerate import dispatch_model

    hooked = condition(dispatch_model(plain(), {"": "cpu"}, force_hooks=True))
    model, options = condition(plain()), {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    batch = {"input_ids": IDS, "reward_weights": W}
    assert torch.equal(hooked(**batch).logits, model(**batch).logits)
    assert torch.equal(hooked.generate(**batch, **options), model.generate(**batch, **options))


@torch.no_grad()
def test_layers_on_several_devices(monkeypatch):
    """The second block on a device of its own; "meta" computes shapes only."""
    from accelerate import dispatch_model

    seen = []

    def mixed_linear(x, base, deltas, coefficients, bias=None, *, row_map, **_):
        devices = {tensor.device.type for tensor in (x, base, deltas, coefficients, row_map)}
        seen.append(devices)
        return torch.nn.functional.linear(x, base)

    monkeypatch.setattr(sys.modules[DeltaLinear.__module__], "mixed_linear", mixed_linear)
    plain = tiny_llama(tie_word_embeddings=False)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    places |= dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), "meta")
    model = condition(dispatch_model(plain, places, main_device="cpu", force_hooks=True))
    model._hf_hook.io_same_device = False  # nothing can be moved back from "meta"
    assert model(input_ids=IDS, reward_weights=W, use_cache=False).logits.is_meta
    assert seen == [{"cpu"}] * 4 + [{"meta"}] * 4


def test_offloaded_layers_are_refused(tmp_path):
    from accelerate import disk_offload

    offloaded = disk_offload(tiny_llama(), tmp_path, execution_device=torch.device("cpu"))
    with pytest.raises(NotImplementedError, match=r"layers\.0\.self_attn\.q_proj is offloaded"):
        condition(offloaded)
    assert all(parameter.requires_grad for parameter in offloaded.parameters()), "nothing has changed"


def run_in_threads(*functions):
    """Start all at once; what a thread raises, raises here."""
    barrier, errors = threading.Barrier(len(functions)), []

    def call(function):
        try:
            barrier.wait(60)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_one_model_in_two_threads_at_once(model):
    """Each thread's forward waits in the middle of the model until the other has entered it too."""
    expected = {name: [grad.clone() for grad in gradients_of(copy.deepcopy(model), weights)]
                for name, weights in (("w", W), ("other", OTHER))}  # fmt: skip
    meet = threading.Barrier(2)

    def wait(*_):
        meet.wait(60)

    model.model.layers[0].register_forward_hook(wait)

    def train(name, weights):
        def step():
            for _ in range(5):
                loss = model(input_ids=IDS, reward_weights=weights, use_cache=False).logits.square().mean()
                deltas = [layer.deltas for layer in conditioned_layers(model).values()]
                for got, wanted in zip(torch.autograd.grad(loss, deltas), expected[name], strict=True):
                    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)

        return step

    run_in_threads(train("w", W), train("other", OTHER))


def test_backward_in_another_thread_recomputes_under_its_forwards_weighting(model):
    expected = [grad.clone() for grad in gradients_of(model, W)]
    model.zero_grad()
    model.train().enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": False})
    loss = model(input_ids=IDS, reward_weights=W, use_cache=False).logits.square().mean()
    run_in_threads(loss.backward)
    for got, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_several_models_in_one_process():
    """Models of other classes, rewards and numbers of copies, one called within another's forward."""
    first, second = condition(tiny_llama()), condition(tiny_llama(1), rewards=["a", "b", "c"])
    batches = [{"input_ids": IDS, "reward_weights": W}, {"input_ids": IDS, "reward_weights": torch.eye(3)[:2]}]
    expected = [model(**batch).logits for model, batch in zip((first, second), batches, strict=True)]
    within = []

    def call_second(*_):
        within.append(second(**batches[1]).logits)

    handle = first.model.layers[0].register_forward_hook(call_second)
    assert torch.equal(first(**batches[0]).logits, expected[0])
    assert torch.equal(within[0], expected[1])
    handle.remove()
    assert type(first) is type(second)
    results = [None, None]

    def call(i, model):
        def run():
            for _ in range(10):
                results[i] = model(**batches[i]).logits
                assert torch.equal(results[i], expected[i])

        return run

    run_in_threads(call(0, first), call(1, second))
