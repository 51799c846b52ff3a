"""`clp generate`: complete prompts under one weighting or several, all of them in one batch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clp_engine.cli import arguments, loading

_DESCRIPTION = """Complete prompts with a steerable model, under one weighting or several.

examples:
  clp generate runs/demo/model --prompt "some text" --weights closeness=.7 brevity=.3
  clp generate runs/demo/model --prompt "some text" --weights closeness=1 brevity=0 --weights closeness=0 brevity=1
  clp generate runs/demo/model --prompt_file prompts.txt --kl_weight 1        (1: the reference model)

Prompts are worded as in training where the model's folder says how (prompt_template.json: `clp demo` and `clp train` on
docstrings write it): only the text is given then, the system message and the instruction are the template's. --raw
takes the prompts as they are."""


def run(argv: Sequence[str]) -> None:
    """Parse `argv` and print the completions."""
    options = arguments.parse(_parser(), argv)
    if options.model is None:
        raise ValueError("no model given: name its folder first, as in `clp generate runs/demo/model --prompt ...`")
    prompts = _prompts(options)
    model, tokenizer = loading.load_conditioned_model(options.model, options.backend)
    weightings = options.weights or [None]
    texts = _complete(model, tokenizer, prompts, weightings, options)
    for i, weights in enumerate(weightings):
        print(f"[{_label(weights, options.kl_weight)}]")
        for j, prompt in enumerate(prompts):
            if len(prompts) > 1:
                print(f"> {prompt}")
            print(f"{texts[i * len(prompts) + j].strip()}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "clp generate", description=_DESCRIPTION, formatter_class=arguments.HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub id of a steerable model")
    arguments.add_config_flag(parser)
    text = parser.add_argument_group("prompts")
    text.add_argument("--prompt", action="append", default=[], help="a prompt; repeat for several")
    text.add_argument("--prompt_file", metavar="FILE", help="a text file with one prompt per line")
    text.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="apply the chat template, or not (default: if the tokenizer has one)",
    )
    text.add_argument("--raw", action="store_true", help="leave out the model's own prompt template")
    text.add_argument(
        "--system_prompt", metavar="TEXT", help="system message of each chat prompt, in place of the template's"
    )
    steering = parser.add_argument_group("steering")
    steering.add_argument(
        "--weights",
        action="append",
        default=[],
        type=arguments.weighting,
        metavar="NAME=NUMBER ...",
        help="as in --weights rouge=.7 brevity=.3; repeat for several weightings (default: the model's)",
    )
    steering.add_argument("--kl_weight", type=float, help="KL weight alpha; 1 is the reference model")
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--max_new_tokens", type=int, default=64, help="tokens of a completion at most")
    decoding.add_argument("--do_sample", action="store_true", help="sample instead of taking the likeliest token")
    decoding.add_argument("--temperature", type=float, default=1.0, help="of sampling")
    decoding.add_argument("--seed", type=int, default=0, help="of sampling")
    decoding.add_argument("--backend", default="auto", help="kernels: auto, reference, cpp, triton or cuda")
    return parser


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    if options.prompt_file is not None:
        if not (path := Path(options.prompt_file)).is_file():
            raise FileNotFoundError(f"--prompt_file {path}: no such file")
        prompts += [line for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError("no prompt given: use --prompt TEXT or --prompt_file FILE")
    return prompts


def _complete(
    model: Any, tokenizer: Any, prompts: list[str], weightings: list[Any], options: argparse.Namespace
) -> list[str]:
    """Completions of every prompt under every weighting, weighting-major, from one mixed batch."""
    import torch
    from transformers import set_seed

    from clp_engine.rollout import encode_prompts, pad_token_id

    rows = _worded(model, tokenizer, prompts, options)
    ids, mask = encode_prompts(tokenizer, rows * len(weightings))
    named = [weights for weights in weightings for _ in prompts]
    sampling = {"temperature": options.temperature, "top_k": 0, "top_p": 1.0} if options.do_sample else {}
    set_seed(options.seed)
    with torch.no_grad():
        sequences = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            reward_weights=None if named[0] is None else named,
            kl_weight=options.kl_weight,
            max_new_tokens=options.max_new_tokens,
            do_sample=options.do_sample,
            pad_token_id=pad_token_id(tokenizer),
            **sampling,
        )
    return tokenizer.batch_decode(sequences[:, ids.shape[1] :], skip_special_tokens=True)


def _worded(model: Any, tokenizer: Any, prompts: list[str], options: argparse.Namespace) -> list[Any]:
    """Each prompt as the model gets it: messages, in the words of its training where those are known, or bare text."""
    template = None if options.raw else model.prompt_template
    has_chat = tokenizer.chat_template is not None
    use_chat = has_chat or template is not None if options.chat is None else options.chat
    if use_chat and not has_chat:
        raise ValueError("the tokenizer has no chat template: use --no-chat, which takes the prompts as they are")
    if not use_chat:
        return list(prompts)
    rows = [[{"role": "user", "content": prompt}] if template is None else template.fill(prompt) for prompt in prompts]
    if options.system_prompt is None:
        return rows
    system = {"role": "system", "content": options.system_prompt}
    return [[system, *(message for message in row if message["role"] != "system")] for row in rows]


def _label(weights: dict[str, float] | None, kl_weight: float | None) -> str:
    parts = ["default weights"] if weights is None else [f"{name}={value:g}" for name, value in weights.items()]
    return " ".join([*parts, *([] if kl_weight is None else [f"kl_weight={kl_weight:g}"])])
