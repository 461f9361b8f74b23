"""The student as a whole: shapes, sizes, the text head, configuration, gradients."""

import functools
import json
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from random_clip import compiled_apply

from maskclip_jax.errors import UserError
from maskclip_jax.ops.module import shapes_of
from maskclip_jax.students import StudentConfig, create_student
from maskclip_jax.students.classifier import LearnedHead, Mapper, TextHead
from maskclip_jax.students.layers import resize_bilinear
from maskclip_jax.students.resnet import VARIANTS, ResNet, Variant

KEY = jax.random.key(0)


def filled(shapes):
    """Arrays for abstract variables, drawn by NumPy: compiling an initialiser takes longer than the tests."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1] in ("scale", "var"):
            return jnp.ones(leaf.shape)
        if path[-1] in ("bias", "mean"):
            return jnp.zeros(leaf.shape)
        fan_out = leaf.shape[-1] * (9 if leaf.shape[0] == 3 else 1)
        return jnp.asarray(rng.normal(0, np.sqrt(2 / fan_out), leaf.shape), jnp.float32)

    return traverse_util.path_aware_map(draw, shapes)


def init(student, images, text):
    return filled(shapes_of(student, images, text))


HEADS = ("deeplabv2", "deeplabv3plus", "pspnet")
TINY = {"width": 8, "backbone": "small", "layers": (1, 1, 1, 1), "base_width": 4, "expansion": 2}
RATES = {"deeplabv2": (1, 2), "deeplabv3plus": (1, 2), "pspnet": (1, 2)}


def shapes(config, size=(64, 96), classes=3, **options):
    """Abstract variables and logits of a student on a 2-image batch; nothing is computed."""
    student = create_student(config)
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    text = jax.ShapeDtypeStruct((classes, config.width), jnp.float32)
    variables = shapes_of(student, images, text)
    return variables, jax.eval_shape(lambda v, i, t: student.apply(v, i, t, **options), variables, images, text)


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_full_size_students_have_the_published_sizes(backbone, head):
    variables, logits = shapes(StudentConfig(width=512, head=head, backbone=backbone))
    # timm: resnet50c 25,576,264 and resnet101c 44,568,392 parameters, less fc's 2,049,000
    published = {"resnet50": 23_527_264, "resnet101": 42_519_392}
    assert count(variables["params"]["backbone"]) == published[backbone]
    assert logits.shape == ((2, 16, 24, 3) if head == "deeplabv3plus" else (2, 8, 12, 3))
    if head == "deeplabv2":
        assert count(variables["params"]["head"]) == 4 * (9 * 2048 * 512 + 2 * 512)
    assert "classifier" not in variables["params"]


def test_v1_stem_has_the_published_size():
    net = ResNet(VARIANTS["resnet50"], stem="v1")
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(lambda key, x: net.init(key, x, False), KEY, images)["params"]
    assert count(params) == 25_557_032 - 2_049_000  # torchvision's resnet50, less fc


def test_small_student_is_small():
    variables, logits = shapes(StudentConfig(width=128, backbone="small"), size=(96, 96))
    assert 1.5e6 < count(variables["params"]) < 1.7e6
    assert logits.shape == (2, 12, 12, 3)


@pytest.mark.parametrize(("stride", "grid"), [(8, (8, 13)), (16, (4, 7)), (32, (2, 4))])
def test_output_stride(stride, grid):
    _, logits = shapes(StudentConfig(**TINY, output_stride=stride), size=(64, 100))
    assert logits.shape == (2, *grid, 3)


def test_dilated_stages_see_half_the_dilation_in_their_first_block():
    """Where an impulse is seen tells the dilations: with all weights one, the reach of stages 3 and 4 adds up."""
    net = ResNet(Variant((1, 1, 2, 2), base_width=2, expansion=1), output_stride=8)
    images = jnp.zeros((1, 320, 320, 3))
    variables = jax.eval_shape(lambda key, x: net.init(key, x, False), KEY, images)
    variables = {
        "params": traverse_util.path_aware_map(
            lambda path, leaf: jnp.full(leaf.shape, 0.0 if path[-1] == "bias" else 1.0), variables["params"]
        ),
        "batch_stats": filled(variables["batch_stats"]),
    }
    impulse = jax.jit(net.apply, static_argnums=2)(variables, images.at[0, 160, 160].set(1.0), False)

    def reach(stage):
        seen = np.flatnonzero(np.asarray(stage)[0].sum((1, 2)) > 0)
        return seen.max() - seen.min() + 1

    # one 3×3 at dilation d widens by 2d: stage 3 has 1 then 2, stage 4 has 2 then 4
    assert reach(impulse.stage3) - reach(impulse.stage2) == 2 * (1 + 2)
    assert reach(impulse.stage4) - reach(impulse.stage3) == 2 * (2 + 4)


def test_a_bottleneck_stands_before_the_branches():
    found, logits = shapes(StudentConfig(**TINY, rates=(1, 2), bottleneck=3))
    kernels = {name: part["conv"]["kernel"].shape for name, part in found["params"]["head"].items()}
    assert kernels == {"bottleneck": (1, 1, 64, 3), "aspp_0": (3, 3, 3, 8), "aspp_1": (3, 3, 3, 8)}
    assert logits.shape == shapes(StudentConfig(**TINY, rates=(1, 2)))[1].shape


def test_a_decoder_brings_the_branches_to_stride_4():
    config = StudentConfig(**TINY, rates=(1, 2), decoder_width=3)
    found, logits = shapes(config, size=(64, 100))
    kernels = {name: part["conv"]["kernel"].shape for name, part in found["params"]["head"].items() if "conv" in part}
    assert {name: kernels[name] for name in kernels if name.startswith("decoder")} == {
        "decoder_0": (1, 1, 8 + 8, 3),  # features beside stage 1
        "decoder_1": (3, 3, 3, 3),
        "decoder_2": (3, 3, 3, 3),
    }
    assert logits.shape == (2, config.cells(64), config.cells(100), 3) == (2, 16, 25, 3)


def test_a_decoder_begins_as_interpolation_and_learns():
    config = StudentConfig(**TINY, rates=(1, 2), decoder_width=3)
    plain, decoded = create_student(replace(config, decoder_width=None)), create_student(config)
    images, text = jax.random.normal(KEY, (1, 32, 40, 3)), jax.random.normal(KEY, (3, 8))
    variables = jax.jit(decoded.init)(KEY, images, text)
    logits = compiled_apply(decoded, variables, images, text)
    before = {name: part | {"head": _branches(part["head"])} for name, part in variables.items()}
    coarse = compiled_apply(plain, before, images, text)
    np.testing.assert_allclose(logits, resize_bilinear(coarse, (8, 10)), atol=1e-4)

    def loss(params):
        return decoded.apply(variables | {"params": params}, images, text).std()

    grads = jax.jit(jax.grad(loss))(variables["params"])["head"]
    assert np.abs(grads["decoder_bn"]["scale"]).max() > 0


def _branches(head):
    return {name: value for name, value in head.items() if not name.startswith("decoder")}


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_learns_and_statistics_move(head):
    config = StudentConfig(**TINY, head=head, rates=RATES[head], background=True, zero_init_residual=False)
    student = create_student(config)
    images, text = jax.random.normal(KEY, (2, 32, 40, 3)), jax.random.normal(KEY, (3, 8))
    variables = init(student, images, text)

    def loss(params, dropout):
        logits, updates = student.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            images,
            text,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout},
        )
        return -jax.nn.log_softmax(logits)[..., 1].mean(), updates

    graded = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, updates), grads = graded(variables["params"], KEY)
    assert np.isfinite(value)
    for path, grad in traverse_util.flatten_dict(grads, sep="/").items():
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), updates["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(moved))
    # a step down the gradient goes down by |gradient|² times the step
    norm = sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads))
    step = 1e-4 / np.sqrt(norm)
    ends = [
        graded(jax.tree.map(lambda p, g, s=s: p + s * step * g, variables["params"], grads), KEY)[0][0] for s in (1, -1)
    ]
    assert float(ends[0] - ends[1]) == pytest.approx(2 * step * norm, rel=0.02)


def test_logits_are_features_times_text():
    student = create_student(StudentConfig(**TINY))
    images, text = jax.random.normal(KEY, (1, 32, 32, 3)), jax.random.normal(KEY, (3, 8))
    variables = init(student, images, text)
    features = np.asarray(compiled_apply(student, variables, images, method="features"))
    assert np.abs(features).max() > 0
    logits = compiled_apply(student, variables, images, text)
    np.testing.assert_allclose(logits, features @ np.asarray(text).T, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("head", [TextHead(8, mapper="mlp"), LearnedHead(3)])
def test_class_scores_are_exact_products(head):
    """In the forward pass and in its gradients, where an accelerator's default would round to bfloat16 or TF32."""
    arguments = (jnp.zeros((1, 2, 2, 8)), *((jnp.zeros((3, 8)),) if isinstance(head, TextHead) else ()), False)
    variables = head.init(KEY, *arguments)
    loss = lambda v, x: head.apply(v, x, *arguments[1:]).sum()  # noqa: E731
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(variables, arguments[0]).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) >= 3
    assert all("HIGHEST" in line for line in products)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
    student = create_student(StudentConfig(**TINY, dtype="bfloat16"))
    images, text = jax.random.normal(KEY, (1, 32, 32, 3)), jax.random.normal(KEY, (3, 8))
    variables = init(student, images, text)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    features = functools.partial(student.apply, method="features")
    assert jax.eval_shape(features, variables, images).dtype == jnp.bfloat16
    logits = compiled_apply(student, variables, images, text)
    assert logits.dtype == jnp.float32
    exact = np.asarray(compiled_apply(create_student(StudentConfig(**TINY)), variables, images, text))
    assert np.abs(logits - exact).max() / np.abs(exact).max() < 0.05


def test_background_is_a_normalised_class_0_and_norm_feat_gives_cosines():
    features = jnp.array([3.0, 4.0]).reshape(1, 1, 1, 2)
    text = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    variables = {"params": {"background": jnp.array([[0.0, 5.0]])}}
    logits = TextHead(2, background=True).apply(variables, features, text, False)
    np.testing.assert_allclose(logits[0, 0, 0], [4, 3, 4], rtol=1e-6)
    cosines = TextHead(2, background=True, norm_feat=True).apply(variables, features, text, False)
    np.testing.assert_allclose(cosines[0, 0, 0], [0.8, 0.6, 0.8], rtol=1e-6)


def test_dropout_drops_whole_channels_and_only_in_training():
    features = jnp.ones((2, 5, 4, 100))
    head = TextHead(100, dropout=0.5)
    logits = np.asarray(head.apply({}, features, jnp.eye(100), True, rngs={"dropout": KEY}))
    assert set(np.unique(logits)) == {0.0, 2.0}
    np.testing.assert_array_equal(logits, np.broadcast_to(logits[:, :1, :1], logits.shape))
    assert 50 < (logits[:, 0, 0] == 0).sum() < 150
    np.testing.assert_array_equal(head.apply({}, features, jnp.eye(100), False), features)


def test_mapper():
    text = jnp.array([[1.0, -2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(Mapper("identity", 2).apply({}, text), text)
    out = {"kernel": jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]), "bias": jnp.array([0.0, 0.0, 1.0])}
    linear = Mapper("linear", 3).apply({"params": {"out": out}}, text)
    np.testing.assert_allclose(linear, [[1, -2, 1], [3, 4, 11]])
    hidden = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
    mlp = Mapper("mlp", 3).apply({"params": {"hidden": hidden, "out": out}}, text)
    np.testing.assert_allclose(mlp, [[1, 0, 3], [3, 4, 11]])


def test_config_survives_json():
    config = StudentConfig(**TINY, head="pspnet", rates=(1, 2), bn_axis_name="batch")
    assert StudentConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(UserError, match=r"unknown keys .*depth"):
        StudentConfig.from_dict({"width": 8, "depth": 50})
    with pytest.raises(UserError, match="lacks width"):
        StudentConfig.from_dict({})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head": "fcn"}, "student.head is one of deeplabv2, deeplabv3plus, pspnet, got fcn"),
        ({"backbone": "vgg"}, "student.backbone is one of resnet50, resnet101, small, got vgg"),
        ({"output_stride": 4}, "student.output_stride is one of 8, 16, 32, got 4"),
        ({"dtype": "float16"}, "student.dtype is one of .*, got float16"),
        ({"dropout": 1.0}, "student.dropout is at least 0 and below 1, got 1.0"),
        ({"bottleneck": 4, "head": "pspnet"}, "student.bottleneck is deeplabv2's, got the head pspnet"),
        ({"decoder_width": 4, "head": "deeplabv3plus"}, "student.decoder_width is deeplabv2's, got the head"),
        ({"decoder_width": 0}, "student.decoder_width is within 1"),
        ({"bottleneck": 0}, "student.bottleneck is within 1"),
        ({"classifier": "learned"}, "needs num_classes"),
        ({"classifier": "learned", "num_classes": 3, "background": True}, "belong to the text classifier"),
    ],
)
def test_bad_configs_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        StudentConfig.from_dict({"width": 8} | values)


@pytest.mark.parametrize("text", [None, jnp.ones((3, 7))])
def test_text_of_another_width_is_refused(text):
    student = create_student(StudentConfig(**TINY))
    with pytest.raises(UserError, match=r"width 8 must be that of the text embeddings, got (None|7)"):
        shapes_of(student, jnp.ones((1, 32, 32, 3)), text)
