"""`train_and_evaluate`: data, steps, metrics, evaluation, checkpoints, and how to go on after anything.

A run is its config. The same call in the same folder goes on from the last checkpoint and ends in the same
parameters as an uninterrupted run: the state counts the steps, and all else is a function of the step.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maskclip_jax.data.sources import DataSource, open_source
from maskclip_jax.data.whole_files import write_json
from maskclip_jax.distill.checkpoint import Checkpoints
from maskclip_jax.distill.config import DistillConfig
from maskclip_jax.distill.devices import Packed, pack, replicate, unpack
from maskclip_jax.distill.evaluation import evaluate_student
from maskclip_jax.distill.input_pipeline import on_devices, train_batches
from maskclip_jax.distill.run_folder import abandon, about, abstract_state, alone_in, claim, is_finite, keep_text
from maskclip_jax.distill.run_log import RunLog, StepMeans
from maskclip_jax.distill.step import TrainState, create_train_state, make_train_step
from maskclip_jax.distill.student_folder import load_student
from maskclip_jax.distill.teacher import Frozen, Teacher, load_teacher
from maskclip_jax.errors import UserError
from maskclip_jax.evaluate.engine import known_labels
from maskclip_jax.ops import hosts
from maskclip_jax.students import create_student
from maskclip_jax.students.weights import modules_beyond


def train_and_evaluate(
    config: DistillConfig,
    workdir: str | Path,
    *,
    resume: bool = True,
    loaded: tuple[Teacher | None, Frozen] | None = None,
    clip: Any = None,
    workers: int = 0,
    quiet: bool = False,
) -> TrainState:
    """Trains to `config.steps`, from the folder's last checkpoint where it has one.

    Checkpoints are written every `checkpoint_every` steps, before every evaluation (whose score is entered into it, so
    that the best one is kept), at the end, and on Ctrl-C or SIGTERM. On several hosts call this within
    `hosts.ending_together(workdir)`, or what stops one of them leaves the others waiting.

    Args:
      config: the run.
      workdir: its folder; on several hosts, one that all of them share.
      resume: False refuses a folder that holds this run already.
      loaded: what `load_teacher` gives, where it is loaded already.
      clip: variables of the CLIP that finetuned-clip starts from; None loads that of `config.teacher`.
      workers: processes that prepare batches (`input_pipeline.train_batches`); they change no number.
      quiet: print nothing.

    Returns:
      The state after the last step, on all devices.

    Raises:
      UserError: for data, folders and configs that cannot be used, and when the loss is no number any more, which is
        seen before the next checkpoint, and within `log_every` steps.
      KeyboardInterrupt: after Ctrl-C (SIGTERM), once the checkpoint is written; of several hosts, one that gets it is
        enough (`StoppedTogether`). A second one stops at once.
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
            if config.dtype == "bfloat16" and jax.default_backend() == "cpu":  # a run from elsewhere may go on here
                raise UserError(
                    "bfloat16 is for training on a GPU or TPU, but only CPUs are here, where it takes 1.7 times "
                    "as long as float32: train with dtype=float32"
                )
        teacher, frozen = load_teacher(config) if loaded is None else loaded
        keep_text(workdir, frozen.text)
        student = create_student(config.student_config)
        frozen = replicate(frozen)
        p_step = make_train_step(config, student, teacher)
        checkpoints = stack.enter_context(Checkpoints(workdir, keep_last=config.keep_last, about=about(workdir)))
        everywhere = jax.tree.leaves(frozen)[0].sharding
        state = checkpoints.restore_newest(abstract_state(config, student, frozen.text, everywhere))
        begins = None
        if state is None:
            origin, key = _origin(config), jax.random.key(config.seed)
            state = create_train_state(config, student, frozen.text, key, clip=clip, start=origin)
            begins = _beginning(config, origin, state)
            state = replicate(state)
        state, frozen = hosts.local_view((state, frozen))
        start, several = int(state.step), jax.process_count() > 1
        batches = stack.enter_context(contextlib.closing(train_batches(config, source, start, workers=workers)))
        first = list(itertools.islice(batches, 1))  # data that do not fit the config show here
        undo.pop_all()  # the run can begin: from here on its folder stays
        with RunLog(workdir, start, config.steps, active=hosts.is_first_host(), quiet=quiet) as log:
            log.say(_opening(config, source, begins or f"goes on after step {start}"))
            run = _Run(config, workdir, checkpoints, log, frozen, heldout)
            with _stop_asked_for() as asked:
                if start and run.is_to_be_evaluated(start) and checkpoints.score(start) is None:
                    run.evaluate(start, state, asked)  # what stopped the run there left it out
                state = pack(state)
                for step, batch in enumerate(on_devices(itertools.chain(first, batches)), start + 1):
                    if several:
                        batch["stop"] = np.full(jax.local_device_count(), asked(), np.float32)
                    state, metrics = p_step(state, frozen, batch)
                    run.after(step, state, metrics, asked)
            log.say(f"finished: {config.steps} steps, {workdir}")
    return unpack(state)


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
        self.pending: list[tuple[int, Mapping[str, Any]]] = []  # steps whose metrics nobody has read
        self.before: Mapping[str, Any] = {}  # metrics of the last step

    def is_to_be_evaluated(self, step: int) -> bool:
        return self.heldout is not None and (step == self.config.steps or step % self.config.evaluate_every == 0)

    def after(self, step: int, packed: Packed, metrics: Mapping[str, Any], asked: Callable[[], bool]) -> None:
        """Waits for the step before, so that the device never waits; reads metrics, saves, evaluates when it is time.

        Several hosts stop at the same step without a word more: each says in its batch whether it was asked to, and
        the sum, a metric like the loss, is read one step late.
        """
        config, last = self.config, step == self.config.steps
        before, self.before = jax.block_until_ready(self.before), metrics
        stop = bool(before.get("stop", 0)) if "stop" in metrics else asked()
        self.pending.append((step, metrics))
        self.log.advance(step)
        evaluate = self.is_to_be_evaluated(step)
        save = last or stop or evaluate or step % config.checkpoint_every == 0
        if save or step % config.log_every == 0:
            for settled in jax.device_get(self.pending):
                self._settle(*settled)
            self.pending.clear()
            self.log.record(step, self.means.take())
        if save:
            if not is_finite(packed):
                raise UserError(self._not_finite(step, "a parameter"))
            self.checkpoints.save(step, hosts.global_view(unpack(packed)))
        if stop and not last:
            self.checkpoints.wait()
            self.log.say(f"stopped after step {step}, checkpoint written: run the same command again to go on")
            raise hosts.StoppedTogether
        if evaluate:
            self.evaluate(step, unpack(packed), asked)

    def _settle(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = {name: float(value) for name, value in metrics.items() if name != "stop"}
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

    def evaluate(self, step: int, state: TrainState, asked: Callable[[], bool]) -> None:
        """Scores of a step whose checkpoint is saved: whoever is asked to stop meanwhile can leave at once."""

        def leave_if_asked(*_: int) -> None:
            if asked():
                self.checkpoints.wait()
                raise KeyboardInterrupt(f"in the evaluation after step {step}, checkpoint written")

        variables = {"params": state.params, "batch_stats": state.batch_stats}
        scores = evaluate_student(self.config, variables, self.frozen.text, self.heldout, progress=leave_if_asked)
        values = scores.to_dict()
        if hosts.is_first_host():
            write_json(self.workdir / "scores.json", {"step": step} | values)
        named = {name: value for name, value in values.items() if isinstance(value, float)}
        self.log.record(step, named | {"per_class": list(values["per class"].values())}, kind="eval")
        harmonic = f", seen {named['seen']:.1f}, unseen {named['unseen']:.1f}" if scores.zero_shot is not None else ""
        self.log.say(f"step {step}: mIoU {values['mIoU']:.1f}{harmonic} on {scores.images} images")
        self.checkpoints.set_score(step, scores.mean_iou)


@contextlib.contextmanager
def _stop_asked_for() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came within: the first one only says so, the second one acts as it always did."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        give_back()

    with hosts.stop_signals(note) as give_back:
        yield lambda: bool(came)


def _origin(config: DistillConfig) -> Any:
    """Variables of the student that a run starts from, or None. Raises UserError where it saw images otherwise."""
    if config.init_from is None:
        return None
    origin = load_student(config.init_from)
    for name in ("image_mean", "image_std"):
        ours, theirs = getattr(config, name), getattr(origin.config, name)
        if ours != theirs:
            raise UserError(
                f"a student goes on with the {name} that it began with, {','.join(map(str, theirs))} in "
                f"{config.init_from}, got {','.join(map(str, ours))}: set {name} to the first"
            )
    return origin.variables


def _beginning(config: DistillConfig, origin: Any, state: TrainState) -> str:
    if origin is None:
        return "starts"
    new = modules_beyond(origin["params"], state.params)
    return f"starts from {config.init_from}" + (f" with {', '.join(new)} anew" if new else "")


def _opening(config: DistillConfig, source: DataSource, begins: str) -> str:
    devices, count = jax.device_count(), jax.process_count()
    at = f"{devices} {jax.devices()[0].platform} device{'s' * (devices > 1)}" + f" of {count} hosts" * (count > 1)
    phases = f", {config.guided_steps} of them guided" if config.self_training else ""
    return f"{config.mode} {begins}: {config.steps} steps{phases}, {len(source)} images, {at}"
