"""Tuning from candidates to a launch that takes what was chosen; the times alone are made up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_support import DEVICE, F16, F32

from clp_kernels import launch_configs, launch_tables, low_rank_linear, mixed_linear, tuning
from clp_kernels import mixed_linear_triton as launchers
from clp_kernels.launch_configs import KERNELS, Key, Tile, observed
from clp_kernels.tuning_cases import OperatorShape
from clp_kernels.tuning_clock import interleaved_medians

NAME = "Made up 9000"
LINEAR = OperatorShape("mixed_linear", F32, F32, 2, 20, 33)


@pytest.fixture(autouse=True)
def own_tables(monkeypatch, tmp_path):
    monkeypatch.setattr(launch_configs, "device_name", lambda device: NAME)
    monkeypatch.setattr(launch_tables, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setenv("CLP_ENGINE_CACHE", str(tmp_path))
    launch_configs.forget()
    yield
    launch_configs.forget()


class Clock:
    """Takes a tile's cost for its time, after a launch with the last of them."""

    def __init__(self, cost) -> None:
        self.cost = cost

    def __call__(self, runs):
        *_, (tile, run) = runs.items()
        with observed() as tiles:
            run()
        assert tile in tiles.values()
        return {tile: self.cost(tile) for tile in runs}


def towards(wanted: Tile):
    """A cost that each step towards a tile halves."""

    def cost(tile: Tile) -> float:
        steps = [abs(getattr(tile, f).bit_length() - getattr(wanted, f).bit_length()) for f in vars(wanted)]
        return 1e-5 * 2 ** sum(steps)

    return cost


def tuned(shapes, rows, cost, lines=None):
    return tuning.tune(shapes, rows, torch.device(DEVICE), Clock(cost), (lines if lines is not None else []).append)


def call(M=16, **how):
    """The tiles that launches of LINEAR's forward look up, with y."""
    g = torch.Generator().manual_seed(0)
    N, D = LINEAR.N, LINEAR.D
    arguments = (torch.randn(s, generator=g).to(DEVICE) for s in ((64, D), (N, D), (N, 2, D), (64, 2)))
    x, base, deltas, c = arguments
    with observed() as tiles:
        y = mixed_linear(x[:M], base, deltas, c[:M], backend="triton", **how)
    return tiles, y


def test_the_launcher_takes_what_was_chosen():
    (key, own), *rest = call()[0].items()
    assert not rest
    wanted = replace(own, outs=own.outs * 2, reduced=own.reduced // 2, num_warps=own.num_warps // 2)
    lines: list[str] = []
    table = tuned([LINEAR], [16], towards(wanted), lines)
    assert key in table.entries
    assert table.entries[key].tile == wanted
    assert table.entries[key].microseconds == pytest.approx(10)
    assert table.entries[key].heuristic_microseconds == pytest.approx(80)
    assert any("80.0 -> 10.0 us" in line for line in lines)
    assert launch_tables.read(launch_tables.user_path(NAME), NAME) == table
    tiles, y = call()
    assert tiles == {key: wanted}
    assert call(M=17)[0] != tiles  # another bucket, not measured
    launch_tables.user_path(NAME).unlink()
    launch_configs.forget()
    tiles, expected = call()
    assert tiles == {key: own}
    torch.testing.assert_close(y, expected)


def test_one_batch_invariant_tile_serves_every_number_of_rows():
    """A table of tiles by rows beside it, with another order of sums in each, must not reach these calls."""
    (key, own), *_ = call(batch_invariant=True)[0].items()
    assert key.max_rows is None
    wanted = replace(own, reduced=own.reduced // 2)
    table = tuned([LINEAR], [16, 32], towards(wanted))
    assert table.entries[key].tile == wanted
    by_rows = {16: replace(own, reduced=own.reduced * 2), 32: own, 64: wanted}
    entries = {key._replace(max_rows=M): replace(table.entries[key], tile=tile) for M, tile in by_rows.items()}
    launch_tables.write(launch_tables.user_path(NAME), replace(table, entries={**table.entries, **entries}))
    launch_configs.forget()
    rows = []
    for M in (1, 7, 16, 17, 33, 64):
        tiles, y = call(M, batch_invariant=True)
        assert tiles == {key: wanted}
        rows.append(y[0])
    assert all(torch.equal(row, rows[0]) for row in rows)
    assert [call(M)[0][key._replace(max_rows=M)] for M in by_rows] == list(by_rows.values())


def test_a_low_rank_row_keeps_its_bits_under_a_table_too():
    """The split of the shrink's sum follows the tile: theirs is one for every number of rows."""
    g = torch.Generator().manual_seed(0)
    sizes = ((64, 40), (24, 40), (5, 40), (24, 5), (64, 5))
    x, base, down, up, gates = (torch.randn(size, generator=g).to(DEVICE) for size in sizes)

    def run(M: int):
        with observed() as tiles:
            y = low_rank_linear(x[:M], base, down, up, gates[:M], backend="triton", batch_invariant=True)
        return tiles, y[0]

    keys = run(16)[0]
    assert {key.kernel for key in keys} == {"low_rank_linear.shrink", "low_rank_linear.expand"}
    tables = {}
    for key, own in keys.items():
        for M, reduced in ((None, 16), (16, 32), (32, 64), (64, 128)):
            tables[key._replace(max_rows=M)] = launch_tables.Entry(replace(own, reduced=reduced), 1.0, 2.0)
    about = (NAME, "2026-01-31", torch.__version__, launch_tables.triton_version())
    launch_tables.write(launch_tables.user_path(NAME), launch_tables.Table(*about, tables))
    launch_configs.forget()
    found = [run(M) for M in (1, 16, 17, 64)]
    assert all({tile.reduced for tile in tiles.values()} == {16} for tiles, _ in found)
    assert all(torch.equal(row, found[0][1]) for _, row in found)


def test_a_wrong_candidate_does_not_count(monkeypatch):
    """What is fastest, and leaves the last column unwritten, is a thousandth off or does not launch, gets no entry."""
    (key, own), *_ = call()[0].items()
    forward, launch_error = launchers.forward, launchers.check_tensors.__globals__["LAUNCH_ERROR"]

    def spoiled(x, *rest, **how):
        with observed() as tiles:
            y = forward(x, *rest, **how)
        tile = tiles.get(key, own)
        if tile.outs > own.outs:
            unwritten_M = torch.empty_like(y[:, 0])
            y[:, -1] = torch.where(unwritten_M.isnan(), unwritten_M, y[:, -1])  # else what lies there is right
        if tile.num_stages > own.num_stages:
            return y * 1.001
        if tile.num_warps < own.num_warps:
            raise launch_error
        return y

    monkeypatch.setattr(launchers, "forward", spoiled)
    monkeypatch.setattr(tuning, "MAX_STEPS", 1)
    lines: list[str] = []
    for wanted in ({"outs": own.outs * 2}, {"num_stages": own.num_stages + 5}, {"num_warps": own.num_warps // 2}):
        table = tuned([LINEAR], [16], towards(replace(own, **wanted)), lines)
        assert key not in table.entries
    assert any(line.startswith("mixed_linear.streams ") and "3 left out" in line for line in lines)


def test_a_step_within_the_noise_is_not_taken_and_an_earlier_entry_goes():
    (key, own), *_ = call()[0].items()
    better = replace(own, num_warps=own.num_warps * 2)
    other = key._replace(D=4096)
    table = tuned([LINEAR], [16], lambda tile: 1.0 if tile == better else 2.0)
    assert table.entries[key].tile == better
    launch_tables.write(
        launch_tables.user_path(NAME), replace(table, entries={**table.entries, other: table.entries[key]})
    )
    table = tuned([LINEAR], [16], lambda tile: 0.98 if tile == better else 1.0)
    assert set(table.entries) == {other}  # measured before, and not now


def test_every_kernel_of_the_table_is_measured():
    """Each name of KERNELS is looked up by a case, at sizes that give every form its turn."""
    half = {"dtype": F16, "deltas_dtype": F16}
    shapes = [
        (OperatorShape("mixed_linear", **half, K=2, N=17, D=24), [64, 1024]),
        (OperatorShape("low_rank_linear", F16, F32, 5, 17, 24), [64]),
        (OperatorShape("mixed_linear_logprob", **half, K=1, N=40, D=16), [64]),
        (OperatorShape("mixed_embedding", **half, K=2, N=9, D=40), [5]),
        (OperatorShape("mixed_norm", F16, F32, 2, 1, 40), [5]),
    ]
    looked_up: set[Key] = set()
    for shape, rows in shapes:
        for key, cases in tuning._by_key(tuning.cases(shape, rows, torch.device(DEVICE))).items():
            looked_up.add(key)
            with observed() as tiles:
                cases[0].run()
            assert all(tuning._Call(case).takes(key, tiles[key]) for case in cases), key
    assert {key.kernel for key in looked_up} == set(KERNELS)


def test_neighbours_stay_within_the_kernels_limits():
    smallest = Tile(**{name: limits[0] for name, limits in KERNELS["mixed_linear.streams"].fields.items()})
    assert len(list(tuning.neighbours("mixed_linear.streams", smallest))) == 5
    assert len(list(tuning.neighbours("mixed_norm", Tile(rows=4, reduced=128, num_warps=2)))) == 6


def test_what_cannot_be_tuned_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="operator is 'conv'"):
        tuned([replace(LINEAR, operator="conv")], [16], float)
    with pytest.raises(ValueError, match="size below 1"):
        tuned([replace(LINEAR, K=0)], [16], float)
    with pytest.raises(ValueError, match="no shapes"):
        tuned([], [16], float)
    with pytest.raises(ValueError, match=r"of torch\.float64: the kernels take torch\.float32"):
        tuned([replace(LINEAR, dtype=torch.float64)], [16], float)
    with pytest.raises(ValueError, match="rows are"):
        tuned([LINEAR], [], float)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="tuning measures on a GPU, and torch sees none"):
        tuning.find_gpu()


def test_rounds_are_interleaved_and_an_outlier_does_not_count():
    order: list[str] = []

    def seconds_of(run) -> float:
        run()
        if len(order) == 20:
            return 1000.0
        return {"a": 3.0, "b": 1.0, "c": 2.0}[order[-1]]

    found = interleaved_medians({name: lambda name=name: order.append(name) for name in "abc"}, seconds_of)
    assert found == {"a": 3.0, "b": 1.0, "c": 2.0}
    assert "".join(order[6:15]) == "abcbcacab"
