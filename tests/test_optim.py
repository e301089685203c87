from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from toolkit.config.schema import OptimConfig, TrainConfig
from toolkit.engine.deepspeed.optimizers import build_optimizer
from toolkit.mask.layer_mask import ParameterGroup
from toolkit.optim.groups import build_scheduler, current_rate


@pytest.mark.parametrize(("scheduler", "last"), [("linear", 1 / 90), ("cosine", 0.0003), ("constant_with_warmup", 1.0)])
def test_the_rate_rises_over_a_tenth_and_then_follows_the_recipe(scheduler: str, last: float) -> None:
    train = TrainConfig(learning_rate=1.0, scheduler=scheduler)
    optimizer = build_optimizer({"w": nn.Parameter(torch.zeros(1))}, [ParameterGroup(("w",))], train, OptimConfig())
    schedule = build_scheduler(optimizer, train, total_steps=100)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:11] == pytest.approx([step / 10 for step in range(11)])
    assert rates[-1] == pytest.approx(last, abs=1e-4)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("total", [1, 2, 7, 120, 999])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.33, 1.0])
def test_rates_are_those_of_transformers_to_the_bit(scheduler: str, total: int, ratio: float) -> None:
    from transformers import get_scheduler

    def factors(schedule: object) -> list[float]:
        assert isinstance(schedule, LambdaLR)
        return [schedule.lr_lambdas[0](step) for step in range(total + 3)]

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    ours = build_scheduler(optimizer, TrainConfig(scheduler=scheduler, warmup_ratio=ratio), total)
    theirs = get_scheduler(scheduler, optimizer, num_warmup_steps=math.ceil(ratio * total), num_training_steps=total)
    assert factors(ours) == factors(theirs)


@pytest.mark.slow
def test_a_run_without_adapters_loads_no_library_for_them() -> None:
    code = "import sys, toolkit.training.run; sys.exit(bool({'peft', 'bitsandbytes', 'networkx'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("total", "ratio", "expected"), [(180, 0.1, 18), (5, 0.1, 1), (10, 0, 0), (3, 1, 3)])
def test_warmup_is_rounded_up(total: int, ratio: float, expected: int) -> None:
    train = TrainConfig(warmup_ratio=ratio, scheduler="constant_with_warmup")
    schedule = build_scheduler(torch.optim.SGD([torch.zeros(1)], lr=1.0), train, total)
    assert isinstance(schedule, LambdaLR)
    (factor_at,) = schedule.lr_lambdas
    assert sum(factor_at(step) < 1 for step in range(total)) == expected


def test_recipe_reaches_the_optimizer() -> None:
    train, optim = TrainConfig(learning_rate=3e-4, weight_decay=0.2), OptimConfig(betas=(0.8, 0.95), eps=1e-6)
    groups = [ParameterGroup(("w",))]
    group = build_optimizer({"w": nn.Parameter(torch.zeros(1, 1))}, groups, train, optim).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (3e-4, 0.2, (0.8, 0.95), 1e-6)


def test_groups_have_their_own_settings_and_vectors_do_not_decay_by_default() -> None:
    parameters = {name: nn.Parameter(torch.zeros(*shape)) for name, shape in
                  {"m": (2, 2), "v": (2,), "gm": (2, 2), "gv": (2,), "rate": (3, 3)}.items()}  # fmt: skip
    groups = [
        ParameterGroup(("m", "v")),
        ParameterGroup(("gm", "gv"), learning_rate=1e-3, weight_decay=0.5),
        ParameterGroup(("rate",), learning_rate=1e-6),
    ]
    train = TrainConfig(learning_rate=1e-5, weight_decay=0.1)
    optimizer = build_optimizer(parameters, groups, train, OptimConfig())
    names = {id(parameter): name for name, parameter in parameters.items()}
    settings = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert settings == {
        "m": (1e-5, 0.1), "v": (1e-5, 0.0), "gm": (1e-3, 0.5), "gv": (1e-3, 0.5), "rate": (1e-6, 0.1),
    }  # fmt: skip


def test_the_logged_rate_is_the_recipes_whatever_the_first_group_has() -> None:
    train = TrainConfig(learning_rate=1e-5)
    groups = [ParameterGroup(("w",), learning_rate=1e-2)]
    optimizer = build_optimizer({"w": nn.Parameter(torch.zeros(1))}, groups, train, OptimConfig())
    schedule = build_scheduler(optimizer, train, total_steps=100)
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert current_rate(schedule, train) == pytest.approx(1e-5)
    assert schedule.get_last_lr()[0] == pytest.approx(1e-2)
