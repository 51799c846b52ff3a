"""Measures tiles for the launchers on this machine's GPU, and writes the user's table of them (`clp env --tune`).

For each key that the calls of a layer look up: from the launcher's own tile, step by step to the fastest neighbour (one
field halved or doubled), while a step gains. A candidate counts only after its output was compared with the reference.
Where several numbers of rows have one tile, what is compared is the geometric mean of their times.
"""

from __future__ import annotations

import datetime
import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from clp_kernels import launch_configs, launch_tables
from clp_kernels.launch_configs import KERNELS, Key, Tile, forced, observed
from clp_kernels.launch_tables import Entry, Table
from clp_kernels.select import CPP_DTYPES
from clp_kernels.tuning_cases import Case, OperatorShape, cases

ROWS = (16, 128, 1024, 4096)
MIN_GAIN = 0.03  # of the time: what less a step gains is taken for noise
MAX_STEPS = 5
Measure = Callable[[Mapping[Tile, Callable[[], object]]], dict[Tile, float]]  # seconds of each, measured in turn


def common_shapes(dtype: torch.dtype, deltas_dtype: torch.dtype) -> list[OperatorShape]:
    """Return the shapes that are measured where none are named: K = 2 beside layers of 2048 and 4096 features."""
    linear = [(2048, 2048), (4096, 4096), (11008, 4096)]
    shapes = [OperatorShape("mixed_linear", dtype, deltas_dtype, 2, N, D) for N, D in linear]
    shapes.append(OperatorShape("low_rank_linear", dtype, deltas_dtype, 32, 4096, 4096))
    return [*shapes, OperatorShape("mixed_norm", dtype, deltas_dtype, 2, 1, 4096)]


def find_gpu() -> torch.device:
    """Return the GPU that is measured on.

    Raises:
        ValueError: there is none that Triton runs on; with what is needed.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            f"tuning measures on a GPU, and torch sees none (torch {torch.__version__}, CUDA "
            f"{torch.version.cuda or 'no'}): run it where the GPU is, with its driver and a CUDA build of torch"
        )
    from clp_kernels.backend import missing_reason

    if reason := missing_reason("triton"):
        raise ValueError(f"tuning measures Triton's kernels: {reason}")
    if importlib.import_module("clp_kernels.launch_triton").INTERPRETED:
        raise ValueError("tuning measures compiled kernels: leave out TRITON_INTERPRET=1")
    return torch.device("cuda", torch.cuda.current_device())


def tune(
    shapes: Sequence[OperatorShape],
    row_counts: Sequence[int],
    device: torch.device,
    measure: Measure,
    report: Callable[[str], object] = print,
) -> Table:
    """Measure tiles for `shapes` and write the user's table of `device` after each of them.

    Entries of an earlier table stay where they hold for this Triton and were not measured again. A key whose own tile
    is the fastest gets no entry, and loses an earlier one.

    Args:
        shapes: operators and sizes of layers.
        row_counts: numbers of rows; each stands for those up to the next power of two.
        device: a GPU, as `find_gpu` returns it.
        measure: the clock, as `tuning_clock.GPUClock(device)`.
        report: called with a line for each key, and with the path of the table.

    Raises:
        ValueError: no shapes or rows, rows or sizes below 1, a dtype that the kernels do not take, or
            (launch_tables.LaunchTableError) an earlier table that cannot be used.
    """
    name = launch_configs.device_name(device)
    if name is None:
        raise ValueError(f"{device} has no tables: they are for GPUs")
    if not shapes:
        raise ValueError("no shapes to measure: the model has no layer that calls a Triton kernel of its own")
    for shape in shapes:
        if min(shape.K, shape.N, shape.D) < 1:
            raise ValueError(f"{shape} has a size below 1")
        for dtype in (shape.dtype, shape.deltas_dtype):
            if dtype not in CPP_DTYPES:
                raise ValueError(f"{shape.operator} of {dtype}: the kernels take {', '.join(map(str, CPP_DTYPES))}")
    if not row_counts or min(row_counts) < 1:
        raise ValueError(f"rows are {list(row_counts)}, expected one number or more, each at least 1")
    path = launch_tables.user_path(name)
    earlier = launch_tables.read(path, name)
    version = launch_tables.triton_version()
    entries = dict(earlier.entries) if earlier is not None and earlier.triton == version else {}
    for shape in shapes:
        for key, found in _by_key(cases(shape, row_counts, device)).items():
            entry = _tune_key(key, [_Call(case) for case in found], measure, report)
            entries.pop(key, None)
            if entry is not None:
                entries[key] = entry
        date = datetime.date.today().isoformat()
        table = Table(name, date, torch.__version__, version, dict(entries))
        launch_tables.write(path, table)
        launch_configs.forget()
    report(f"{len(entries)} tiles in {path}")
    return table


def neighbours(kernel: str, tile: Tile) -> Iterator[Tile]:
    """Yield the tiles that differ from `tile` in one step of one field, within the kernel's limits."""
    for field, (smallest, largest) in KERNELS[kernel].fields.items():
        value = getattr(tile, field)
        for other in (value - 1, value + 1) if field == "num_stages" else (value // 2, value * 2):
            if smallest <= other <= largest:
                yield replace(tile, **{field: other})


class _Call:
    """A case with what it should return, and how far off that it may be.

    Twice the reference's own error in its dtype, the spacing of the rows' dtype at the largest value (for 16-bit rows
    that bounds what TF32, or a mix rounded as an operand, loses), and a float32 sum's walk.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.exact = case.reference(torch.float64 if case.dtype == torch.float32 else torch.float32)
        size, roundoff = self.exact.abs(), torch.finfo(case.dtype).eps
        own = (case.reference(None) - self.exact).abs().max().item()
        walk = torch.finfo(torch.float32).eps * case.num_terms**0.5 * size.mean().item()
        self.budget = 2 * own + roundoff * size.max().item() + walk

    def takes(self, key: Key, tile: Tile) -> bool:
        """Return whether the call runs with `tile` and returns what it should, in every element."""
        launch_error: type[Exception] = importlib.import_module("clp_kernels.launch_triton").LAUNCH_ERROR
        try:
            with _unwritten_is_nan(), forced(key, tile):
                output = self.case.run()
        except launch_error:
            return False
        return (output - self.exact).abs().max().item() <= self.budget  # NaN is not


@contextmanager
def _unwritten_is_nan() -> Iterator[None]:
    """Fill memory that nothing has written with NaN: else what an earlier candidate left there would pass."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not deterministic, which is not the point
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warns)
            torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def _by_key(found: Iterator[Case]) -> dict[Key, list[Case]]:
    """Run each case once, and return the cases that look up each key."""
    by_key: dict[Key, list[Case]] = {}
    for case in found:
        with observed() as tiles:
            case.run()
        for key in tiles:
            by_key.setdefault(key, []).append(case)
    return by_key


def _tune_key(key: Key, calls: Sequence[_Call], measure: Measure, report: Callable[[str], object]) -> Entry | None:
    """Return the fastest tile that was found, None where that is the launcher's own."""
    with forced(key, None), observed() as tiles:
        calls[0].case.run()
    own = best = tiles[key]
    if not all(call.takes(key, own) for call in calls):
        report(f"{_title(key)}: not measured, the launcher's own tile is off the reference: {_shown(key, own)}")
        return None
    tried, wrong = {own}, 0
    for _ in range(MAX_STEPS):
        new = [tile for tile in neighbours(key.kernel, best) if tile not in tried]
        tried |= set(new)
        right = [tile for tile in new if all(call.takes(key, tile) for call in calls)]
        wrong += len(new) - len(right)
        seconds = _seconds(key, calls, [best, *right], measure)
        fastest = min(seconds, key=seconds.__getitem__)
        if seconds[fastest] > (1 - MIN_GAIN) * seconds[best]:
            break
        best = fastest
    what = f"{_title(key)}: {len(tried) - 1} tried, {wrong} left out as too large or wrong"
    seconds = _seconds(key, calls, [own, best], measure)  # once more: the fastest of many is so in part by chance
    if seconds[best] > (1 - MIN_GAIN) * seconds[own]:
        report(f"{what}; none is faster than {_shown(key, own)}, {1e6 * seconds[own]:.1f} us")
        return None
    gain = 1 - seconds[best] / seconds[own]
    times = f"{1e6 * seconds[own]:.1f} -> {1e6 * seconds[best]:.1f} us, {gain:.0%} less"
    report(f"{what}; {times}, with {_shown(key, best)} for {_shown(key, own)}")
    return Entry(best, 1e6 * seconds[best], 1e6 * seconds[own])


def _seconds(key: Key, calls: Sequence[_Call], tiles: Sequence[Tile], measure: Measure) -> dict[Tile, float]:
    """Return the time of each tile, the geometric mean over the calls."""

    def launch(call: _Call, tile: Tile) -> Callable[[], object]:
        def run() -> object:
            with forced(key, tile):
                return call.case.run()

        return run

    logs = dict.fromkeys(tiles, 0.0)
    for call in calls:
        for tile, seconds in measure({tile: launch(call, tile) for tile in logs}).items():
            logs[tile] += math.log(seconds) / len(calls)
    return {tile: math.exp(log) for tile, log in logs.items()}


def _title(key: Key) -> str:
    rows = "any number of rows" if key.max_rows is None else f"up to {key.max_rows} rows"
    return f"{key.kernel} {key.dtype}/{key.deltas_dtype} K={key.K} N={key.N} D={key.D}, {rows}"


def _shown(key: Key, tile: Tile) -> str:
    return " ".join(f"{name}={getattr(tile, name)}" for name in KERNELS[key.kernel].fields)
