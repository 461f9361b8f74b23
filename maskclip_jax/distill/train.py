"""`train_and_evaluate`: data, steps, metrics, evaluation, checkpoints, and how to go on after anything.

A run is its config. The same call in the same folder goes on from the last checkpoint and ends in the same
parameters as an uninterrupted run: the state counts the steps, and all else is a function of the step.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from maskclip_jax.data.sources import DataSource, open_source
from maskclip_jax.data.whole_files import write_json
from maskclip_jax.distill.checkpoint import Checkpoints
from maskclip_jax.distill.config import DistillConfig
from maskclip_jax.distill.evaluation import evaluate_student
from maskclip_jax.distill.input_pipeline import train_batches
from maskclip_jax.distill.run_folder import abandon, about, abstract_state, alone_in, claim, is_finite, keep_text
from maskclip_jax.distill.run_log import RunLog, StepMeans
from maskclip_jax.distill.step import TrainState, create_train_state, make_train_step, replicate
from maskclip_jax.distill.teacher import Frozen, Teacher, load_teacher
from maskclip_jax.errors import UserError
from maskclip_jax.evaluate.encoder import Evaluation
from maskclip_jax.evaluate.engine import known_labels
from maskclip_jax.ops import hosts
from maskclip_jax.students import create_student


def train_and_evaluate(
    config: DistillConfig,
    workdir: str | Path,
    *,
    resume: bool = True,
    loaded: tuple[Teacher | None, Frozen] | None = None,
    clip: Any = None,
    quiet: bool = False,
) -> TrainState:
    """Trains to `config.steps`, from the folder's last checkpoint where it has one.

    Checkpoints are written every `checkpoint_every` steps, with every evaluation (so that the best one is kept), at
    the end, and on Ctrl-C or SIGTERM.

    Args:
      config: the run.
      workdir: its folder; on several hosts, one that all of them share.
      resume: False refuses a folder that holds this run already.
      loaded: what `load_teacher` gives, where it is loaded already.
      clip: variables of the CLIP that finetuned-clip starts from; None loads that of `config.teacher`.
      quiet: print nothing.

    Returns:
      The state after the last step, on all devices.

    Raises:
      UserError: for data, folders and configs that cannot be used, and when the loss is no number any more.
      KeyboardInterrupt: after Ctrl-C (SIGTERM), once the checkpoint is written. A second one stops at once.
    """
    workdir = Path(os.path.expanduser(workdir))
    config.per_device(jax.device_count())
    source = open_source(config.train_data)
    heldout = open_source(config.eval_data) if config.eval_data else None
    if heldout is not None:
        known_labels(heldout[0], len(config.label_names))  # what cannot be scored would else show after many steps
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone_in(workdir))
        undo = stack.enter_context(contextlib.ExitStack())
        if claim(config, workdir, resume=resume):
            undo.callback(abandon, workdir)
        teacher, frozen = load_teacher(config) if loaded is None else loaded
        keep_text(workdir, frozen.text)
        student = create_student(config.student_config)
        frozen = replicate(frozen)
        p_step = make_train_step(config, student, teacher)
        checkpoints = stack.enter_context(Checkpoints(workdir, keep_last=config.keep_last, about=about(workdir)))
        everywhere = jax.tree.leaves(frozen)[0].sharding
        state = checkpoints.restore_newest(abstract_state(config, student, frozen.text, everywhere))
        if state is None:
            state = create_train_state(config, student, frozen.text, jax.random.key(config.seed), clip=clip)
            state = replicate(state)
        state, frozen = hosts.local_view((state, frozen))
        start = int(state.step)
        batches = train_batches(config, source, start)
        first = list(itertools.islice(batches, 1))  # data that do not fit the config show here
        undo.pop_all()  # the run can begin: from here on its folder stays
        with RunLog(workdir, start, config.steps, active=hosts.is_first_host(), quiet=quiet) as log:
            log.say(_opening(config, source, start))
            run = _Run(config, workdir, checkpoints, log, frozen, heldout)
            with _StopSignal() as stop:
                for step, batch in enumerate(itertools.chain(first, batches), start + 1):
                    state, metrics = p_step(state, frozen, batch)
                    run.after(step, state, metrics, stop.requested)
            log.say(f"finished: {config.steps} steps, {workdir}")
    return state


class _Run:
    """What happens between steps."""

    def __init__(
        self,
        config: DistillConfig,
        workdir: Path,
        checkpoints: Checkpoints,
        log: RunLog,
        frozen: Frozen,
        heldout: DataSource | None,
    ):
        self.config, self.workdir, self.checkpoints, self.log = config, workdir, checkpoints, log
        self.frozen, self.heldout = frozen, heldout
        self.means = StepMeans()
        self.pending: deque[tuple[int, Mapping[str, Any]]] = deque()

    def after(self, step: int, state: TrainState, metrics: Mapping[str, Any], stop: bool) -> None:
        """Reads metrics one step late, so that the device never waits; logs, evaluates and saves when it is time."""
        config, last = self.config, step == self.config.steps
        self.pending.append((step, metrics))
        self.log.advance(step)
        if jax.process_count() > 1:  # the hosts stop together, and agree on it only now and then
            stop = step % config.log_every == 0 and hosts.any_host(stop)
        evaluate = self.heldout is not None and (last or step % config.evaluate_every == 0)
        save = last or stop or evaluate or step % config.checkpoint_every == 0
        report = save or step % config.log_every == 0
        while len(self.pending) > (0 if report else 1):
            self._settle(*self.pending.popleft())
        if report:
            self.log.record(step, self.means.take())
        score = self._evaluate(step, state).mean_iou if evaluate else None
        if save:
            if not is_finite(state):
                raise UserError(self._not_finite(step, "a parameter"))
            self.checkpoints.save(step, hosts.global_view(state), score)
        if stop and not last:
            self.checkpoints.wait()
            self.log.say(f"stopped after step {step}, checkpoint written: run the same command again to go on")
            raise KeyboardInterrupt

    def _settle(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(values["loss"]):
            raise UserError(self._not_finite(step, f"the loss ({values['loss']})"))
        if values["leaked"]:
            raise UserError(
                f"refuse to train: at step {step} the annotation holds {values['leaked']:.0f} pixels of classes that "
                "must have none: check the data"
            )
        self.means.add(values)

    def _not_finite(self, step: int, what: str) -> str:
        self.checkpoints.wait()
        good = self.checkpoints.latest
        kept = f"the last good checkpoint is step {good} in {self.checkpoints.folder}" if good else "none was written"
        return (
            f"training needs finite numbers, but {what} is not at step {step} (learning rate "
            f"{self.config.learning_rate:g}); {kept}: use a lower learning_rate in a new folder"
        )

    def _evaluate(self, step: int, state: TrainState) -> Evaluation:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        scores = evaluate_student(self.config, variables, self.frozen.text, self.heldout)
        values = scores.to_dict()
        if hosts.is_first_host():
            write_json(self.workdir / "scores.json", {"step": step} | values)
        named = {name: value for name, value in values.items() if isinstance(value, float)}
        self.log.record(step, named | {"per_class": list(values["per class"].values())}, kind="eval")
        harmonic = f", seen {named['seen']:.1f}, unseen {named['unseen']:.1f}" if scores.zero_shot is not None else ""
        self.log.say(f"step {step}: mIoU {values['mIoU']:.1f}{harmonic} on {scores.images} images")
        return scores


class _StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a flag; the second one acts as it always did."""

    def __init__(self):
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _note(self, number: int, frame: Any) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


def _opening(config: DistillConfig, source: DataSource, start: int) -> str:
    devices, count = jax.device_count(), jax.process_count()
    at = f"{devices} {jax.devices()[0].platform} device{'s' * (devices > 1)}" + f" of {count} hosts" * (count > 1)
    begin = f"goes on after step {start}" if start else "starts"
    phases = f", {config.guided_steps} of them guided" if config.self_training else ""
    return f"{config.mode} {begin}: {config.steps} steps{phases}, {len(source)} images, {at}"
