"""The ablations in small: every row of the grid makes a model, drawn pairs are what they are said to
be, a run writes its tables and goes on after a kill."""
import json

import numpy as np
import pytest

for module in ("timm", "torchvision", "matplotlib"):
    pytest.importorskip(module)

import ablations
import data
import train_imagenet
import train_jump
from data import builtin
from helpers import run_script

ROWS = [(task, *row) for task, rows in ablations.GRID.items() for row in rows]
PICTURES = [data.Pairs("val").draw(i) for i in range(200)]


def ids_of(row):
    return f"{row[1]} {row[2]}"


@pytest.mark.parametrize("row", ROWS, ids=ids_of)
def test_every_row_is_a_model_of_its_own_data(row):
    task, _, _, _, made = row
    model = ablations.build(**{**ablations.SHARED[task], **made})
    images, labels = ablations.batch_of(task, "train", range(3))
    logits = model(images)
    assert logits.shape == (3, ablations.SHARED[task]["num_classes"])
    assert images.isfinite().all() and 0 <= labels.min() and labels.max() < logits.shape[1]
    logits.sum().backward()


def test_rows_of_a_table_differ_and_equal_rows_run_once():
    for number in {row[1] for row in ROWS}:
        made = [str(ablations.jobs_of(task, row[-1], False)) for task, *row in ROWS if row[0] == number]
        assert len(set(made)) == len(made) > 1
    jobs = [str(ablations.jobs_of(task, row[-1], False)[0]) for task, *row in ROWS]
    assert len(set(jobs)) == 11 + 14


# ---- Drawn pairs ---------------------------------------------------------------------------------

def test_a_pair_follows_from_its_split_and_number():
    forward = [data.Pairs("train").draw(i) for i in range(20)]
    pairs = data.Pairs("train")
    for i in reversed(range(20)):
        image, label = pairs.draw(i)
        assert (image == forward[i][0]).all() and label == forward[i][1]
    assert not any((forward[i][0] == PICTURES[i][0]).all() for i in range(20))


def fields_of_pair(image):
    """The two fields with the most red, beyond blue, as (row, column), left one first."""
    red = image[0, 1:31, 1:31] - image[2, 1:31, 1:31]
    mass = red.reshape(3, 10, 3, 10).sum((1, 3))            # of each field
    two = np.argsort(np.ravel(mass))[-2:]
    return sorted([(n // 3, n % 3) for n in two.tolist()], key=lambda place: place[1])


def test_the_label_says_which_of_the_two_is_above():
    right = 0
    for image, label in PICTURES:
        left, other = fields_of_pair(image)
        right += data.Pairs.classes[label].endswith("above") == (left[0] < other[0])
    assert right > 0.95 * len(PICTURES)
    assert len({label for _, label in PICTURES}) == len(data.Pairs.classes)


def test_the_label_says_which_shape_the_left_one_is(monkeypatch):
    nothing = {name: lambda u, v: np.zeros(u.shape, bool) for name in data.Scenes.shapes}
    for name, shape in data.Scenes.shapes.items():
        monkeypatch.setattr(builtin.Scenes, "shapes", {**nothing, name: shape})
        seen = []
        for i, (image, label) in enumerate(PICTURES[:60]):
            row, column = fields_of_pair(image)[0]
            only, same = data.Pairs("val").draw(i)
            assert same == label
            field = only[0, 1:31, 1:31].reshape(3, 10, 3, 10)[row, :, column]
            seen.append((field.mean() > 0.05) == data.Pairs.classes[label].startswith(name))
        assert np.mean(seen) > 0.9


# ---- Runs ----------------------------------------------------------------------------------------

@pytest.fixture
def tiny(monkeypatch):
    """Two tables of two rows, of which one stands in both; two steps."""
    monkeypatch.setitem(ablations.GRID, "pairs", [*ablations.PAIRS[:2], *ablations.PAIRS[8:10]])
    monkeypatch.setitem(ablations.GRID, "cells", [])
    monkeypatch.setattr(ablations, "QUICK", {"tests": 100, "steps": 2, "batch": 4})


def test_a_run_writes_tables_and_goes_on(tiny, tmp_path, capsys):
    argv = ["--ablations", "--quick", "--out", tmp_path]
    run_script(train_imagenet, *argv)
    assert "3 runs to do" in capsys.readouterr().out
    lines = (tmp_path / "ablations.jsonl").read_text().splitlines()
    first = [json.loads(line) for line in lines]
    assert len(first) == 3 and all(0 <= line["top1"] <= 100 for line in first)
    table = (tmp_path / "ablations.md").read_text()
    assert "the order means nothing" in table
    assert "| Pool_col |" in table and "| 81.3 |" in table
    assert (tmp_path / "ablations.png").stat().st_size > 5000
    (tmp_path / "ablations.jsonl").write_text("\n".join(lines[:2]) + "\n")
    run_script(train_imagenet, *argv)                       # as after a kill
    assert "1 runs to do" in capsys.readouterr().out
    again = [json.loads(line) for line in (tmp_path / "ablations.jsonl").read_text().splitlines()]
    assert [line["top1"] for line in again] == [line["top1"] for line in first]
    assert (tmp_path / "ablations.md").read_text() == table


def test_a_run_follows_from_its_seed(tiny):
    job = ablations.jobs_of("pairs", {"model": "fastvim_tiny"}, True)[0]
    loss = [ablations.train({**job, "seed": seed})["loss"] for seed in (1, 1, 2)]
    assert loss[0] == loss[1] != loss[2]


def test_other_options_are_refused_and_the_help_names_it(capsys):
    for script in (train_imagenet, train_jump):
        for argv in (["--quick"], ["--ablations", "--lr", "1"], ["--ablations", "--depth", "3"]):
            with pytest.raises(SystemExit):
                run_script(script, *argv)
            assert "--ablations goes with --quick and --out alone" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            run_script(script, "--help")
        said = capsys.readouterr().out
        assert "--ablations" in said and "--quick" in said


def test_rows_are_told_apart_where_no_seed_lies_among_the_others():
    rows = [("a", 80.0, [60, 61, 62]), ("b", 70.0, [50, 51, 59]), ("c", 75.0, [58, 63, 64]),
            ("d", 70.0, [1, 2, 3]), ("e", 60.0, [70, 71, 72])]
    # as there: ab, ad, cd; opposite: ae, be, ce, de; not told apart: ac, bc; bd: equal in the paper
    assert ablations.verdict(rows) == (3, 4, 2)
    assert "| partly | 3, 4, 2 |" in ablations.markdown({"6": rows})
