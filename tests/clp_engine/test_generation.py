"""Each way of generation with a weighting per row, against each row generated alone."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers
from mixed_linear_support import largest_allocation
from tests_support import fixed_noise, randomise_deltas, tiny_llama

import clp_engine as clp
from clp_engine.rollout import encode_prompts

W = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]])
PROMPTS = ["the cat", "read all file of the dog", "sum of value"]
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 1},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 3},
    "static_cache": {"cache_implementation": "static"},
    "static_cache_beams": {"cache_implementation": "static", "num_beams": 4, "num_return_sequences": 2},
    "no_cache": {"use_cache": False},
    "chunked_prefill": {"prefill_chunk_size": 2},
}
# transformers takes one row at a time for these; the tokens are those of greedy decoding.
MODES_OF_ONE_ROW = {
    "prompt_lookup": {"prompt_lookup_num_tokens": 2},
    "early_exit": {"assistant_early_exit": 1},
    "plain_assistant": {"assistant_model": lambda: tiny_llama(1)},
    "conditioned_assistant": {"assistant_model": lambda: condition(tiny_llama(1))},
}


def condition(plain, rewards=("long", "short")):
    model = clp.get_clp_model(plain, clp.CLPConfig(rewards=list(rewards)))
    randomise_deltas(model, 0.3)
    return model


@pytest.fixture(params=["reference", "auto"])
def model(request):
    model = condition(tiny_llama())
    model.set_kernel_backend(request.param)
    return model


@pytest.fixture
def batch(tokenizer):
    ids, mask = encode_prompts(tokenizer, PROMPTS)
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, weights, **options):
    options = {**OPTIONS, **options}
    if options["do_sample"]:
        options["logits_processor"] = [fixed_noise(options["num_return_sequences"])]
    return model.generate(**inputs, reward_weights=weights, **options)


def alone(model, batch, i, weights, **options):
    """Row i without its padding, and its new tokens under its own weighting."""
    prompt = batch["input_ids"][i, batch["attention_mask"][i].bool()][None]
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    return inputs, generate(model, inputs, weights, **options)[:, prompt.shape[1] :]


@pytest.mark.parametrize("mode", MODES)
def test_a_mixed_batch_generates_what_each_row_generates_alone(model, batch, mode):
    options, width = MODES[mode], batch["input_ids"].shape[1]
    together = generate(model, batch, W, **options)[:, width:]
    n = options.get("num_return_sequences", 1)
    assert len(together) == n * len(W)
    for i, w in enumerate(W):
        _, wanted = alone(model, batch, i, w, **options)
        assert torch.equal(together[i * n : (i + 1) * n, : wanted.shape[1]], wanted)
        assert not together[i * n : (i + 1) * n, wanted.shape[1] :].any()
    assert not torch.equal(together, generate(model, batch, W.flip(0), **options)[:, width:]), "nothing was tested"


@pytest.mark.parametrize("mode", MODES_OF_ONE_ROW)
def test_assisted_decoding_gives_each_rows_greedy_tokens(model, batch, mode):
    options = {name: value() if callable(value) else value for name, value in MODES_OF_ONE_ROW[mode].items()}
    for i, w in enumerate(W):
        inputs, wanted = alone(model, batch, i, w)
        got = generate(model, inputs, w, **options)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(got, wanted)


def test_an_assistant_of_other_rewards_is_refused(model):
    assistant = condition(tiny_llama(1), rewards=["short", "long"])
    with pytest.raises(ValueError, match=r"assistant_model is conditioned on \['short', 'long'\]"):
        generate(model, {"input_ids": torch.tensor([[5, 6]])}, [0.5, 0.5], assistant_model=assistant)


def test_guidance_is_refused(model, batch):
    """transformers would call the model for the unconditional prompt without a weighting."""
    for options in ({"guidance_scale": 2.0}, {"generation_config": transformers.GenerationConfig(guidance_scale=2.0)}):
        with pytest.raises(NotImplementedError, match="guidance_scale"):
            generate(model, batch, W, **options)


FORMS = {
    "dict": ({"short": 0.8, "long": 0.2}, [[0.2, 0.8]] * 3),
    "dicts": ([{"short": float(w[1]), "long": float(w[0])} for w in W], W),
    "list": ([0.2, 0.8], [[0.2, 0.8]] * 3),
    "lists": (W.tolist(), W),
    "row": (W[2], [[0.2, 0.8]] * 3),
    "rows": (W, W),
    "default": (None, [[0.9, 0.1]] * 3),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_weighting(batch, form):
    config = clp.CLPConfig(rewards=["long", "short"], default_reward_weights={"long": 0.9, "short": 0.1})
    model = clp.get_clp_model(tiny_llama(), config)
    randomise_deltas(model, 0.3)
    given, rows = FORMS[form]
    options = {**OPTIONS, "num_beams": 2}
    expected = model.generate(**batch, coefficients=torch.tensor(rows) if isinstance(rows, list) else rows, **options)
    assert torch.equal(model.generate(**batch, reward_weights=given, **options), expected)


def test_kl_weights_of_each_row(model, batch):
    kl_weight = torch.tensor([0.01, 0.02, 1.0])
    together = model.generate(**batch, reward_weights=[0.5, 0.5], kl_weight=kl_weight, num_beams=2, **OPTIONS)
    for i, alpha in enumerate(kl_weight.tolist()):
        row = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        wanted = model.generate(**row, reward_weights=[0.5, 0.5], kl_weight=alpha, num_beams=2, **OPTIONS)
        assert torch.equal(together[i : i + 1, : wanted.shape[1]], wanted)


def test_coefficients_beside_a_weighting_are_refused(model, batch):
    for call in (model.forward, model.generate):
        with pytest.raises(ValueError, match="coefficients already hold the weighting"):
            call(**batch, coefficients=W, kl_weight=0.5)
    with pytest.raises(ValueError, match="coefficients already hold the weighting"):
        model.generate_batch([[5]], coefficients=W[:1], reward_weights=W[0])


class Listening(transformers.TextStreamer):
    """Keeps what it is given to print."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.heard = getattr(self, "heard", "") + text


def test_streams_of_one_row(model, batch, tokenizer):
    for i, w in enumerate(W):
        inputs, tokens = alone(model, batch, i, w)
        wanted = tokenizer.decode(tokens[0])
        streamer = Listening(tokenizer, skip_prompt=True)
        generate(model, inputs, w, streamer=streamer)
        assert streamer.heard.strip() == wanted


def test_streams_to_other_threads_at_once(model, batch, tokenizer):
    """Two generations of one model under different weightings run at the same time, each in its thread."""
    streamers, threads = [], []
    for i in (0, 1):
        inputs, _ = alone(model, batch, i, W[i])
        streamers.append(transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60))
        threads.append(threading.Thread(target=generate, args=(model, inputs, W[i]), kwargs={"streamer": streamers[i]}))
    for thread in threads:
        thread.start()
    texts = ["".join(streamer).strip() for streamer in streamers]
    for thread in threads:
        thread.join()
    assert texts == [tokenizer.decode(alone(model, batch, i, W[i])[1][0]) for i in (0, 1)]


def test_pipelines_pass_the_weighting_on(model, batch, tokenizer):
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"return_full_text": False, **OPTIONS}
    together = pipe(PROMPTS, batch_size=3, reward_weights=W, **options)
    for i, w in enumerate(W):
        wanted = tokenizer.decode(alone(model, batch, i, w)[1][0], skip_special_tokens=True)
        assert together[i][0]["generated_text"].strip() == wanted
        assert pipe(PROMPTS[i], reward_weights=w.tolist(), **options)[0]["generated_text"].strip() == wanted
    with pytest.raises(ValueError, match="3 rows for a batch of 1"):
        pipe(PROMPTS, reward_weights=W, **options)


def test_the_head_of_a_prefill_copies_no_weight():
    """torch's product of a slice of the hidden states and a frozen weight copies the weight for each sequence."""
    model = condition(tiny_llama(vocab_size=2048).bfloat16())
    ids_BT = torch.randint(2, 32, (8, 5), generator=torch.Generator().manual_seed(0))
    weight = model.get_output_embeddings().weight

    def prefill():
        with torch.inference_mode():
            model(ids_BT, reward_weights=[0.5, 0.5], logits_to_keep=1)

    assert largest_allocation(prefill) < weight.nbytes


def test_a_collapsed_model_has_no_hook_of_ours():
    model = condition(tiny_llama())
    assert model.get_output_embeddings()._forward_pre_hooks
    assert not model.collapse([0.5, 0.5]).get_output_embeddings()._forward_pre_hooks
