"""Errors of the command line: one line, exit code 2, no stack trace."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dvpo_service.cli import main


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Return a function that runs ``dvpo`` and returns the one line of its error."""

    def run(*arguments: str, code: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["dvpo", *arguments])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as exit:
            main()
        captured = capsys.readouterr()
        assert exit.value.code == code, captured.err
        assert "Traceback" not in captured.out + captured.err
        [line] = [text for text in captured.err.splitlines() if text.startswith("error: ")]
        return line

    return run


def train(*overrides: str) -> tuple[str, ...]:
    return ("train", "--config", "demo", *overrides)


def test_unknown_config_key(refused) -> None:
    assert "did you mean 'algorithm.dvpo_alpha'" in refused(*train("algorithm.dvpo_alhpa=1"))


def test_ill_typed_config_value(refused) -> None:
    assert "trainer.num_steps: Input should be a valid integer" in refused(*train("trainer.num_steps=many"))


def test_missing_data_file(refused) -> None:
    assert re.search(r"nothere\.jsonl.*not found", refused(*train("data.train_files=nothere.jsonl")))


def test_empty_data(refused, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert re.search(r"empty\.jsonl.*(empty|no rows|no prompts)", refused(*train("data.train_files=empty.jsonl")))


def test_answer_missing(refused, tmp_path: Path) -> None:
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2="}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert re.search(r"rows\.jsonl:2.*answer", refused(*train("data.train_files=rows.jsonl")))


def test_prompt_too_long(refused, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+" * 40, "answer": "2"}))
    line = refused(
        *train(
            "data.train_files=rows.jsonl",
            f"model={{path: {tiny_model}}}",
            "tracking.mlflow=false",
            "trainer.run_dir=x/y",
        )
    )
    assert re.search(r"rows\.jsonl:1: the prompt has 82 tokens, data\.max_prompt_tokens=16", line)


def test_model_folder_without_weights(refused, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((tiny_model / "config.json").read_text())
    line = refused(*train(f"model={{path: {tmp_path / 'model'}}}"))
    assert "no weights; expected *.safetensors" in line


def test_model_that_reads_too_little(refused, tiny_model: Path) -> None:
    line = refused(*train(f"model={{path: {tiny_model}}}", "rollout.max_new_tokens=500"))
    assert "reads 128 tokens, but data.max_prompt_tokens + rollout.max_new_tokens = 516" in line


def test_no_room_for_the_plan(refused) -> None:
    line = refused(*train("cluster.gpus_per_trainer=4"))
    assert re.search(r"no room for policy\[0\] \(1 CPU \+ 4 GPU\).*Lower policy's actor count", line)


def test_mlflow_unreachable(refused) -> None:
    line = refused(*train("tracking.mlflow_uri=http://127.0.0.1:9", "trainer.run_dir=runs/x"))
    assert "http://127.0.0.1:9" in line
    assert "tracking.mlflow=false" in line


def test_no_such_reward(refused) -> None:
    assert "exact_match" in refused(*train("reward.function=exact_mach"))


def test_ray_cluster_out_of_reach(refused, tmp_path: Path) -> None:
    line = refused(
        *train("cluster.address=127.0.0.1:9", "tracking.mlflow=false", "trainer.run_dir=runs/x"),
    )
    assert "cannot connect to Ray at 127.0.0.1:9" in line


def test_eval_of_nothing_or_of_two_things(refused) -> None:
    for arguments in ((), ("--config", "demo"), ("--run", "runs/demo", "--model", "m")):
        assert "give either --run, or both --config and --model" in refused("eval", *arguments)


def test_eval_and_export_of_a_folder_that_is_no_run(refused, tmp_path: Path) -> None:
    for command in (("eval",), ("export", "--output", "out")):
        line = refused(*command, "--run", str(tmp_path))
        assert "holds nothing to export: no whole checkpoint in checkpoints/, no finished policy/" in line


def test_a_folder_that_is_not_there_is_said_to_be_missing(refused, tmp_path: Path) -> None:
    for command in (("eval",), ("serve",), ("export", "--output", "out")):
        assert f"nowhere: there is no such folder. {tmp_path} holds no run" in refused(*command, "--run", "nowhere")


def test_mistakes_are_said_before_the_heavy_imports(tmp_path: Path) -> None:
    """Importing torch, Ray and vLLM takes 5 to 20 seconds."""
    commands = (
        ["train", "--config", "demo", "trainer.num_stps=1"],
        ["warmstart", "--config", "dmeo"],
        ["doctor", "--config", "demo", "trainer.num_stps=1"],
        ["eval"],
        ["eval", "--run", "nowhere"],
        ["eval", "--config", "dmeo", "--model", "x"],
        ["export", "--run", "nowhere", "--output", "x"],
        ["serve", "--run", "nowhere"],
        ["sweep", "--config", "demo", "--grid", "nowhere"],
        ["sweep", "--config", "dmeo", "--grid", "forms"],
    )
    code = "\n".join(
        [
            "import sys",
            "from dvpo_service.cli import main",
            f"for command in {commands!r}:",
            "    sys.argv = ['dvpo', *command]",
            "    try:",
            "        main()",
            "    except SystemExit as ended:",
            "        print(ended.code)",
            "    print(*({'torch', 'ray', 'transformers', 'vllm', 'mlflow'} & set(sys.modules)))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.splitlines() == ["2", ""] * len(commands), done.stderr


def test_eval_of_a_file_that_is_not_there(refused, tiny_model: Path) -> None:
    line = refused("eval", "--config", "demo", "--model", str(tiny_model), "--data", "nothere.jsonl")
    assert re.search(r"nothere\.jsonl.*not found", line)


def test_something_unforeseen_is_one_line_too(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    import dvpo_service.commands.train

    def broken(*_: object) -> None:
        raise RuntimeError("the unexpected\nhappened")

    monkeypatch.setattr(dvpo_service.commands.train, "train", broken)
    line = refused(*train(), code=1)
    assert "RuntimeError: the unexpected happened; run again with `dvpo --debug" in line
