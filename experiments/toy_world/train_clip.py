"""Trains the CLIPs that ship with the project, from captions alone.

    python -m experiments.toy_world.make_scenes --wide 150000 --closeup 30000 --validation 500 --out data/scenes
    python -m experiments.toy_world.train_clip --tower vit --scenes data/scenes --out out/clip-vit

Contrastive terms on the pooled image embedding, CLIP's own and one over noun phrases:

- captions: symmetric InfoNCE between images and captions that name a random subset of what is visible (CLIP).
- phrases: the same with every noun phrase of the captions as a text of its own, in a random prompt template. An image
  may have several right phrases; each is contrasted with the wrong ones only (multi-positive InfoNCE).
- uniformity of the phrases' embeddings (Wang & Isola 2020): without it all nouns fall onto one point while the images
  tell only stuff apart, and stay there (measured: cosine 0.99 between nouns after 100 steps, no object after 500).

And two on the dense reading, whose positions the class token need not tell apart:

- found: each phrase is scored by the positions that answer to it (a pooling after PACL, Mukhoti et al. 2023).
- named: every position shows something that the caption names, so that the probability of all it does not name
  falls everywhere: -log of the named phrases' share of the softmax, averaged over the positions.

Training begins with close-ups of one object at 64 px and goes on to whole scenes: on scenes alone no object was told
from another after 500 steps, on close-ups after 150. Scenes and captions live on the device: a step waits for no host.

Masks are never read here, except to draw the curve (`mIoU` of dense predictions on validation scenes).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization

from experiments.toy_world.batches import draw_batch, load_corpus, multi_positive, uniformity, unnamed
from experiments.toy_world.prompts import CONTEXT_LENGTH, corpus, load_tokenizer, make_tokenizer
from maskclip_jax.checkpoints.folders import OPENAI_MEAN, OPENAI_STD
from maskclip_jax.data.vocabulary import SCENE_OBJECTS
from maskclip_jax.encoders.config import CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from maskclip_jax.encoders.layers import attend
from maskclip_jax.encoders.model import CLIP

MEAN, STD = np.array(OPENAI_MEAN, np.float32), np.array(OPENAI_STD, np.float32)


@dataclasses.dataclass(frozen=True)
class Training:
    """One run; written beside its results, and resumed only by the same."""

    tower: str = "resnet"
    steps: int = 4000
    batch: int = 128
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 150
    sizes: tuple[int, ...] = (64, 96, 96, 128)  # image side of a step, drawn at random; the first before `small_until`
    small_until: float = 0.25  # share of the training
    closeups: tuple[float, ...] = (0.8, 0.25)  # share of close-ups in the first 15% and from the middle of training on
    keep: float = 1.0  # share of patches the ViT reads (FLIP)
    whole_from: float = 1.0  # share of the training after which it reads all of them, at the last of the sizes
    dense_from: float = 0.0  # share of the training after which the dense reading is trained too
    found_weight: float = 1.0
    sharpness: float = 10.0  # of the pooling of "found": 0 is the mean, infinity the best position
    named_weight: float = 1.0
    objects: float = 0.18  # share of the positions that show objects
    caption_weight: float = 0.3
    uniformity_weight: float = 0.5
    dtype: str = "float32"  # that the towers compute in
    seed: int = 0
    init: str = ""  # a finished run whose weights (and tokenizer) this one begins with


def clip_config(tower: str, vocab_size: int) -> CLIPConfig:
    """The two embedded architectures."""
    if tower == "resnet":
        vision = ResNetConfig(image_size=96, width=16, layers=(1, 1, 2, 1), heads=8, dense_stride=8)
    else:
        vision = ViTConfig(image_size=128, patch_size=8, width=128, layers=6, heads=4, mlp_width=512)
    text = TextConfig(vocab_size, CONTEXT_LENGTH, width=96, layers=2, heads=2, mlp_width=384)
    return CLIPConfig(vision, text, embed_dim=128)


def augment(key: jax.Array, images: jax.Array, size: int) -> jax.Array:
    """uint8 scenes → normalised float32 at `size` pixels, flipped, tinted and given another contrast and saturation."""
    flip, gain, shift, power, colour = jax.random.split(key, 5)
    x = images.astype(jnp.float32) / 255
    if size != x.shape[1]:
        x = jax.image.resize(x, (x.shape[0], size, size, 3), "linear", antialias=True)
    x = jnp.where(jax.random.bernoulli(flip, 0.5, (x.shape[0], 1, 1, 1)), x[:, :, ::-1], x)
    x = x ** jnp.exp(jax.random.uniform(power, (x.shape[0], 1, 1, 1), minval=-0.25, maxval=0.25))
    saturation = jax.random.uniform(colour, (x.shape[0], 1, 1, 1), minval=0.5, maxval=1.3)
    x = x.mean(-1, keepdims=True) * (1 - saturation) + x * saturation
    x = x * jax.random.uniform(gain, (x.shape[0], 1, 1, 3), minval=0.88, maxval=1.12)
    x = x + jax.random.uniform(shift, (x.shape[0], 1, 1, 1), minval=-0.08, maxval=0.08)
    return (x - MEAN) / STD


def losses(model: CLIP, run: Training, params, batch_stats, key, batch, size: int, dense: bool):
    """The terms for one batch; also the new batch statistics."""
    augment_key, keep_key = jax.random.split(key)
    images = augment(augment_key, batch["images"], size)
    variables = {"params": params, "batch_stats": batch_stats}
    positions = None
    if run.tower == "resnet":
        embedding, new = model.apply(variables, images, train=True, method="encode_image", mutable=["batch_stats"])
        if dense:  # with the running statistics that the library reads with
            positions, _ = model.apply(variables, images, method="encode_dense")
            positions = positions.reshape(len(positions), -1, positions.shape[-1])
        batch_stats = new["batch_stats"]
    else:
        patches = (size // model.config.stride) ** 2
        order = jax.random.uniform(keep_key, (images.shape[0], patches)).argsort(axis=1)
        keep = None if run.keep == 1 else order[:, : int(patches * run.keep)]
        embedding, positions = model.apply(variables, images, keep, method=both_readings)
    texts = [model.apply(variables, batch[k], method="encode_text") for k in ("phrases", "captions")]
    unit = lambda e: (e := e.astype(jnp.float32)) / jnp.linalg.norm(e, axis=-1, keepdims=True)  # noqa: E731
    image, phrase, sentence = (unit(e) for e in (embedding, *texts))
    scale = jnp.exp(jnp.minimum(params["logit_scale"], np.log(100.0)))
    named, wrong = batch["named"], ~batch["named"] & ~batch["unknown"]
    contrast = lambda s, right, not_: (multi_positive(s, right, not_) + multi_positive(s.T, right.T, not_.T)) / 2  # noqa: E731
    pooled = image @ phrase.T
    by_phrase = contrast(scale * pooled, named, wrong)
    scores = scale * image[: len(sentence)] @ sentence.T
    same = jnp.eye(len(sentence), dtype=bool)
    by_caption = contrast(scores, same, ~same)
    total = by_phrase + run.caption_weight * by_caption + run.uniformity_weight * uniformity(phrase, batch["noun"])
    by_position = jnp.zeros(())
    if dense:
        cosines = jnp.einsum("bke,ne->bkn", unit(positions), phrase)
        pooled = (jax.nn.softmax(run.sharpness * cosines, axis=1) * cosines).sum(1)
        stuff = batch["noun"] >= len(SCENE_OBJECTS)
        by_position = unnamed(scale * cosines, named[:, None], wrong[:, None], stuff, run.objects)
        total += run.found_weight * contrast(scale * pooled, named, wrong) + run.named_weight * by_position
    by_object = multi_positive(scale * pooled[:, :60], named[:, :60], wrong[:, :60])
    return total, (batch_stats, by_phrase, by_caption, by_object, by_position)


def both_readings(model: CLIP, images: jax.Array, keep: jax.Array | None):
    """The ViT's embedding [B, E] and its dense reading [B, n, E], which share all but the last attention.

    A ResNet's embedding *is* a weighted sum of its value features. A ViT's class token gathers in every layer, so it
    may know what is there while the patches' last values do not (pooled loss 2.9, dense 3.6: 9 mIoU). A caption asks
    them itself when each phrase is scored by the patches that answer to it (PACL, Mukhoti et al. 2023).
    """
    tower = model.visual
    x = tower.transformer.walk(tower._embed(images, None, keep)).tokens
    block = tower.transformer.resblocks[-1]
    attention, y = block.attn, block.ln_1(x)
    split = lambda a: a.reshape(*a.shape[:2], attention.heads, -1)  # noqa: E731
    q, k, v = attention.q_proj(y[:, :1]), attention.k_proj(y), attention.v_proj(y)
    seen = attend(split(q), split(k), split(v)).reshape(q.shape)
    both = x + attention.out_proj(jnp.concatenate([seen, v[:, 1:]], axis=1))
    both = tower._project(both + block.mlp(block.ln_2(both)))
    return both[:, 0], both[:, 1:]


def optimizer(run: Training, steps: jax.Array | int) -> optax.GradientTransformation:
    """AdamW on matrices, Adam on the rest, warm-up and cosine to zero. `steps` may be traced: no length is compiled."""

    def schedule(step: jax.Array) -> jax.Array:
        late = jnp.clip((step - run.warmup) / jnp.maximum(steps - run.warmup, 1), 0, 1)
        return run.learning_rate * jnp.minimum(step / run.warmup, 0.5 + 0.5 * jnp.cos(jnp.pi * late))

    decay = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=run.weight_decay, mask=decay),
    )


@partial(jax.jit, static_argnames=("model", "run", "size", "dense"), donate_argnames="state")
def train_step(state, corpus, steps, *, model: CLIP, run: Training, size: int, dense: bool):
    """One of `steps` steps of AdamW; the key follows from the seed and the step: a resumed run repeats itself."""
    key, batch_key = jax.random.split(jax.random.fold_in(jax.random.key(run.seed), state["step"]))
    batch = draw_batch(batch_key, corpus, run.batch, run.closeups, state["step"] / steps)
    objective = lambda p: losses(model, run, p, state["batch_stats"], key, batch, size, dense)  # noqa: E731
    (_, (batch_stats, *terms)), gradient = jax.value_and_grad(objective, has_aux=True)(state["params"])
    updates, opt_state = optimizer(run, steps).update(gradient, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    new = {"params": params, "batch_stats": batch_stats, "opt_state": opt_state, "step": state["step"] + 1}
    return new, jnp.stack(terms)


def save(path: Path, data: bytes) -> None:
    """Writes to a temporary name, then renames."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.rename(path)


def main() -> None:
    from experiments.toy_world.evaluate_clip import dense_scores
    from maskclip_jax.data.vocabulary import class_set, prompt_templates

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--evaluate-every", type=int, default=500)
    parser.add_argument("--log-every", type=int, default=50)
    for field in dataclasses.fields(Training):
        kind = {"int": int, "float": float, "bool": lambda s: s == "True"}.get(str(field.type), str)
        if "tuple" not in str(field.type):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    parser.add_argument("--sizes", type=lambda s: tuple(map(int, s.split(","))), default=Training.sizes)
    parser.add_argument("--closeups", type=lambda s: tuple(map(float, s.split(","))), default=Training.closeups)
    args = parser.parse_args()
    run = Training(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Training)})
    if not 0 < run.objects < 1:
        parser.error(f"--objects is a share between 0 and 1, got {run.objects:g}: {Training.objects} was right here")
    args.out.mkdir(parents=True, exist_ok=True)
    settings = args.out / "training.json"
    wanted = json.loads(json.dumps(dataclasses.asdict(run)))
    if settings.exists() and json.loads(settings.read_text()) != wanted:
        raise SystemExit(f"{args.out} holds a run with other settings: choose another --out, or its settings")
    save(settings, json.dumps(wanted, indent=1).encode())

    templates = list(prompt_templates("maskclip"))
    if run.init and not (args.out / "tokenizer.json").exists():
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"):
            shutil.copy(Path(run.init) / name, args.out / name)
    elif not (args.out / "tokenizer.json").exists():
        names = [str(n) for s in ("voc20", "context59", "coco-stuff171", "ade20k150") for n in class_set(s)]
        scenes = json.loads((args.scenes / "wide" / "scenes.json").read_text())["scenes"]
        make_tokenizer(args.out, corpus(scenes, templates, names))
    tokenize = load_tokenizer(args.out)
    data = load_corpus(args.scenes, tokenize, templates, run.seed)
    vocabulary = json.loads((args.out / "vocab.json").read_text())
    config = clip_config(run.tower, len(vocabulary))
    model, reader = CLIP(config, dtype=jnp.dtype(run.dtype)), CLIP(config)
    variables = jax.jit(model.init)(
        jax.random.key(run.seed), jnp.zeros((2, 96, 96, 3)), jnp.zeros((2, CONTEXT_LENGTH), jnp.int32)
    )
    state = {
        "params": variables["params"],
        "batch_stats": variables.get("batch_stats", {}),
        "opt_state": optimizer(run, run.steps).init(variables["params"]),
        "step": jnp.zeros((), jnp.int32),
    }
    if run.init:
        before = serialization.msgpack_restore((Path(run.init) / "state.msgpack").read_bytes())
        for name in ("params", "batch_stats"):  # which may be stored in half precision
            begun = serialization.from_state_dict(state[name], before[name])
            state[name] = jax.tree.map(lambda ours, its: jnp.asarray(its, ours.dtype), state[name], begun)
    checkpoint, curve = args.out / "state.msgpack", args.out / "curve.jsonl"
    if checkpoint.exists():
        state = jax.tree.map(jnp.asarray, serialization.from_bytes(state, checkpoint.read_bytes()))
        print(f"goes on after step {int(state['step'])}", flush=True)
    any_length = dataclasses.replace(run, steps=0, init="", whole_from=0)
    began, recent, logged = time.time(), [], time.time()
    for step in range(int(state["step"]) + 1, run.steps + 1):
        progress = (step - 1) / run.steps
        rng = np.random.default_rng([run.seed, step])
        size = run.sizes[rng.integers(len(run.sizes))] if progress >= run.small_until else run.sizes[0]
        dense, read = progress >= run.dense_from, any_length
        if progress >= run.whole_from:
            size, read = run.sizes[-1], dataclasses.replace(any_length, keep=1.0)
        state, terms = train_step(state, data, run.steps, model=model, run=read, size=size, dense=dense)
        recent.append(terms)
        if step % args.log_every == 0:
            by_phrase, by_caption, by_object, by_position = np.mean(np.stack(recent), axis=0)
            rate, logged, recent = len(recent) / (time.time() - logged), time.time(), []
            print(
                f"step {step}/{run.steps}  phrases {by_phrase:.3f}  captions {by_caption:.3f}  "
                f"objects {by_object:.3f}  positions {by_position:.3f}  "
                f"scale {float(jnp.exp(state['params']['logit_scale'])):.1f}  "
                f"{rate * run.batch:.0f} images/s  ETA {(run.steps - step) / rate / 60:.1f} min",
                flush=True,
            )
        if step % args.evaluate_every == 0 or step == run.steps:
            save(checkpoint, serialization.to_bytes(jax.device_get(state)))
            variables = {k: state[k] for k in ("params", "batch_stats")}
            scores = dense_scores(reader, variables, tokenize, args.scenes / "validation.npz", 200)
            print(f"step {step}  " + "  ".join(f"{k} {v:.1f}" for k, v in scores.items()), flush=True)
            with curve.open("a") as file:
                file.write(json.dumps({"step": step, "seconds": time.time() - began, **scores}) + "\n")


if __name__ == "__main__":
    main()
