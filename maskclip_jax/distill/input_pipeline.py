"""Training batches: the batch of step t is a pure function of (config, t), for any number of hosts, devices, threads.

The examples form one endless stream, an epoch's random order after another's. Optimiser step t takes positions
t·B … t·B + B − 1 of it; each device gets its share of every micro-batch, so that accumulation has the same
micro-batches on any number of devices. Nothing but the step is needed to go on: a checkpoint holds no iterator.
Grain does what needs threads or processes: it runs that function ahead of the step, in order.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from grain.experimental import DatasetOptions, WithOptionsIterDataset
from jaxtyping import Array, Int, Integer

from maskclip_jax.data.augment import UNLABELLED, augment, example_rng
from maskclip_jax.data.images import IGNORE, read_label_png
from maskclip_jax.data.sources import DataSource, open_source
from maskclip_jax.distill.config import DistillConfig
from maskclip_jax.distill.pseudo_labels import check_no_leak, training_annotation
from maskclip_jax.errors import UserError
from maskclip_jax.ops import hosts

AHEAD = 4  # batches that wait for their step

Batch = dict[str, np.ndarray]


@functools.lru_cache(maxsize=4)  # a batch touches two epochs at most, unless the source is smaller than a batch
def epoch_order(seed: int, epoch: int, size: int) -> Int[np.ndarray, " size"]:
    """The order of one epoch. The spawn key keeps its random numbers apart from those of the examples."""
    sequence = np.random.SeedSequence((seed, epoch), spawn_key=(0,))
    order = np.random.default_rng(sequence).permutation(size)
    order.flags.writeable = False
    return order


def stream_example(seed: int, position: int, size: int) -> tuple[int, int]:
    """(epoch, example) at a position of the endless stream over `size` examples."""
    epoch, within = divmod(position, size)
    return epoch, int(epoch_order(seed, epoch, size)[within])


def device_positions(config: DistillConfig, step: int, devices: int) -> Int[np.ndarray, "devices b"]:
    """Positions in the stream that each device's batch takes at an optimiser step.

    Micro-batch i is positions i·(B/A) … of the step's B on however many devices: SyncBN has the same images together.
    """
    per_device = config.per_device(devices)
    positions = step * config.batch_size + np.arange(config.batch_size)
    parts = positions.reshape(config.accumulate, devices, per_device // config.accumulate)
    return parts.transpose(1, 0, 2).reshape(devices, per_device)


def train_example(config: DistillConfig, source: DataSource, position: int) -> Batch:
    """One augmented example: "image" uint8 [S, S, 3], "label" int32 [S, S], and "pseudo" where labels were made before.

    Raises:
      UserError: a mode that needs an annotation has none, a label is no class, or a mask made before does not fit.
    """
    epoch, index = stream_example(config.seed, position, len(source))
    example = source[index]
    labels = _annotation(config, example)
    from_folder = config.uses_pseudo_labels and config.labels_from != "online"
    if from_folder:
        labels = np.stack([labels, _made_before(config, example)], axis=-1)
    image, labels = augment(
        example.image,
        labels,
        example_rng(config.seed, epoch, index),
        config.augmentation,
        crop_size=config.crop_size,
        fill=tuple(round(255 * channel) for channel in config.image_mean),
    )
    if not from_folder:
        return {"image": image, "label": labels}
    return {"image": image, "label": labels[..., 0], "pseudo": labels[..., 1]}


def train_batch(
    config: DistillConfig,
    source: DataSource,
    step: int,
    *,
    devices: int,
    local: range,
) -> Batch:
    """This host's share of the batch of an optimiser step (from 0), each array uint8 [local devices, b, …].

    Args:
      devices: of all hosts.
      local: which of them are this host's.
    """
    positions = device_positions(config, step, devices)[local.start : local.stop]
    examples = [train_example(config, source, int(position)) for position in positions.ravel()]
    stacked = {name: np.stack([e[name] for e in examples], dtype=np.uint8, casting="unsafe") for name in examples[0]}
    return {name: array.reshape(*positions.shape, *array.shape[1:]) for name, array in stacked.items()}


def train_batches(
    config: DistillConfig,
    source: DataSource,
    start: int,
    *,
    threads: int | None = None,
    workers: int = 0,
    devices: int | None = None,
    local: range | None = None,
) -> Generator[Batch]:
    """The batches of steps `start` … `config.steps` − 1 in order, prepared ahead.

    Args:
      threads: that prepare them, of this process or of each worker (None: as there are cores; in a worker one).
      workers: processes that do so, each of which opens `config.train_data` anew, as `source` was; 0: this one. A few
        seconds to start, then faster than threads, which wait for one another's Python (docs/performance.md).
      devices, local: those of `train_batch`; None: as JAX has them.
    """
    placement = {
        "devices": jax.device_count() if devices is None else devices,  # a worker starts no device
        "local": local_range() if local is None else local,
    }
    if threads is None:
        threads = 1 if workers else min(os.cpu_count() or 1, 16)
    make = _BatchOrError(config, None if workers else source, placement)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(AHEAD, threads))
    prepared = grain.MapDataset.range(start, config.steps).map(make).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain asks for flags of its own
            flags.FLAGS.mark_as_parsed()
        # Through a pipe: of blocks in shared memory that are left at the end Python warns.
        piped = WithOptionsIterDataset(prepared, DatasetOptions(min_shm_size=2**40))
        prepared = piped.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    with contextlib.ExitStack() as stack:
        # Ctrl-C and SIGTERM reach all of a group: workers hear neither, this process saves and then stops them. For the
        # seconds that they take to start, nor does this one.
        with hosts.stop_signals(signal.SIG_IGN) if workers else contextlib.nullcontext():
            batches = stack.enter_context(contextlib.closing(iter(prepared)))
            first = list(itertools.islice(batches, max(workers, 1)))  # a worker starts with its first batch
        atexit.register(batches.close)  # before multiprocessing's own end, which would ask the workers in vain
        stack.callback(atexit.unregister, batches.close)
        for batch in itertools.chain(first, batches):
            if isinstance(batch, UserError):
                raise batch
            yield batch


def _end_with(parent: int) -> None:
    """Ends this worker when the process that started it is gone, killed perhaps."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


class _BatchOrError:
    """`train_batch`; a UserError is returned, since to one that is raised grain adds lines of its own.

    Without a source it opens the config's where it is called: what travels to a worker is a name.
    """

    def __init__(self, config: DistillConfig, source: DataSource | None, placement: dict[str, Any]):
        self._config, self._given, self._placement, self._parent = config, source, placement, os.getpid()

    @functools.cached_property
    def _source(self) -> DataSource:
        if self._given is not None:
            return self._given
        threading.Thread(target=_end_with, args=(self._parent,), daemon=True).start()
        return open_source(self._config.train_data)

    def __call__(self, step: int) -> Batch | UserError:
        try:
            return train_batch(self._config, self._source, int(step), **self._placement)
        except UserError as error:
            return error


def on_devices(batches: Iterator[Batch]) -> Iterator[dict[str, Array]]:
    """Each batch on this host's devices, the next one being copied to them while a step computes."""
    (split, _), waiting = hosts.shardings(jax.local_devices()), None
    for batch in batches:
        waiting, placed = jax.device_put(batch, split), waiting
        if placed is not None:
            yield placed
    if waiting is not None:
        yield waiting


def local_range() -> range:
    """Which places of the batch's device axis are this host's: pmap orders devices by host."""
    count = jax.local_device_count()
    return range(jax.process_index() * count, (jax.process_index() + 1) * count)


def _annotation(config: DistillConfig, example: Any) -> Integer[np.ndarray, "H W"]:
    needed = config.mode in ("zero-shot", "supervised", "finetuned-clip") or config.foreground == "annotation"
    if not needed:  # not read at all: annotation-free means free of it
        return np.full(example.image.shape[:2], UNLABELLED, np.int32)
    if example.labels is None:
        raise UserError(
            f"mode {config.mode} (foreground {config.foreground}) needs annotation, but {example.name} has none: "
            "choose data with masks, or mode 'annotation-free' with foreground 'none'"
        )
    unknown = (example.labels < 0) | (example.labels >= config.num_classes)
    wrong = example.labels[unknown & (example.labels != IGNORE)]
    if wrong.size:
        raise UserError(
            f"annotation is 0..{config.num_classes - 1} or {IGNORE}, but {example.name} has {wrong[0]}: "
            "check classes and background"
        )
    labels = training_annotation(example.labels, config)
    check_no_leak(labels, config)
    return labels


def _made_before(config: DistillConfig, example: Any) -> Integer[np.ndarray, "H W"]:
    path, labels = f"the mask of {example.name} in train_data", example.labels
    if config.labels_from != "data":
        path = Path(os.path.expanduser(config.labels_from)) / f"{example.name}.png"
        if not path.is_file():
            raise UserError(f"labels_from holds a mask for every image, but {path} is missing: run the labelling again")
        labels = read_label_png(path)
    elif labels is None:
        raise UserError(f"labels_from='data' needs labels, but {example.name} has none: name them, as &label=label")
    if labels.shape != example.image.shape[:2]:
        raise UserError(
            f"a mask has its image's size {list(example.image.shape[:2])}, but {path} has {list(labels.shape)}: "
            "label these images again"
        )
    allowed = (*config.candidates, IGNORE)
    if not np.isin(labels, allowed).all():
        wrong = labels[~np.isin(labels, allowed)][0]
        raise UserError(f"{path} has label {wrong}, which is none that this run gives: label with the same classes")
    return labels.astype(np.int32)
