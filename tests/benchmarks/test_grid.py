"""The grid's file: rows are kept, measured once, and told as they are."""

import json

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks.kasmina import grid
from benchmarks.kasmina.plot import draw_growth
from benchmarks.kasmina.plot import draw_map
from benchmarks.kasmina.rows import GROUPS
from benchmarks.kasmina.rows import Cell
from benchmarks.kasmina.rows import append_row
from benchmarks.kasmina.rows import read_rows

SHAPES = [(32, 64, 1, 4), (32, 64, 4, 4), (512, 64, 4, 4), (512, 768, 16, 16)]


def made_up(shape):
    cell = Cell({"loop": 3.0, "bmm": 2.0 + shape[2], "vmap": 4.0}, 0.5, 1e-3)
    memory = {"ours": 1.0, "loop": 2.0, "bmm": 3.0}
    return grid.Row(shape, dict.fromkeys(GROUPS, cell), memory, 1e11, 1e10, grid.made_by())


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "grid.jsonl"
    calls = []

    def stopped(shape):
        calls.append(shape)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made_up(shape)

    with pytest.raises(KeyboardInterrupt):
        grid.fill(path, SHAPES, stopped)
    assert [row.shape for row in read_rows(path)] == SHAPES[:2]
    with path.open("a") as file:
        file.write('{"shape": [512, 64')  # a line that a kill has cut off
    assert [row.shape for row in read_rows(path)] == SHAPES[:2]
    assert grid.fill(path, SHAPES, stopped) == []
    assert calls == [*SHAPES[:3], *SHAPES[2:]], "each is measured once, the stopped one again"
    assert read_rows(path) == [made_up(shape) for shape in SHAPES]
    assert all(json.loads(line) for line in path.read_text().splitlines())
    before = path.read_bytes()
    assert grid.fill(path, SHAPES, stopped) == [] and len(calls) == 5
    assert path.read_bytes() == before


def test_no_shape_is_begun_after_the_deadline(tmp_path):
    path = tmp_path / "grid.jsonl"
    assert grid.fill(path, SHAPES, made_up, deadline=0.0) == SHAPES
    assert read_rows(path) == []


def test_rows_of_another_build_are_refused(tmp_path):
    path = tmp_path / "grid.jsonl"
    append_row(path, made_up(SHAPES[0]))
    grid.check_made_by(read_rows(path))
    path.write_text(path.read_text().replace("torch ", "torch 1."))
    with pytest.raises(ValueError, match="made by torch 1.*another --out"):
        grid.check_made_by(read_rows(path))


def test_every_shape_is_measured_or_left_out_with_a_reason():
    measured, left_out = grid.measured_shapes(), grid.left_out()
    assert len(set(measured)) == len(measured) and not set(measured) & set(left_out)
    assert len(measured) + len(left_out) == 3 * 3 * 5 * 3 + 1  # and the one that stands for all
    assert (8192, 4096, 1, 64) in measured and (512, 768, 256, 4) in measured
    assert left_out[512, 64, 256, 4] == "more seeds than features"
    assert "GiB" in left_out[8192, 4096, 256, 64]
    text = grid.page([], measured)
    assert "512, 64, 256, 4" in text and "Not measured yet: 125 shapes" in text


def test_the_page_tells_the_best_alternative():
    rows = [made_up(shape) for shape in SHAPES]
    text = grid.page(rows, [])
    assert "| 32, 64, 1, 4 | 3.00 loop, 50% |" in text.replace("3.00 bmm", "3.00 loop")
    assert "| 512, 768, 16, 16 | 3.00 loop, 50% |" in text
    assert "1 / 2 |" in text and "not measured yet" not in text.lower()
    for draw in (draw_map, draw_growth):
        draw(rows, Figure())


def test_one_shape_is_really_measured():
    before = torch.get_num_threads()
    row = grid.measure(SHAPES[1], grid.Effort(rounds=1, compiled=False))
    assert torch.get_num_threads() == before
    assert list(row.groups) == list(GROUPS)
    for cell in row.groups.values():
        assert cell.ratios.keys() == {"loop", "bmm", "vmap"} and cell.median_s >= 0
    assert row.megabytes.keys() == {"ours", "loop", "bmm", "vmap"}
