import random
from importlib.resources import files
from pathlib import Path

import pytest

from dvpo_service.data.arithmetic import FAMILIES, DemoTask, main, make_demo, make_problem, write_demo
from dvpo_service.data.dataset import load_prompts

SHIPPED = Path(str(files("dvpo_service.data") / "shipped"))


def test_shipped_files_are_what_the_generator_makes(tmp_path):
    for path in write_demo(DemoTask(), tmp_path):
        assert (SHIPPED / path.name).read_bytes() == path.read_bytes()
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) < 500_000


def test_shipped_splits_load_are_disjoint_and_right():
    task = DemoTask()
    splits = {s: load_prompts([SHIPPED / f"demo-{s}.jsonl"], name=s) for s in ("train", "val", "ood")}
    assert {s: len(d) for s, d in splits.items()} == {
        "train": task.num_train,
        "val": task.num_val,
        "ood": task.num_ood,
    }
    assert len(frozenset().union(*(d.keys() for d in splits.values()))) == sum(map(len, splits.values()))
    for prompt in (p for d in splits.values() for p in d.prompts):
        value = eval(prompt.messages[0]["content"].rstrip("="))  # noqa: S307
        assert value == int(prompt.answer) >= 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("large", [None, (100, 149)])
def test_families(family, large):
    rng = random.Random(0)
    for _ in range(200):
        prompt, answer = make_problem(family, (0, 20), large, rng)
        assert eval(prompt.rstrip("=")) == int(answer) >= 0  # noqa: S307


def test_impossible_tasks_are_refused():
    with pytest.raises(ValueError, match="only 4 distinct problems, 5 wanted"):
        make_demo(DemoTask(families="add2", lo=0, hi=1, num_train=5, num_val=0))
    with pytest.raises(ValueError, match="unknown family 'add9'; known: add2"):
        make_demo(DemoTask(families="add9"))


def test_command_line(tmp_path, capsys):
    main(["--out", str(tmp_path), "--families", "add3", "--hi", "30", "--num-train", "50", "--seed", "7"])
    train = (tmp_path / "demo-train.jsonl").read_text().splitlines()
    assert len(train) == 50
    assert train[0].count("+") == 2
    assert "demo-ood.jsonl" in capsys.readouterr().out
