"""What the commands print, with and without a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from dvpo_service.config.schema import Config
from dvpo_service.terminal import TrainingDisplay, closing, make_console, progress, show_plan

METRICS = {
    "reward/mean": 0.312,
    "reward/clean_mean": 0.312,
    "critic/dvpo_loss": 0.0456,
    "policy/rollout_kl": 1.2e-5,
    "policy/approx_kl": 3.4e-3,
    "policy/entropy": 0.61,
    "rollout/tokens_per_s": 5123.4,
    "rollout/staleness": 0.0,
    "time/generate": 2.1,
    "time/score": 0.1,
    "time/advantages": 0.2,
    "time/update": 1.5,
    "time/sync": 0.3,
    "time/step": 4.4,
}


def text_console(width=120):
    return Console(file=io.StringIO(), width=width, highlight=False)


def screen(width=120):
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, highlight=False)


def shown(console):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


def table_text(display, width):
    console = text_console(width)
    console.print(display._render())
    return console.file.getvalue()


def demo_config():
    return Config.model_validate(
        {
            "name": "demo",
            "model": {"warmstart": {}},
            "data": {"train_files": ["a"], "val_files": {"val": ["b"]}},
            "critic": {"mini_batch_size": 64, "epochs": 2},
        }
    )


def test_the_plan_shows_the_arithmetic():
    console = text_console()
    facts = {
        "parameters": 1234567,
        "train_prompts": 3700,
        "val_prompts": {"val": 420},
        "run_dir": "/runs/demo",
        "tracking_uri": "http://me:hunter2@host",
        "vllm": "0.32.0",
    }
    show_plan(demo_config(), facts, console)
    text = shown(console)
    for part in (
        "32 prompts x 8 = 256 responses",
        "8 optimizer steps a step: 2 epochs, mini-batches of 64",
        "1 vLLM engine",
        "1,234,567",
        "train 3,700, val 420",
        "/runs/demo",
        "0.32.0",
    ):
        assert part in text
    assert "hunter2" not in text


def test_the_table_holds_the_numbers_of_the_last_steps():
    display = TrainingDisplay(total=100, console=screen())
    for step in range(1, 21):
        display.update(step, METRICS | ({"eval/val/accuracy": 0.432} if step == 3 else {}))
    text = table_text(display, 120)
    lines = [line.split() for line in text.splitlines() if re.match(r"\s+\d+\s", line)]
    assert [int(line[0]) for line in lines] == list(range(9, 21))
    assert lines[-1][1:] == [
        *("0.312", "0.432", "0.0456", "3.4e-03", "0.61", "5,123"),
        *("2.1", "0.1", "0.2", "1.5", "0.3", "4.4", "0.0", "1.2e-05"),
    ]
    assert "20/100" in text
    assert "clean" not in text


def test_the_clean_reward_shows_when_it_differs():
    display = TrainingDisplay(total=10, console=screen())
    display.update(0, METRICS | {"reward/clean_mean": 0.4})
    assert "clean" in table_text(display, 120)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_table_fits_the_terminal(width):
    display = TrainingDisplay(total=10, console=screen(width))
    display.update(0, METRICS | {"reward/clean_mean": 0.4, "eval/val/accuracy": 0.1, "eval/ood/accuracy": 0.2})
    text = table_text(display, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "\u2026" not in text
    for number in ("0.312", "0.100", "0.200", "0.0456"):
        assert number in text


def test_the_evaluation_before_training_shows_until_the_next():
    display = TrainingDisplay(total=2, console=screen())
    display.update(0, {"eval/val/accuracy": 0.777})
    assert "0/2" in table_text(display, 120)
    display.update(1, METRICS)
    assert "0.777" in table_text(display, 120)


def test_the_live_display_draws_status_and_notes_and_stops_on_errors():
    console = screen()
    display = TrainingDisplay(total=2, console=console)

    def run():
        with display:
            display.status("starting engines")
            display.update(0, METRICS)
            display.note("[odd] engine restarted")
            raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        run()
    assert "[odd] engine restarted" in shown(console)
    assert "0.0456" in shown(console)
    assert not display._live.is_started


def test_a_note_is_yellow_above_the_table():
    console = Console(
        file=io.StringIO(), width=60, force_terminal=True, color_system="standard", no_color=False, highlight=False
    )
    with TrainingDisplay(total=2, console=console) as display:
        display.update(1, METRICS)
        display.note("the critic is not learning")
    text = console.file.getvalue()
    assert "\x1b[33mthe critic is not learning" in text
    assert text.index("critic is not learning") < text.rindex("0.312")


def test_without_a_terminal_a_note_is_one_plain_line():
    console = text_console(40)
    note = "step 25: [odd] every reward of a prompt is the same in 0.91 of the groups"
    with TrainingDisplay(total=2, console=console) as display:
        display.note(note)
        display.update(1, METRICS)
    assert console.file.getvalue().splitlines()[0] == note


def test_without_a_terminal_each_step_is_one_line():
    console = text_console(80)
    with TrainingDisplay(total=5, start=2, console=console) as display:
        for step in range(3, 6):
            display.status("generating")
            display.update(step, METRICS | {"eval/val/accuracy": 0.5})
    lines = shown(console).splitlines()
    assert lines[0] == "generating"
    assert len(lines) == 4
    assert lines[1].startswith("step 3/5 reward=0.312 val_acc=0.500 critic=0.0456 KL_old=3.4e-03")
    assert "\x1b" not in console.file.getvalue()


def test_long_runs_print_few_lines():
    console = text_console()
    with TrainingDisplay(total=5000, console=console) as display:
        for step in range(1, 5001):
            display.status("generating")
            display.update(step, METRICS)
    lines = shown(console).splitlines()
    assert 100 < len(lines) <= 200
    assert lines[1].startswith("step 1/5000")
    assert lines[-1].startswith("step 5000/5000")


def test_no_color_is_honoured(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), width=80, force_terminal=True, highlight=False)
    summary = {"steps": 1, "seconds": 1, "held_out_before": {"v": 0.1}, "held_out_after": {"v": 0.2}}
    closing(summary, tmp_path, None, console)
    assert not re.search(r"\x1b\[[0-9;]*3\d", console.file.getvalue())


def test_progress_without_a_terminal():
    console = text_console()
    with progress("warm start", 600, console) as bar:
        for done in range(1, 601):
            bar.update(done, loss=1.5, accuracy=0.25)
    lines = shown(console).splitlines()
    assert len(lines) <= 21
    assert lines[-1] == "warm start 600/600 loss 1.500 accuracy 0.250"


def test_progress_on_a_terminal():
    console = screen()
    with progress("warm start", 3, console) as bar:
        bar.update(3, loss=1.5)
    assert "3/3" in shown(console)
    assert "loss 1.500" in shown(console)


def test_closing_shows_the_gain_and_the_places(tmp_path):
    console = text_console()
    summary = {
        "held_out_before": {"val": 0.231},
        "held_out_after": {"val": 0.69},
        "held_out_greedy_before": {"val": 0.4},
        "held_out_greedy_after": {"val": 0.38},
        "steps": 250,
        "seconds": 3723.4,
        "critic_explains": {"between_prompts": 0.914, "within_a_prompt": 0.58},
        "where": {"policy": "/runs/demo/policy"},
    }
    closing(summary, tmp_path, "sqlite:////runs/mlflow.db", console)
    text = shown(console)
    for part in (
        "23.1%",
        "69.0%",
        "+45.9 points",
        "-2.0 points",
        "250 steps in 1:02:03",
        "/policy",
        "held-out accuracy",
        "explains 91% of the differences between prompts and 58% of those between right and wrong answers",
    ):
        assert part in text
    assert "summary.json" in text
    assert re.search(
        r"^to open these runs in MLflow: \S*mlflow ui --backend-store-uri sqlite:////runs/mlflow\.db$", text, re.M
    )


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("sqlite:////my runs/mlflow.db", "ui --backend-store-uri 'sqlite:////my runs/mlflow.db'\n"),
        ("postgresql://me:hush@host/db", "ui --backend-store-uri 'postgresql://***@host/db'\n"),
        ("http://me:hush@host:5000", None),
        (None, None),
    ],
)
def test_the_command_that_opens_the_runs_that_were_written(uri, said, tmp_path):
    console = text_console()
    closing({"steps": 1, "seconds": 1.0}, tmp_path, uri, console)
    text = shown(console)
    assert "hush" not in text
    assert (said in text) if said else ("mlflow ui" not in text)


def test_graded_rewards_are_means_and_what_was_not_scored_is_no_figure(tmp_path):
    console = text_console()
    summary = {
        "held_out_before": {"mine": 0.25, "other": None},
        "held_out_after": {"mine": 0.5, "other": 0.4},
        "graded": ["mine"],
        "steps": 1,
        "seconds": 1.0,
    }
    closing(summary, tmp_path, None, console)
    rows = {line.split()[1].strip(","): line for line in shown(console).splitlines() if "sampled" in line}
    assert "held-out, mean reward" in shown(console)
    assert rows["mine"].split()[3:6] == ["0.250", "0.500", "+0.250"]
    assert rows["other"].split()[3:6] == ["-", "40.0%", "-"]
    display = TrainingDisplay(total=2, console=text_console())
    display.update(0, {"eval/mine/accuracy": 0.25, "eval/mine/graded": 1.0, "eval/other/accuracy": float("nan")})
    display.update(1, METRICS)
    text = shown(display.console)
    assert "mine_reward=0.250" in text
    assert "step 0: no response of other could be scored" in text
    assert "nan" not in text


def test_the_default_console_is_wide_enough_for_logs():
    assert make_console().width >= 80
