"""CLIPs of any architecture with random weights, drawn without compiling an initialiser: the one place that does."""

import dataclasses
import functools

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from maskclip_jax.checkpoints.pretrained import Pretrained, Reading
from maskclip_jax.checkpoints.weights import abstract_variables
from maskclip_jax.data.preprocess import Preprocess
from maskclip_jax.encoders.model import CLIP


def random_variables(config, seed=0, logit_scale=30.0):
    """Every array of a `CLIPConfig`'s model, of a sensible size; batch variances are positive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name == "logit_scale":
            return np.float32(np.log(logit_scale))
        if name in ("bias", "mean"):
            return rng.normal(0, 0.1, shape).astype(np.float32)
        if name in ("scale", "var"):
            return rng.uniform(0.8, 1.2, shape).astype(np.float32)
        fan_in = np.prod(shape[:-1]) if name in ("kernel", "conv1") else shape[0] if name == "proj" else 1
        return (rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)

    shapes = unflatten_dict(abstract_variables(config), sep="/")
    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


def random_pretrained(config, tokenizer, *, seed=0, logit_scale=30.0, reading=None, **sizes) -> Pretrained:
    """A model ready for `segment_images`; `sizes` are fields of its `Preprocess`."""
    preprocess = Preprocess((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), multiple=config.multiple, **sizes)
    if config.fidelity.image_resize == "opencv":
        preprocess = dataclasses.replace(preprocess, interpolation="opencv")
    variables = random_variables(config, seed, logit_scale)
    return Pretrained(CLIP(config), variables, config, tokenizer, preprocess, reading or Reading())


def compiled_apply(module, variables, *arrays, **options):
    """`module.apply(…)` as one program: operation by operation, XLA would be asked some hundred times."""
    return jax.jit(functools.partial(module.apply, **options))(variables, *arrays)
