"""Train a student on the masks (MaskCLIP+), from an experiment file.

    python run.py distill experiments/configs/scenes.py --out runs/scenes
    python run.py distill experiments/configs/scenes.py:zero_shot --set steps=2000 seed=1 --out runs/zero-shot
    python run.py distill experiments/configs/scenes.py --set teacher.method=naclip teacher.key_smoothing=1 --out runs/2

--set takes the keys of `DistillConfig`; those of a part have its name and a dot: student.backbone, augmentation.scale,
teacher.model, teacher.prompt_denoising (a teacher's options have the names that flags have elsewhere).

The experiment file is executed as Python, with all your rights: run only files that you trust, as with any program.
The same command goes on where it stopped; a folder of another config is refused. On several hosts, run it on every one,
with MASKCLIP_COORDINATOR and its companions set, or --cluster where JAX finds the hosts by itself (TPU pods, Slurm).
What ends one host ends all of them, with its message; Ctrl-C or SIGTERM on one is enough to stop and save.
"""

from __future__ import annotations

import argparse

from maskclip_jax.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="FILE.py or FILE.py:VARIANT; the file is executed: use files you trust")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", action="extend", help="changes to its config"
    )
    parser.add_argument("--out", type=common.place, required=True, help="the run's folder")
    parser.add_argument("--method", help="how the teacher's last blocks are read (teacher.method of the config)")
    parser.add_argument(
        "--workers",
        type=common.positive,
        default=0,
        metavar="N",
        help="processes that prepare batches, where the device waits for them; threads do unless given",
    )
    parser.add_argument("--cluster", action="store_true", help="one of several hosts of a cluster (TPU pod, Slurm)")


def run(args: argparse.Namespace) -> None:
    from maskclip_jax.cli.process import give_back_after_compiling
    from maskclip_jax.ops.hosts import ending_together, is_first_host, join_hosts

    join_hosts(cluster=args.cluster)  # before anything else touches JAX
    give_back_after_compiling()

    from maskclip_jax.distill.experiment import load_experiment
    from maskclip_jax.distill.train import train_and_evaluate

    with ending_together(args.out):
        changes = args.set if args.method is None else [*args.set, f"teacher.method={args.method}"]
        config = load_experiment(args.experiment, changes)
        state = train_and_evaluate(config, args.out, workers=args.workers)
    if is_first_host():
        print(f"{args.out} holds the student after {int(state.step)} steps")
        print(f"next: python run.py evaluate {config.eval_data or 'DATA'} --model {args.out}")
