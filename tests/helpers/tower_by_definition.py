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


def by_definition(name, q, k, v, *, shape, sigma, norm, middle=None, share=0.4, alike=None):
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
    if name == "kk+gaussian+middle":
        naclip = by_definition("kk+gaussian", q, k, v, shape=shape, sigma=sigma, norm=norm)
        return 2 * (1 - share) * naclip + 2 * share * middle @ v
    if name == "calibrated":
        above = 3 * (alike - alike.mean())
        return (softmax(np.where(above < 0, -np.inf, above)) + softmax(s * k @ k.T)) / 2 @ v
    if name == "affinity":
        return alike @ v
    assert name == "gem"
    total = 0
    for p in (q, k, v):
        p = unit(p)
        p = unit(softmax(norm * s * p @ p.T) @ p)
        total = total + softmax(norm * s * p @ p.T) @ v
    return total / 3


def linear(p, x):
    return x @ np.float64(p["kernel"]) + np.float64(p.get("bias", 0))


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


def heads_of(q, k, v, heads, name, *, middle=None, **around):
    parts = [np.split(x, heads, axis=1) for x in (q, k, v)]
    middle = [None] * heads if middle is None else middle
    one_by_one = zip(*parts, middle, strict=True)
    return np.concatenate([by_definition(name, *one, middle=m, **around) for *one, m in one_by_one], axis=1)


def positions(c, table, shape):
    """Position embeddings of `shape`: PyTorch's bicubic by its matrices, or JAX's own resize."""
    square = np.asarray(table).reshape(c.grid, c.grid, -1)
    if c.position_filter != "bicubic":
        kind = {"bilinear": "bilinear", "bicubic_antialias": "bicubic"}[c.position_filter]
        return np.float64(jax.image.resize(square, (*shape, c.width), kind)).reshape(-1, c.width)
    rows, columns = (np.float64(interpolation_matrix(c.grid, n, method="bicubic")) for n in shape)
    return np.einsum("hi,wj,ijd->hwd", rows, columns, square).reshape(-1, c.width)


def vit_by_definition(c, visual, image, method, tokens=False):
    """Unit features of one image [h, w, E]; or the `tokens` behind the last layer norm [h, w, D]."""
    h, w = (side // c.patch_size for side in image.shape[:2])
    patches = image.reshape(h, c.patch_size, w, c.patch_size, 3).swapaxes(1, 2).reshape(h * w, -1)
    x = patches @ np.float64(visual["conv1"]).reshape(-1, c.width)
    x = x + (np.float64(visual["conv1_bias"]) if c.patch_bias else 0)
    if c.positions == "learned":
        table = np.float64(visual["positional_embedding"])
        x = x + positions(c, table[int(c.class_position) :], (h, w))
    if c.class_tokens:
        first = np.float64(visual["class_embedding"])[None] + (table[:1] if c.class_position else 0)
        x = np.concatenate([first, *([visual["registers"]] if c.class_tokens > 1 else []), x])
    norm = lambda p, x: layer_norm(p, x, c.layer_norm_eps)  # noqa: E731
    x = norm(visual["ln_pre"], x) if c.ln_pre else x
    path, blocks = None, 0 if c.head == "map" else method.blocks
    behind, looks = [], []  # of each block: its tokens, its attention by head
    angles = rotary(c, (h, w)) if c.positions == "rotary" else None
    for i in range(c.layers):
        if i == c.layers - blocks:
            middle = np.mean([looks[n - 1] for n in at(c, (6, 7, 8, 9), i)], axis=0) if looks else None
            if method.attention == "calibrated":
                break
        p = visual["transformer"][f"resblocks_{i}"]
        scale = [np.float64(p[f"ls_{n}"]) if c.layer_scale else 1 for n in (1, 2)]
        add_mlp = lambda z, p=p, s=scale[1]: z + s * mlp(p["mlp"], norm(p["ln_2"], z), c.activation)  # noqa: E731
        y = norm(p["ln_1"], x)
        q, k, v = (linear(p["attn"][f"{n}_proj"], y) for n in "qkv")
        q, k = (turned(c, z, angles, c.class_tokens) for z in (q, k))
        looks.append([softmax(a @ b.T / math.sqrt(len(a.T))) for a, b in zip(*heads(c, q, k), strict=True)])
        around = {"shape": (h, w), "sigma": method.sigma, "norm": np.linalg.norm(y, axis=-1).mean()}
        if i >= c.layers - blocks:
            path = x if path is None else path
            extra = around | {"middle": middle, "share": method.share}
            z = scale[0] * linear(p["attn"]["out_proj"], heads_of(q, k, v, c.heads, method.attention, **extra))
            path = path + z if method.residual else z
            path = add_mlp(path) if method.mlp else path
        x = add_mlp(x + scale[0] * linear(p["attn"]["out_proj"], heads_of(q, k, v, c.heads, "qk", **around)))
        behind.append(x)
    if tokens:
        return norm(visual["ln_post"], x)[c.class_tokens :].reshape(h, w, -1)

    def pooled(x, alike=None):
        x, p = norm(visual["ln_post"], x), visual["head"]
        q, k, v = (linear(p["attn"][f"{n}_proj"], x) for n in "qkv")
        around = {"shape": (h, w), "sigma": method.sigma, "norm": np.linalg.norm(x, axis=-1).mean(), "alike": alike}
        if alike is None:
            around |= {"middle": np.mean([looks[n - 1] for n in at(c, (6, 7, 8, 9), c.layers)], axis=0)}
        out = linear(p["attn"]["out_proj"], heads_of(q, k, v, c.heads, method.attention, **around))
        return out + mlp(p["mlp"], norm(p["ln"], out), c.activation) if method.mlp else out

    def last_block(x, alike):
        p = visual["transformer"][f"resblocks_{c.layers - 1}"]
        q, k, v = (linear(p["attn"][f"{n}_proj"], norm(p["ln_1"], x)) for n in "qkv")
        q, k = (turned(c, z, angles, 0) for z in (q, k))
        around = {"shape": (h, w), "sigma": 1, "norm": 1, "alike": alike}
        z = linear(p["attn"]["out_proj"], heads_of(q, k, v, c.heads, "calibrated", **around))
        return z * np.float64(p["ls_1"]) if c.layer_scale else z

    if method.attention == "calibrated":
        path = self_calibrated(c, behind, pooled if c.head == "map" else last_block, (h, w))
    elif c.head == "map":
        path = pooled(x)
    else:
        path = path[c.class_tokens :]
    out = path if c.head == "map" else norm(visual["ln_post"], path)
    out = out @ np.float64(visual["proj"]) if c.head == "projection" else out
    return unit(out).reshape(h, w, -1)


def at(c, numbers, walked):
    """Blocks of twelve, as blocks of this tower of which so many are walked."""
    return [min(max(1, round(n * c.layers / 12)), walked) for n in numbers]


def heads(c, *several):
    return [np.split(x, c.heads, axis=1) for x in several]


def rotary(c, shape):
    """Angle of every patch in each plane of a head [L, d / 2]: rows, then columns, in periods 1 to 100 (DINOv3)."""
    planes = c.width // c.heads // 4
    angles = []
    for y in range(shape[0]):
        for x in range(shape[1]):
            places = [2 * (i + 0.5) / n - 1 for i, n in zip((y, x), shape, strict=True)]
            angles.append([2 * math.pi * p / c.rotary_period ** (j / planes) for p in places for j in range(planes)])
    return np.array(angles)


def turned(c, x, angles, first):
    """Patches of every head turned in the planes (j, j + d / 2), as complex numbers."""
    if angles is None:
        return x
    out = []
    for head in np.split(x, c.heads, axis=1):
        half = head.shape[1] // 2
        z = (head[:, :half] + 1j * head[:, half:]) * np.exp(1j * np.pad(angles, ((first, 0), (0, 0))))
        out += [z.real, z.imag]
    return np.concatenate(out, axis=1)


def outliers_by_definition(x):
    """The local outlier factor with squared distances, its 5% largest (Breunig et al., 2000, as SC-CLIP has it)."""
    distances = [[sum((a - b) ** 2) for b in x] for a in x]
    n = min(30, len(x) - 1)
    near = [sorted((d, j) for j, d in enumerate(row) if j != i)[:n] for i, row in enumerate(distances)]
    reach = [row[-1][0] for row in near]
    factor = np.array([np.mean([reach[i] / reach[j] for _, j in row]) for i, row in enumerate(near)])
    return factor > np.quantile(factor, 0.95)


def self_calibrated(c, behind, read, shape):
    """SC-CLIP, from its paper's sections 3.2 to 3.4."""
    first, walked = c.class_tokens, len(behind)
    x = behind[-1]
    odd = outliers_by_definition(x[first:])

    def calm(tokens):
        out = tokens.copy()
        for i in np.flatnonzero(odd):
            y, z = divmod(i, shape[1])
            around = [(y + a, z + b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]
            around = [a * shape[1] + b for a, b in around if 0 <= a < shape[0] and 0 <= b < shape[1]]
            around = [j for j in around if not odd[j]]
            if around:
                out[i] = tokens[around].mean(0)
        return out

    def mean_of_alike(tokens, alike):
        weights = np.where(alike < 0.4, 0, alike)
        return weights / (weights.sum(1, keepdims=True) + 1e-6) @ tokens

    middle, early = (unit(t) for t in (calm(behind[at(c, [9], walked)[0] - 1][first:]),
                                       behind[at(c, [4], walked)[0] - 1][first:]))  # fmt: skip
    alike, late = middle @ middle.T, early @ early.T
    whole = sum(behind[n - 1] for n in at(c, range(4, 11), walked))
    out = 0
    for patches, tokens in ((mean_of_alike(calm(x[first:]), alike), x), (whole[first:], whole)):
        out = out + mean_of_alike(read(patches, alike) + (0.3 * tokens[0] if first else 0), late)
    return out
