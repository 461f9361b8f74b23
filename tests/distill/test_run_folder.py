"""A run's folder: whose it is, what a crash or a damaged disk leaves in it, and how the same command goes on."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
from tiny_run import arrays_of, failing_at, run_config, same, train, write_data

from maskclip_jax import cli
from maskclip_jax.distill.experiment import with_overrides
from maskclip_jax.distill.run_folder import claim, keep_text, read_config
from maskclip_jax.distill.run_log import read_metrics
from maskclip_jax.distill.student_folder import load_student
from maskclip_jax.distill.train import train_and_evaluate
from maskclip_jax.errors import UserError

DAMAGES = {
    "zero bytes": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "not UTF-8": lambda content: b"\xff\xfe" + content,
    "another type": lambda content: b"[1, 2]\n",
    "another value": lambda content: (
        content.replace(b'"seed": 0', b'"seed": 1') if b'"seed"' in content else content[:-1] + b"\x1f"
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "text.npy", "metrics.jsonl"])
@pytest.mark.filterwarnings("ignore:.*was damaged. .* of its lines are left out")
def test_damaged_files_of_a_run_are_made_again(whole, tmp_path, name, kind):
    """The same command mends them, or says in one line what is wrong; a student is never read with other values."""
    config, workdir, state = whole
    shutil.copytree(workdir, tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_bytes(DAMAGES[kind](path.read_bytes()))
    assert path.read_bytes() != (workdir / name).read_bytes()
    if name != "metrics.jsonl":
        with pytest.raises(UserError, match=name) as error:
            load_student(tmp_path / "run", "latest")
        assert "\n" not in str(error.value)
    if (name, kind) == ("config.json", "another value"):  # a config like any other, and not this run's
        with pytest.raises(UserError, match="another config"):
            train(config, tmp_path / "run", wrap=lambda step: None)
        return
    same(arrays_of(train(config, tmp_path / "run", wrap=lambda step: None)), state)
    if name != "metrics.jsonl":
        assert path.read_bytes() == (workdir / name).read_bytes()
        assert load_student(tmp_path / "run", "latest").step == 8
    kept, all_lines = read_metrics(tmp_path / "run"), read_metrics(workdir)
    assert [line for line in all_lines if line in kept] == kept


def test_a_torn_config_without_proof_is_refused(whole, tmp_path):
    """The checkpoints are another run's: what the command says is not what is in the folder."""
    config, workdir, _ = whole
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_bytes(b"")
    with pytest.raises(UserError, match="its checkpoints may be another run's: choose another"):
        train(with_overrides(config, ["seed=5"]), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == b""


def test_a_damaged_checkpoint_costs_a_few_steps(whole, tmp_path):
    """The newest one is left out, the one before is gone on from, and the run ends as if nothing had been."""
    config, workdir, state = whole
    shutil.copytree(workdir, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "00000008"
    victim = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.warns(UserWarning, match=r"00000008 .*damaged.*step 6 is taken instead"):
        assert load_student(tmp_path / "run", "latest").step == 6
    with pytest.warns(UserWarning, match=r"00000008 .*damaged.*moved to .*step 6 is taken instead"):
        again = train(config, tmp_path / "run")
    same(arrays_of(again), state)
    assert load_student(tmp_path / "run", "latest").step == 8
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()


def test_one_run_at_a_time(whole, tmp_path):
    """A second one in the same folder would delete the first one's checkpoints."""
    config, _, state = whole

    def another(compiled, *arguments):
        with pytest.raises(UserError, match=f"one run at a time, but process {os.getpid()} on .* wait for it"):
            train(config, tmp_path)
        return compiled(*arguments)

    same(arrays_of(train(config, tmp_path, wrap=failing_at(2, another))), state)
    assert not (tmp_path / ".lock").exists()


def test_a_folder_belongs_to_one_run(whole, tmp_path):
    config, workdir, _ = whole
    data = config.train_data
    with pytest.raises(UserError, match=r"another config \(learning_rate: 0.05 there, 0.01 now\)"):
        train_and_evaluate(run_config(data, learning_rate=0.01), workdir)
    changed = with_overrides(config, ["augmentation.flip=0"])
    with pytest.raises(UserError, match=r"augmentation.flip: 0.5 there"):
        train_and_evaluate(changed, workdir)
    with pytest.raises(UserError, match="holds this run already"):
        train_and_evaluate(config, workdir, resume=False)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"empty folder, but .* holds thesis.tex"):
        train_and_evaluate(config, tmp_path)
    with pytest.raises(UserError, match="a run needs a folder"):
        train_and_evaluate(config, tmp_path / "thesis.tex")
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path)


def test_a_run_that_never_came_to_a_step_leaves_its_folder_free(whole, tmp_path):
    """As another host does, whose fault it was not."""
    config, workdir, _ = whole
    other = dataclasses.replace(config, seed=5)
    assert claim(other, tmp_path, resume=True)
    (tmp_path / "text.npy").write_bytes((workdir / "text.npy").read_bytes())
    assert claim(config, tmp_path, resume=True)
    assert read_config(tmp_path) == config
    assert not (tmp_path / "text.npy").exists()
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"another config \(seed: 0 there, 5 now"):
        claim(other, tmp_path, resume=True)


def test_another_teacher_is_noticed(whole):
    _, workdir, _ = whole
    keep_text(workdir, np.load(workdir / "text.npy"))
    with pytest.raises(UserError, match="those that the run began with"):
        keep_text(workdir, -np.load(workdir / "text.npy"))


def test_data_are_looked_at_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="check the path"):
        train_and_evaluate(run_config(tmp_path / "none.npz"), tmp_path / "run")
    for name, more in (("bare", {}), ("wrong", {"labels": np.full((4, 40, 44), 9, np.uint8)})):
        np.savez(tmp_path / f"{name}.npz", images=np.zeros((4, 40, 44, 3), np.uint8), **more)
        with pytest.raises(UserError, match=r"need annotation|has 9"):
            train_and_evaluate(run_config(write_data(tmp_path), eval_data=f"{tmp_path}/{name}.npz"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_do_not_fit_give_the_folder_back(tmp_path):
    """Which is seen when the first batch is made: the corrected command would else be another config's."""
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 40, 44, 3), np.uint8), labels=np.full((4, 40, 44), 9, np.uint8))
    with pytest.raises(UserError, match=r"annotation is 0.* or 255, but .* has 9"):
        train(run_config(tmp_path / "a.npz", eval_data=""), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_anothers_config_is_left_alone(tmp_path):
    """A CLIP's folder, as Hugging Face has it: it too holds a config.json."""
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    for others in ((), ("model.safetensors",)):
        for name in others:
            (tmp_path / "clip" / name).touch()
        with pytest.raises(UserError, match=r"starts in an empty folder, but .* holds config\.json"):
            train(run_config(write_data(tmp_path)), tmp_path / "clip")
        assert (tmp_path / "clip" / "config.json").read_text() == '{"model_type": "clip"}'


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_cannot_begin_leaves_nothing(whole, tmp_path, there):
    """The embedded CLIP's embeddings are wider than this student."""
    if there:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".mine").write_text("")
    with pytest.raises(UserError, match="width 12 must be that of the text embeddings"):
        train_and_evaluate(whole[0], tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").rglob("*")] == [".mine"] * there


def test_its_student_as_a_plain_folder(whole, tmp_path, capsys):
    """A run becomes a plain folder with the same numbers, which commands take as they take the run."""
    _, workdir, _ = whole
    out = tmp_path / "student"
    assert cli.run_command(["convert", str(workdir), str(out), "--no-compile-cache"]) == 0
    assert "wrote" in capsys.readouterr().out
    one, other = load_student(workdir), load_student(out)
    same(arrays_of((one.variables, one.text)), arrays_of((other.variables, other.text)))
    assert other.scores is not None
    assert other.scores["step"] == other.step == one.step
    shutil.rmtree(out)
    assert cli.run_command(["convert", str(workdir), str(out), "--no-compile-cache", "--activation", "gelu"]) == 2
    assert "got --activation" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
