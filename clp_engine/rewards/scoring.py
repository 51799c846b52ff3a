"""Which reward function scores which weight, and their scores as one array.

Shape suffixes: B completions, R rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

RewardFunction = Callable[..., Sequence["float | None"]]
Rewards = Mapping[str, RewardFunction] | Sequence[RewardFunction]


def resolve(reward_funcs: Rewards, names: Sequence[str]) -> dict[str, RewardFunction]:
    """Return `{name: function}` in the order of `names`, the same as `{name: reward_funcs[name] for name in names}`.

    A list is matched by each function's `__name__`, never by position: the order of the weights is the config's.

    Raises:
        TypeError: an entry is not callable.
        ValueError: a name has no function, a function has no name among `names`, or two functions share one.
    """
    by_name: dict[str, RewardFunction] = {}
    if isinstance(reward_funcs, Mapping):
        by_name.update(reward_funcs)
    else:
        for position, function in enumerate(reward_funcs):
            name = getattr(function, "__name__", None)
            if not isinstance(name, str):
                raise TypeError(
                    f"reward_funcs[{position}] ({function!r}) has no __name__, and a list of rewards is matched "
                    f"by name: give a dict with the keys {list(names)}"
                )
            if name in by_name:
                raise ValueError(f"reward_funcs holds {name!r} twice: give a dict with the keys {list(names)}")
            by_name[name] = function
    for name, function in by_name.items():
        if not callable(function):
            raise TypeError(f"the reward {name!r} is not callable: {function!r}")
    missing = [name for name in names if name not in by_name]
    extra = [name for name in by_name if name not in names]
    if missing or extra:
        raise ValueError(
            f"reward_funcs has {sorted(by_name)}, the config's rewards are {list(names)}: missing {missing}, not among "
            f"them {extra}. Rename the functions or give a dict with the config's names"
        )
    return {name: by_name[name] for name in names}


def score(
    reward_funcs: Mapping[str, RewardFunction],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> np.ndarray:
    """Return the rewards of every completion, float64 [B, R], R in the order of `reward_funcs`.

    Equivalent: `np.array([f(prompts, completions, completion_ids, **columns) for f in reward_funcs.values()]).T`, with
    TRL's keyword call. None and NaN mean "does not apply" to that completion and come out as NaN.

    Args:
        reward_funcs: as `resolve` returns it.
        prompts: B strings or lists of messages.
        completions: B strings or lists of messages.
        completion_ids: B lists of token ids.
        columns: the data set's other columns, B values each.

    Raises:
        ValueError: a reward returns another length than B, an infinite value, something that is not a number, or
            applies to no completion at all; a column has another length than B. The message names it.
    """
    columns = dict(columns or {})
    count = len(completions)
    given = {"prompts": prompts, "completion_ids": completion_ids, **columns}
    for name, values in given.items():
        if len(values) != count:
            raise ValueError(f"{name!r} holds {len(values)} values for {count} completions")
    scores_BR = np.full((count, len(reward_funcs)), np.nan, dtype=np.float64)
    for column, (name, function) in enumerate(reward_funcs.items()):
        values = function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        scores_BR[:, column] = _checked(name, values, count)
    return scores_BR


def _checked(name: str, values: Any, count: int) -> list[float]:
    """Return the values of one reward as floats, None as NaN, after the checks that `score` documents."""
    if not hasattr(values, "__len__") or isinstance(values, str | bytes | Mapping):
        raise ValueError(f"the reward {name!r} returned a {type(values).__name__}; a list of {count} numbers is needed")
    if len(values) != count:
        raise ValueError(
            f"the reward {name!r} returned {len(values)} values for {count} completions; give each a number or None"
        )
    numbers: list[float] = []
    for position, value in enumerate(values):
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the reward {name!r} returned {value!r} for completion {position}: no number") from error
        if math.isinf(number):
            raise ValueError(f"the reward {name!r} is {number} for completion {position}: give a finite number or None")
        numbers.append(number)
    if count and all(math.isnan(number) for number in numbers):
        raise ValueError(
            f"the reward {name!r} is None or NaN for all {count} completions: it applies to nothing here. Check that "
            "the data set has the columns it reads"
        )
    return numbers
