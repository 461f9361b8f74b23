"""The readings beyond MaskCLIP: each formula, and each preset's whole forward, against a transcription in NumPy."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tower_by_definition import by_definition, heads_of, linear, variables_of, vit_by_definition

from maskclip_jax.checkpoints import architecture
from maskclip_jax.checkpoints.load import _variables
from maskclip_jax.encoders import dense
from maskclip_jax.encoders.config import CLIPConfig, ResNetConfig, ViTConfig
from maskclip_jax.encoders.dense import ALONE, ATTENTIONS, KEPT, MAPS, METHODS, Around, DenseMethod, dense_method
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.encoders.resnet import AttentionPool
from maskclip_jax.errors import UserError

SHAPE, SIGMA = (2, 3), 1.5
VIT = CLIPConfig(ViTConfig(32, 8, 32, 4, 2, 48), architecture.NO_TEXT, 16)
LARGER_VIT = dataclasses.replace(VIT, vision=dataclasses.replace(VIT.vision, image_size=48))
RESNET = CLIPConfig(ResNetConfig(64, 4, (1, 1, 1, 1), 4, 16), architecture.NO_TEXT, 16)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("name", [*ATTENTIONS, "pool vv"])
def test_formulas(name):
    rng = np.random.default_rng(0)
    tokens = 1 + SHAPE[0] * SHAPE[1]
    q, k, v = (rng.normal(size=(2, tokens, 3, 4)) for _ in range(3))
    norm, middle, alike = np.array([1.7, 3.1]), rng.random((2, 3, tokens, tokens)), rng.normal(size=(2, tokens, tokens))
    function = ATTENTIONS.get(name, dense.pool_value_value)
    found = (jnp.asarray(x, jnp.float32) for x in (norm, middle, alike))
    around = Around(SHAPE, None, next(found), SIGMA, next(found), 0.3, next(found))
    ours = jax.jit(lambda *qkv: function(*qkv, around))(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    for b in range(2):
        for n in range(3):
            one = (x[b, :, n] for x in (q, k, v))
            around = {"shape": SHAPE, "sigma": SIGMA, "norm": norm[b], "middle": middle[b, n], "share": 0.3}
            expected = by_definition(name, *one, alike=alike[b], **around)
            np.testing.assert_allclose(ours[b, :, n], expected, atol=1e-5)


def test_gradients_are_finite():
    q = jax.random.normal(jax.random.key(0), (1, 7, 2, 4))
    around = Around(SHAPE, None, jnp.ones(1), SIGMA, jnp.ones((1, 2, 7, 7)), 0.4, jnp.eye(7)[None])
    for function in (*ATTENTIONS.values(), dense.pool_value_value):
        loss = lambda x, f=function: jnp.square(f(x, 2 * x, x.at[0, 0].set(0), around)).sum()  # noqa: E731
        gradient = jax.jit(jax.grad(loss))(q)
        assert np.isfinite(gradient).all(), function.__name__


@functools.cache
def reader(config, method):
    options = dataclasses.asdict(method)
    read = lambda v, x, grid=None: CLIP(config).apply(v, x, grid=grid, method="encode_dense", **options)  # noqa: E731
    return jax.jit(read) if config == RESNET else read  # operation by operation, a ViT's are shared by all tests


def image_of(config, seed=1):
    side = config.vision.image_size
    return jnp.asarray(np.random.default_rng(seed).normal(size=(1, side, side, 3)), jnp.float32)


READINGS = {name: dense_method(name, VIT) for name in ALONE} | {
    "3 blocks with their MLPs": DenseMethod("qq", blocks=3),
    "values of 2 blocks": DenseMethod("value", mlp=False, blocks=2),
    "a narrow Gaussian": DenseMethod("kk+gaussian", sigma=0.5),
    "no residual": DenseMethod("kk", residual=False),
    "as the middle looks": DenseMethod("kk+gaussian+middle", share=1.0),
}


@pytest.mark.parametrize("name", READINGS)
def test_forward_of_a_vit(name):
    # Of 31 patches or fewer the two that lie farthest apart are outliers alike: rounding would choose.
    vit = LARGER_VIT if name == "sc_clip" else VIT
    method, variables, image = READINGS[name], variables_of(vit), image_of(vit)
    ours = reader(vit, method)(variables, image)
    expected = vit_by_definition(vit.vision, variables["params"]["visual"], np.asarray(image[0], np.float64), method)
    np.testing.assert_allclose(ours.features[0], expected, atol=1e-5)
    np.testing.assert_allclose(ours.keys, reader(vit, METHODS["maskclip"])(variables, image).keys, atol=1e-5)


def test_presets_differ():
    features = [reader(VIT, method)(variables_of(VIT), image_of(VIT)).features for method in READINGS.values()]
    for i, one in enumerate(features):
        assert all(np.abs(one - other).max() > 1e-3 for other in features[:i])


def test_clip_is_the_unmodified_last_layer():
    """The paper's baseline (`--naive`); of a ResNet's pool, the golden files of the released code say the same."""
    variables, image = variables_of(VIT), image_of(VIT)

    def unmodified(clip, x):
        return clip.visual._project(clip.visual(x)[1]["last"][:, 1:])

    naive = jax.jit(lambda v, x: CLIP(VIT).apply(v, x, method=unmodified))(variables, image)
    naive = np.asarray(naive / np.linalg.norm(naive, axis=-1, keepdims=True))
    found = reader(VIT, METHODS["clip"])(variables, image).features
    np.testing.assert_allclose(np.asarray(found).reshape(naive.shape), naive, atol=1e-5)  # presets differ by 1e-3


@pytest.mark.parametrize(
    "attention", [name for name in ATTENTIONS if name not in ("value", "qk", "affinity", *MAPS, *KEPT)]
)
def test_attention_pool_of_a_resnet(attention):
    """q, k and v of all positions, their mean first; for CLIP Surgery's "vv" with positions, and with its own rule."""
    c, variables = RESNET.vision, variables_of(RESNET)["params"]["visual"]["attnpool"]
    x = np.random.default_rng(3).normal(size=(2, c.grid, c.grid, c.width * 32))
    pool = AttentionPool(c.grid, c.width * 32, c.heads, RESNET.embed_dim)
    method = DenseMethod(attention, sigma=SIGMA)
    ours = pool.apply({"params": variables}, jnp.asarray(x, jnp.float32), None, None, method, method="read")
    for b in range(2):
        tokens = x[b].reshape(c.grid**2, -1)
        tokens = np.concatenate([tokens.mean(0, keepdims=True), tokens])
        if attention == "vv":
            tokens = tokens + np.float64(variables["positional_embedding"])
        around = {"shape": (c.grid, c.grid), "sigma": SIGMA, "norm": np.linalg.norm(tokens, axis=-1).mean()}
        qkv = (linear(variables[f"{n}_proj"], tokens) for n in "qkv")
        name = "pool vv" if attention == "vv" else attention
        expected = linear(variables["c_proj"], heads_of(*qkv, c.heads, name, **around))[1:]
        np.testing.assert_allclose(ours[b].reshape(c.grid**2, -1), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "name"),
    [(VIT, "naclip"), (VIT, "gem"), (RESNET, "clip_surgery")],
    ids=["vit naclip", "vit gem", "resnet surgery"],
)
def test_padding_changes_nothing_inside(config, name):
    method, variables, unit_ = dense_method(name, config), variables_of(config), config.multiple
    sizes, bucket = [(2 * unit_, 3 * unit_), (3 * unit_, unit_)], (3 * unit_, 4 * unit_)
    rng = np.random.default_rng(2)
    batch = np.full((2, *bucket, 3), 7.0, np.float32)  # not zeros: nothing of it may reach the image
    images = [rng.normal(size=(*size, 3)).astype(np.float32) for size in sizes]
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    grid = jnp.asarray(sizes) // config.stride
    padded = reader(config, method)(variables, jnp.asarray(batch), grid)
    for i, image in enumerate(images):
        alone = reader(config, method)(variables, jnp.asarray(image)[None])
        h, w = np.asarray(grid[i])
        np.testing.assert_allclose(padded.features[i, :h, :w], alone.features[0], atol=1e-5)


def test_the_general_path_agrees_with_the_fast_one():
    """Another sigma, which values do not have, is enough to leave MaskCLIP's own short path."""
    variables, image = variables_of(VIT), image_of(VIT)
    slow = reader(VIT, DenseMethod(sigma=1.0))(variables, image)
    fast = reader(VIT, DenseMethod())(variables, image)
    np.testing.assert_allclose(slow.features, fast.features, atol=1e-5)


def with_layers(layers):
    return dataclasses.replace(VIT, vision=dataclasses.replace(VIT.vision, layers=layers))


def test_presets_follow_the_tower():
    assert dense_method("gem", VIT).blocks == 2  # half of four
    deep = with_layers(12)
    assert [dense_method(name, deep).blocks for name in ("gem", "clip_surgery", "sclip")] == [6, 6, 1]
    assert dense_method("maskclip", RESNET) == DenseMethod()
    asked = {n: METHODS["resclip_rcs"].asked(n - 1, n)[0] for n in (2, 4, 12, 24)}
    assert [list(maps.values()) for maps in asked.values()] == [[1] * 4, [2, 2, 3, 3], [6, 7, 8, 9], [6, 7, 8, 9]]
    assert max(METHODS["sc_clip"].asked(11, 12)[1].values()) == 10


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: dense_method("slip", VIT), "maskclip, clip, values, sclip"),
        (lambda: DenseMethod("kq"), "value, qk, qq"),
        (lambda: DenseMethod(blocks=0), "at least 1"),
        (lambda: DenseMethod(sigma=0), "sigma above 0"),
        (lambda: DenseMethod(share=1.5), "share of attention is 0 to 1"),
        (lambda: DenseMethod("calibrated", blocks=2), "reads the last block alone"),
        (lambda: dense_method("sc_clip", RESNET), "'sc_clip' asks a ViT's earlier blocks"),
        (lambda: dense_method("resclip_rcs", with_layers(1)), "'resclip_rcs' asks a ViT's earlier blocks"),
        (lambda: dense_method(DenseMethod("qq", blocks=6), VIT), "has 4 blocks"),
    ],
)
def test_one_line_for_what_cannot_be(wrong, words):
    with pytest.raises(UserError, match=words) as error:
        wrong()
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resclip_rcs", "sc_clip"])
def test_the_authors_own_towers(name):
    """What ResCLIP's (without its feedback) and SC-CLIP's code answer on the same weights, in float64."""
    with np.load(Path(__file__).parents[1] / "golden" / "peers_readings_tiny.npz") as file:
        golden = {key: file[key] for key in file.files}
    config = CLIPConfig(ViTConfig(56, 8, 32, 12, 2, 128), architecture.NO_TEXT, 16)
    arrays = {key[2:]: array for key, array in golden.items() if key.startswith("w/")}
    with jax.enable_x64(True):
        variables = jax.tree.map(jnp.float64, _variables(arrays, config))
        image = jnp.asarray(golden["image"].transpose(0, 2, 3, 1), jnp.float64)
        read = functools.partial(CLIP(config, jnp.float64).apply, method="encode_dense")
        ours = jax.jit(functools.partial(read, **dataclasses.asdict(METHODS[name])))(variables, image).features
    theirs = golden[name] / np.linalg.norm(golden[name], axis=-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(ours).reshape(theirs.shape), theirs, atol=1e-6)
