from importlib.resources import files
from pathlib import Path

import pytest

from dvpo_service.data.arithmetic import DemoTask, add_without_carry, main, make_demo, write_demo
from dvpo_service.data.dataset import load_prompts

SHIPPED = Path(str(files("dvpo_service.data") / "shipped"))


def test_shipped_files_are_what_the_generator_makes(tmp_path):
    for path in write_demo(DemoTask(), tmp_path):
        assert (SHIPPED / path.name).read_bytes() == path.read_bytes()
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) < 1_000_000


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
        assert value == int(prompt.answer[::-1])


def test_demonstrations_forget_four_carries_of_five_and_do_nothing_else_wrong():
    task = make_demo(DemoTask())
    slips = carries = 0
    for row, demonstration in zip(task["train"], task["warmstart"], strict=True):
        a, b = map(int, row["prompt"].rstrip("=").split("+"))
        assert demonstration["prompt"] == row["prompt"]
        assert int(demonstration["answer"][::-1]) in (a + b, add_without_carry(a, b))
        carries += a % 10 + b % 10 >= 10
        slips += demonstration["answer"] != row["answer"]
    assert 0.75 < slips / carries < 0.85


def test_two_graders_share_the_training_prompts_by_what_a_model_can_see():
    graders = load_prompts([SHIPPED / "demo-graders.jsonl"], name="graders").prompts
    train = load_prompts([SHIPPED / "demo-train.jsonl"], name="train").prompts[: len(graders)]
    assert [(p.messages, p.answer) for p in graders] == [(p.messages, p.answer) for p in train]
    for prompt in graders:
        odd = int(prompt.messages[0]["content"].partition("+")[0]) % 2
        assert prompt.source == ("careless" if odd else "careful")
    assert 0.4 < sum(p.source == "careless" for p in graders) / len(graders) < 0.6


def test_the_band_is_seen_out_of_distribution_only():
    task = make_demo(DemoTask())
    operands = {name: [set(map(int, r["prompt"][:-1].split("+"))) for r in rows] for name, rows in task.items()}
    band = set(range(60, 70))
    assert not any(pair & band for pair in operands["train"] + operands["val"])
    assert all(pair & band for pair in operands["ood"])


def test_impossible_tasks_are_refused():
    with pytest.raises(ValueError, match="only 4 distinct problems, 5 wanted"):
        make_demo(DemoTask(lo=0, hi=1, num_train=5, num_val=0))


def test_command_line(tmp_path, capsys):
    main(["--out", str(tmp_path), "--hi", "80", "--num-train", "50", "--seed", "7"])
    assert len((tmp_path / "demo-train.jsonl").read_text().splitlines()) == 50
    assert "demo-ood.jsonl" in capsys.readouterr().out
