"""The student's one command: what it runs, side by side, and how it ends where a part fails."""

import shlex
import sys

import numpy as np
import pytest

from experiments.toy_world import make_student


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.setattr(make_student, "DATA", tmp_path / "scenes" / "train")
    monkeypatch.setattr(make_student, "LOOK_EVERY", 0.01)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["make_student", "--runs", str(tmp_path / "runs"), *options])
        make_student.main()

    return run


def test_every_stage_is_shown_and_none_run(command, capsys, tmp_path):
    command("--show", "--scenes", "600", "--steps", "20", "--seeds", "3", "1")
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    parts = [next(word for word in line[1:] if word not in ("-m", "run.py")) for line in lines]
    toy = "experiments.toy_world."
    assert parts == [
        *(toy + "make_scenes", toy + "label_scenes"),
        *("distill",) * 4,
        *("experiments.tables.annotation_free", "convert"),
    ]
    assert [lines[2][i + 1] for i, word in enumerate(lines[2]) if word == "--out"] == [str(tmp_path / "runs/large-3")]
    assert {"seed=1", "steps=20", f"train_data={tmp_path}/scenes/train[0:600]"} <= set(lines[3])
    assert {f"init_from={tmp_path}/runs/large-1", "seed=1", str(tmp_path / "runs/refined-1")} <= set(lines[5])
    assert "steps=20" not in lines[5]
    assert str(tmp_path / "runs/refined-3") in lines[-1]  # the first seed's student
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_made_again(command, capsys, tmp_path):
    (tmp_path / "scenes" / "train").mkdir(parents=True)
    np.save(tmp_path / "scenes" / "train" / "images.npy", np.zeros((700, 1, 1, 3), np.uint8))
    (tmp_path / "runs" / "student").mkdir(parents=True)
    command("--show", "--scenes", "700")
    out = capsys.readouterr().out
    assert "make_scenes" not in out
    assert "convert" not in out
    command("--show", "--scenes", "701")
    assert "make_scenes" in capsys.readouterr().out


def test_one_that_fails_ends_the_others(command, monkeypatch, capsys, tmp_path):
    ready = tmp_path / "ready"
    patient = "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit('saved'))\n"
    patient += f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    hasty = (
        f"import pathlib, time\nwhile not pathlib.Path({str(ready)!r}).exists(): time.sleep(0.01)\nraise SystemExit(3)"
    )
    commands = [[sys.executable, "-c", program] for program in (hasty, patient)]
    monkeypatch.setattr(make_student, "stages", lambda args: iter([commands, [["never"]]]))
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 2
    out = capsys.readouterr()
    assert "ended with 3" in out.err
    assert "never" not in out.out
    assert (tmp_path / "runs" / "logs" / "1.log").read_text().strip() == "saved"


BAD = [("--steps", "0"), ("--scenes", "-1"), ("--seeds", "1", "1"), ("--runs", __file__)]


@pytest.mark.parametrize("options", BAD)
def test_what_is_refused_before_anything_runs(command, capsys, options):
    with pytest.raises(SystemExit) as ended:
        command("--show", *options)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
