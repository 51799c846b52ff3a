"""Padam against its formula, and how the trainer takes it."""

from __future__ import annotations

import pytest
import torch
from tests_support import tiny_llama

import clp_engine as clp
from clp_engine.training import CLPTrainer, CLPTrainingConfig, Padam

BETAS = (0.8, 0.95)


def gradients(*shape: int, steps: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def after(optimizer_class: type[torch.optim.Optimizer], grads: list[torch.Tensor], **options: object) -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.ones_like(grads[0]))
    optimizer = optimizer_class([parameter], **options)  # type: ignore[call-arg]
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(5, 2, 3), (5, 3), (7,), ()])
def test_power_of_one_half_is_adamw(shape):
    options = {"lr": 0.01, "betas": BETAS, "weight_decay": 0.1}
    ours = after(Padam, gradients(*shape), power=0.5, **options)
    torch.testing.assert_close(ours, after(torch.optim.AdamW, gradients(*shape), eps=0.0, **options))


@pytest.mark.parametrize("power", [0.0, 0.25, 0.4])
def test_formula(power):
    grads = gradients(5, 2, 3)
    p, m, v = torch.ones(5, 2, 3, dtype=torch.float64), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        m_hat, v_hat = m / (1 - BETAS[0] ** t), v / (1 - BETAS[1] ** t)
        mean_k = torch.stack([v_hat[:, k].mean() for k in range(2)])[None, :, None]
        p = p - 0.01 * (m_hat / (v_hat**power * mean_k ** (0.5 - power)) + 0.1 * p)
    ours = after(Padam, grads, power=power, lr=0.01, betas=BETAS, weight_decay=0.1)
    torch.testing.assert_close(ours, p)


def test_a_copy_moves_as_if_alone():
    """A copy's step depends neither on the scale of its own gradients nor on the other's."""
    grads = gradients(5, 2, 3)
    scaled = [g * torch.tensor([1.0, 1000.0], dtype=torch.float64)[:, None] for g in grads]
    torch.testing.assert_close(after(Padam, scaled), after(Padam, grads))
    torch.testing.assert_close(after(Padam, [g[:, :1] for g in grads]), after(Padam, grads)[:, :1])
    doubled = [g * torch.linspace(1, 2, 5, dtype=torch.float64)[:, None, None] for g in grads]
    assert not torch.allclose(after(Padam, doubled), after(Padam, grads)), "scales within a copy count"


def test_a_copy_without_gradient_rests():
    """The corners' steps leave copies out: zero gradients from the start move nothing and make no NaN."""
    grads = [g * torch.tensor([1.0, 0.0], dtype=torch.float64)[:, None] for g in gradients(5, 2, 3)]
    moved = after(Padam, grads)
    assert torch.equal(moved[:, 1], torch.ones(5, 3, dtype=torch.float64))
    assert (moved[:, 0] != 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"power": 0.6}, r"power is 0\.6"), ({"lr": -1.0}, r"lr is -1\.0"), ({"betas": (0.9, 1.0)}, "betas are")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Padam([torch.nn.Parameter(torch.ones(2))], **options)


def trainer(tmp_path, tokenizer, optimizers=(None, None), **fields):
    args = CLPTrainingConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=4, num_reference_samples=4, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", **fields)  # fmt: skip
    rewards = {name: lambda completions, **columns: [float(len(text)) for text in completions] for name in ("a", "b")}
    model = clp.get_clp_model(tiny_llama(0), clp.CLPConfig(rewards=["a", "b"]))
    rows = [{"prompt": text} for text in ("the cat", "a dog", "read all", "red file")]
    return CLPTrainer(model, args, rows, processing_class=tokenizer, reward_funcs=rewards, optimizers=optimizers)


def test_trainer_takes_it_by_power(tmp_path, tokenizer):
    training = trainer(tmp_path, tokenizer, adam_power=0.25, learning_rate=3e-3, adam_beta1=0.8)
    training.train()
    optimizer = training.optimizer.optimizer  # accelerate's wrapper
    assert isinstance(optimizer, Padam)
    assert all(group["power"] == 0.25 and group["betas"] == (0.8, 0.999) for group in optimizer.param_groups)
    assert optimizer.param_groups[0]["initial_lr"] == 3e-3
    assert any(parameter.abs().max() > 0 for parameter in training.model.parameters() if parameter.requires_grad)


def test_trainer_takes_adamw_by_default(tmp_path, tokenizer):
    training = trainer(tmp_path, tokenizer)
    training.create_optimizer()
    assert isinstance(training.optimizer, torch.optim.AdamW)


def test_config_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"adam_power is 0\.7"):
        CLPTrainingConfig(output_dir=str(tmp_path), adam_power=0.7)
    with pytest.raises(ValueError, match=r"adam_power is 0\.25, but optim sgd is not AdamW"):
        CLPTrainingConfig(output_dir=str(tmp_path), adam_power=0.25, optim="sgd")


def test_an_optimizer_beside_the_power_is_refused(tmp_path, tokenizer):
    given = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match=r"adam_power is 0\.25, but an optimizer was given"):
        trainer(tmp_path, tokenizer, (given, None), adam_power=0.25)
