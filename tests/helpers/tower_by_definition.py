"""A Vision Transformer and its dense readings in NumPy, one image and one head at a time: from the papers' words."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from maskclip_jax.checkpoints.weights import abstract_variables
from maskclip_jax.data.preprocess import interpolation_matrix


@functools.cache
def variables_of(config):
    """Random arrays for every parameter."""
    rng, flat = np.random.default_rng(0), {}
    for path, leaf in abstract_variables(config).items():
        name = path.rpartition("/")[2]
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 30
        array = rng.normal(size=leaf.shape) * fan_in**-0.5
        flat[path] = jnp.asarray({"var": np.exp(array), "scale": 1 + array}.get(name, array), jnp.float32)
    return unflatten_dict(flat, sep="/")


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def by_definition(name, q, k, v, *, shape, sigma, norm):
    """One head of one image, [T, d] each, in float64."""
    s = 1 / math.sqrt(q.shape[1])
    if name == "value":
        return v
    if name == "qk":
        return softmax(s * q @ k.T) @ v
    if name == "qq":
        return softmax(s * q @ q.T) @ v
    if name == "kk":
        return softmax(s * k @ k.T) @ v
    if name == "qq+kk":
        return (softmax(s * q @ q.T) + softmax(s * k @ k.T)) @ v
    if name == "vv":
        return softmax(s * v @ v.T) @ v
    if name == "pool vv":
        return softmax(8 * s * unit(v) @ unit(v).T) @ v
    if name == "kk+gaussian":
        omega, first = np.zeros((len(k), len(k))), len(k) - shape[0] * shape[1]
        for i in range(first, len(k)):
            for j in range(first, len(k)):
                (y, x), (yy, xx) = divmod(i - first, shape[1]), divmod(j - first, shape[1])
                omega[i, j] = math.exp(-((y - yy) ** 2 + (x - xx) ** 2) / (2 * sigma**2))
        return softmax(s * k @ k.T + omega) @ v
    assert name == "gem"
    total = 0
    for p in (q, k, v):
        p = unit(p)
        p = unit(softmax(norm * s * p @ p.T) @ p)
        total = total + softmax(norm * s * p @ p.T) @ v
    return total / 3


def linear(p, x):
    return x @ np.float64(p["kernel"]) + np.float64(p["bias"])


def layer_norm(p, x, eps):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * np.float64(p["scale"]) + np.float64(p["bias"])


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(p, x, activation):
    hidden = linear(p["c_fc"], x)
    if activation == "swiglu":
        hidden = hidden / (1 + np.exp(-hidden)) * linear(p["c_up"], x)
    elif activation == "gelu_tanh":
        hidden = gelu_tanh(hidden)
    elif activation == "gelu":
        hidden = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    else:
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
    return linear(p["c_proj"], hidden)


def heads_of(q, k, v, heads, name, **around):
    parts = [np.split(x, heads, axis=1) for x in (q, k, v)]
    return np.concatenate([by_definition(name, *one, **around) for one in zip(*parts, strict=True)], axis=1)


def positions(c, table, shape):
    """Position embeddings of `shape`: PyTorch's bicubic by its matrices, or JAX's own resize."""
    square = np.asarray(table).reshape(c.grid, c.grid, -1)
    if c.position_filter == "bilinear":
        return np.float64(jax.image.resize(square, (*shape, c.width), "bilinear")).reshape(-1, c.width)
    rows, columns = (np.float64(interpolation_matrix(c.grid, n, method="bicubic")) for n in shape)
    return np.einsum("hi,wj,ijd->hwd", rows, columns, square).reshape(-1, c.width)


def vit_by_definition(c, visual, image, method):
    """Unit features of one image [h, w, E]."""
    h, w = (side // c.patch_size for side in image.shape[:2])
    patches = image.reshape(h, c.patch_size, w, c.patch_size, 3).swapaxes(1, 2).reshape(h * w, -1)
    x = patches @ np.float64(visual["conv1"]).reshape(-1, c.width)
    x = x + (np.float64(visual["conv1_bias"]) if c.patch_bias else 0)
    table = np.float64(visual["positional_embedding"])
    x = x + positions(c, table[int(c.class_position) :], (h, w))
    if c.class_tokens:
        first = np.float64(visual["class_embedding"])[None] + (table[:1] if c.class_position else 0)
        x = np.concatenate([first, *([visual["registers"]] if c.class_tokens > 1 else []), x])
    norm = lambda p, x: layer_norm(p, x, c.layer_norm_eps)  # noqa: E731
    x = norm(visual["ln_pre"], x) if c.ln_pre else x
    path, blocks = None, 0 if c.head == "map" else method.blocks
    for i in range(c.layers):
        p = visual["transformer"][f"resblocks_{i}"]
        scale = [np.float64(p[f"ls_{n}"]) if c.layer_scale else 1 for n in (1, 2)]
        add_mlp = lambda z, p=p, s=scale[1]: z + s * mlp(p["mlp"], norm(p["ln_2"], z), c.activation)  # noqa: E731
        y = norm(p["ln_1"], x)
        q, k, v = (linear(p["attn"][f"{n}_proj"], y) for n in "qkv")
        around = {"shape": (h, w), "sigma": method.sigma, "norm": np.linalg.norm(y, axis=-1).mean()}
        if i >= c.layers - blocks:
            path = x if path is None else path
            z = scale[0] * linear(p["attn"]["out_proj"], heads_of(q, k, v, c.heads, method.attention, **around))
            path = path + z if method.residual else z
            path = add_mlp(path) if method.mlp else path
        x = add_mlp(x + scale[0] * linear(p["attn"]["out_proj"], heads_of(q, k, v, c.heads, "qk", **around)))
    if c.head == "map":
        x, p = norm(visual["ln_post"], x), visual["head"]
        q, k, v = (linear(p["attn"][f"{n}_proj"], x) for n in "qkv")
        around = {"shape": (h, w), "sigma": method.sigma, "norm": np.linalg.norm(x, axis=-1).mean()}
        out = linear(p["attn"]["out_proj"], heads_of(q, k, v, c.heads, method.attention, **around))
        out = out + mlp(p["mlp"], norm(p["ln"], out), c.activation) if method.mlp else out
    else:
        out = norm(visual["ln_post"], path[c.class_tokens :])
        out = out @ np.float64(visual["proj"]) if c.head == "projection" else out
    return unit(out).reshape(h, w, -1)
