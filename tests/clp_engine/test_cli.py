"""The command line: parsing, one-line errors, and each command on a small random model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests_support import randomise_deltas

from clp_engine import cli
from clp_engine.cli import arguments, generate, train

ROOT = Path(__file__).resolve().parents[2]
REWARDS = """
def long(completions, **columns):
    return [float(len(completion.split())) for completion in completions]


def short(completions, **columns):
    return [-float(len(completion.split())) for completion in completions]


def three(completions, **columns):
    return [0.0, 0.0, 0.0]
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with reward functions and a JSONL file of prompts."""
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    prompts = ["open the file", "sort the list", "read a key", "close all"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    return tmp_path


@pytest.fixture
def saved_model(saved_base: Path, workplace: Path) -> Path:
    """A conditioned model in a folder, steered strongly enough that its greedy text depends on the weighting."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import clp_engine as clp

    model = clp.get_clp_model(
        AutoModelForCausalLM.from_pretrained(saved_base), clp.CLPConfig(rewards=["long", "short"])
    )
    randomise_deltas(model, std=0.5)
    model.save_pretrained(workplace / "model")
    AutoTokenizer.from_pretrained(saved_base).save_pretrained(workplace / "model")
    return workplace / "model"


def test_help_is_quick_to_import() -> None:
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]; from clp_engine.cli import main;"
        "main(['--help']); print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "clp generate" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"clp {command}" in capsys.readouterr().out.split("example", 1)[1]


@pytest.mark.parametrize(
    "argv",
    [
        ["DIR", "--prompt", "text", "--weights", "rouge=.7", "brevity=.3"],
        ["--weights", "rouge=.7", "brevity=.3", "DIR", "--prompt", "text"],
        ["--prompt", "text", "--weights", "rouge=.7,brevity=.3", "DIR"],
    ],
)
def test_weights_do_not_swallow_what_follows(argv: list[str]) -> None:
    options = arguments.parse(generate._parser(), argv)
    assert (options.model, options.prompt, options.weights) == ("DIR", ["text"], [{"rouge": 0.7, "brevity": 0.3}])


def test_weights_repeat() -> None:
    options = arguments.parse(generate._parser(), ["--weights", "a=1", "b=0", "--weights", "a=-.5", "b=1e0", "DIR"])
    assert options.weights == [{"a": 1.0, "b": 0.0}, {"a": -0.5, "b": 1.0}]
    assert options.model == "DIR"


@pytest.mark.parametrize("bad", [["rouge"], ["rouge=x"], ["a=1", "a=2"], ["a=1,b"]])
def test_malformed_weights_are_named(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        arguments.parse(generate._parser(), ["DIR", "--weights", *bad])
    assert stop.value.code == 2
    assert "--weights" in capsys.readouterr().err


def test_a_yaml_file_gives_flags_and_the_command_line_overrides_it(tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(
        "model_name_or_path: base\ndataset_name: rows.jsonl\nreward_funcs: [closeness, brevity]\noutput_dir: out\n"
        "learning_rate: 1e-5\nnum_generations: 8\nbf16: false\nvariant: logit\nlr_scheduler_kwargs: {num_cycles: 2}\n"
        "default_reward_weights: {closeness: .25, brevity: .75}\n"
    )
    options = arguments.parse(train._parser(False), ["--config", str(config), "--num-generations", "4"])
    assert options.reward_funcs == ["closeness", "brevity"]
    assert (options.learning_rate, options.num_generations, options.bf16) == (1e-5, 4, False)
    clp_config = train._clp_config(options, options.reward_funcs)
    assert (clp_config.variant, clp_config.rewards) == ("logit", ["closeness", "brevity"])
    assert clp_config.default_reward_weights == {"closeness": 0.25, "brevity": 0.75}
    training = train._training_config(options)
    assert (training.output_dir, training.per_device_train_batch_size) == ("out", 16)
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}


def test_train_has_a_flag_for_every_field() -> None:
    import dataclasses

    from clp_engine.config import CLPConfig
    from clp_engine.training import CLPTrainingConfig

    options = vars(
        arguments.parse(
            train._parser(False),
            ["--model_name_or_path", "m", "--dataset_name", "d", "--reward_funcs", "a", "b", "--output_dir", "o"],
        )
    )
    for config in (CLPConfig, CLPTrainingConfig):
        assert {field.name for field in dataclasses.fields(config) if field.init} - {"folded"} <= set(options)
    defaults = CLPTrainingConfig(output_dir="o")
    for field in dataclasses.fields(CLPTrainingConfig):
        if field.init and field.name in ("learning_rate", "kl_weight", "num_generations", "logging_steps"):
            assert options[field.name] == getattr(defaults, field.name)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["q_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["all-linear"], "all-linear"),
        ([r".*\.mlp\..*"], r".*\.mlp\..*"),
    ],
)
def test_target_modules(targets: list[str], expected: list[str] | str) -> None:
    argv = ["--model_name_or_path", "m", "--dataset_name", "d", "--reward_funcs", "a", "--target_modules", *targets]
    config = train._clp_config(arguments.parse(train._parser(False), argv), ["a"])
    assert (config.target_modules, config.variant) == (expected, None)


def one_line_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(argv) == 2
    error = capsys.readouterr().err  # progress bars may stand before the message
    assert "Traceback" not in error
    last_line = error.splitlines()[-1]
    assert last_line.startswith("clp: error: ")
    return last_line


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["fly"], "unknown command 'fly'"),
        (["generate", "--prompt", "x"], "no model given"),
        (["generate", "DIR"], "no prompt given"),
        (["generate", "DIR", "--prompt_file", "none.txt"], "none.txt: no such file"),
        (["generate", "./missing", "--prompt", "x"], "./missing: no such folder"),
        (["generate", "DIR", "--config", "none.yaml"], "none.yaml: no such file"),
        (["sweep", "--dataset_name", "d", "--reward_funcs", "a", "--output_dir", "o"], "no model given"),
    ],
)
def test_errors_are_one_line(argv: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert part in one_line_error(argv, capsys)


def test_unknown_yaml_keys_are_errors(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "run.yaml").write_text("max_new_token: 3\n")
    error = one_line_error(["generate", "DIR", "--prompt", "x", "--config", "run.yaml"], capsys)
    assert "unknown key 'max_new_token', did you mean 'max_new_tokens'?" in error


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no prompt given"):
        cli.main(["generate", "DIR"])


def test_generate_steers_each_weighting(saved_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", str(saved_model), "--prompt", "open the file", "--no-chat", "--max_new_tokens", "6"]
    texts = {}
    for weights in (["long=1", "short=0"], ["long=0", "short=1"]):
        assert cli.main([*argv, "--weights", *weights]) == 0
        texts[" ".join(weights)] = capsys.readouterr().out.splitlines()[1]
    assert len(set(texts.values())) == 2
    assert cli.main([*argv, "--weights", "long=1", "short=0", "--weights", "long=0", "short=1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    expected = [part for weights, text in texts.items() for part in (f"[{weights}]", text)]
    assert lines == [part for part in expected if part]


def test_generate_takes_a_prompt_file_and_the_chat_template(
    saved_model: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "prompts.txt").write_text("open the file\n\nsort the list\n")
    argv = ["generate", "--prompt_file", "prompts.txt", str(saved_model), "--max_new_tokens", "4", "--kl_weight", "1"]
    assert cli.main([*argv, "--do_sample", "--temperature", "0.7", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("[default weights kl_weight=1]\n> open the file\n")
    assert cli.main([*argv, "--do_sample", "--temperature", "0.7", "--seed", "3"]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--weights", "long=1"], "missing: ['short']"),
        (["--weights", "long=.7", "short=.7"], "must sum to 1"),
        (["--weights", "long=nan", "short=1"], "must be finite"),
        (["--kl_weight", "2"], "kl_weight is 2"),
        (["--backend", "fast"], "fast"),
        (["--backend", "cuda"], "missing here"),
    ],
)
def test_generate_reports_bad_steering(
    flags: list[str], part: str, saved_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import clp_kernels

    if "cuda" in flags and clp_kernels.available_backends()["cuda"] is None:
        pytest.skip("the CUDA back-end runs here")
    assert part in one_line_error(["generate", str(saved_model), "--prompt", "open", *flags], capsys)


def test_train_generate_sweep(saved_base: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = ["--reward_funcs", "own_rewards:long", "own_rewards:short"]
    argv = ["train", "--model_name_or_path", str(saved_base), "--dataset_name", "prompts.jsonl", *rewards]
    argv += ["--output_dir", "out", "--max_steps", "1", "--num_generations", "2", "--per_device_train_batch_size", "4"]
    argv += ["--max_completion_length", "4", "--num_reference_samples", "4", "--use_cpu", "--report_to", "none"]
    assert cli.main([*argv, "--save_strategy", "no", "--disable_tqdm", "true"]) == 0
    assert "saved to out" in capsys.readouterr().out
    assert cli.main(["generate", "out", "--prompt", "open", "--weights", "long=.5", "short=.5"]) == 0
    assert "holds another run" in one_line_error(argv, capsys)
    sweep = ["sweep", "out", "--dataset_name", "prompts.jsonl", *rewards, "--grid", "3", "--output_dir", "front"]
    assert cli.main([*sweep, "--max_completion_length", "4", "--num_prompts", "2"]) == 0
    front = json.loads((workplace / "front" / "front.json").read_text())
    assert len(front["reward_weights"]) == 3
    assert (workplace / "front" / "front.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"--reward_funcs": ["own_rewards:none"]}, "no function 'none'"),
        ({"--reward_funcs": ["nowhere:reward"]}, "nowhere"),
        ({"--reward_funcs": ["unknown"]}, "no such built-in reward"),
        ({"--reward_funcs": ["own_rewards:long", "own_rewards:long"]}, "two rewards have the name 'long'"),
        ({"--reward_funcs": ["own_rewards:three"]}, "three"),
        ({"--dataset_name": ["missing.jsonl"]}, "missing.jsonl"),
        ({"--dataset_name": ["empty.jsonl"]}, "empty.jsonl"),
        ({"--model_name_or_path": ["./missing"]}, "./missing: no such folder"),
        ({"--num_generations": ["1"]}, "num_generations is 1"),
        ({"--target_modules": ["nothing_proj"]}, "nothing_proj"),
    ],
)
def test_train_reports_bad_input(
    change: dict[str, list[str]],
    part: str,
    saved_base: Path,
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (workplace / "empty.jsonl").write_text("")
    flags = {
        "--model_name_or_path": [str(saved_base)],
        "--dataset_name": ["prompts.jsonl"],
        "--reward_funcs": ["own_rewards:long", "own_rewards:short"],
        "--output_dir": ["out"],
        "--use_cpu": [],
        "--max_steps": ["1"],
        "--disable_tqdm": ["true"],
        **change,
    }
    assert part in one_line_error(["train", *(token for flag in flags for token in (flag, *flags[flag]))], capsys)


def test_demo_hands_its_flags_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from clp_engine import demo

    calls = []
    monkeypatch.setattr(demo, "main", lambda **settings: calls.append(settings))
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--output_dir", "elsewhere", "--seed", "2", "--max_steps", "3", "--num_prompts", "4"]) == 0
    assert calls == [
        {"output_dir": "runs/demo", "seed": 0},
        {"output_dir": "elsewhere", "seed": 2, "max_steps": 3, "num_prompts": 4},
    ]


def test_env_names_versions_processor_and_back_ends(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert cli.main(["env"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output
    for name in ("processor", "flags", "caches", "reference      available", "cpp", "triton", "cuda"):
        assert name in output
