"""ImageNet and CLIP weights into students: every naming scheme, and the report when they do not fit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import make_torch_files
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from maskclip_jax.errors import UserError
from maskclip_jax.ops.module import shapes_of
from maskclip_jax.students import StudentConfig, create_student
from maskclip_jax.students import weights as W

GOLDEN = Path(__file__).parents[1] / "golden"
LAYERS, BASE = (2, 1, 1, 1), 4
IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
TEXT = jax.ShapeDtypeStruct((2, 8), jnp.float32)


def variables_for(stem):
    config = StudentConfig(width=8, backbone="resnet50", layers=LAYERS, base_width=BASE, stem=stem, rates=(1,))
    shapes = shapes_of(create_student(config), IMAGES, TEXT)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def conv(rng, name, out, inp, k):
    return {f"{name}.weight": rng.normal(size=(out, inp, k, k)).astype(np.float32)}


def norm(rng, name, width):
    leaves = {f"{name}.{leaf}": rng.normal(size=width) for leaf in ("weight", "bias", "running_mean", "running_var")}
    leaves[f"{name}.running_var"] = np.abs(leaves[f"{name}.running_var"])
    arrays = {key: value.astype(np.float32) for key, value in leaves.items()}
    return arrays | {f"{name}.num_batches_tracked": np.array(7)}


def timm(rng):
    """resnet50c's names at a tiny width."""
    state = conv(rng, "conv1.0", 2, 3, 3) | norm(rng, "conv1.1", 2) | conv(rng, "conv1.3", 2, 2, 3)
    state |= norm(rng, "conv1.4", 2) | conv(rng, "conv1.6", 4, 2, 3) | norm(rng, "bn1", 4)
    state |= {"fc.weight": rng.normal(size=(10, 128)), "fc.bias": rng.normal(size=10)}
    return state | blocks(rng, lambda s, b, part: f"layer{s + 1}.{b}.{part}")


def torchvision(rng):
    state = conv(rng, "conv1", 4, 3, 7) | norm(rng, "bn1", 4)
    return state | blocks(rng, lambda s, b, part: f"layer{s + 1}.{b}.{part}")


def huggingface(rng):
    """microsoft/resnet-50's names at a tiny width."""
    parts = {"downsample.0": "shortcut.convolution", "downsample.1": "shortcut.normalization"}
    parts |= {f"conv{i + 1}": f"layer.{i}.convolution" for i in range(3)}
    parts |= {f"bn{i + 1}": f"layer.{i}.normalization" for i in range(3)}
    stem = "resnet.embedder.embedder"
    state = conv(rng, f"{stem}.convolution", 4, 3, 7) | norm(rng, f"{stem}.normalization", 4)
    state |= {"classifier.1.weight": rng.normal(size=(10, 128)), "classifier.1.bias": rng.normal(size=10)}
    return state | blocks(rng, lambda s, b, part: f"resnet.encoder.stages.{s}.layers.{b}.{parts[part]}")


def blocks(rng, name):
    state, inputs = {}, BASE
    for stage, layers in enumerate(LAYERS):
        planes = BASE * 2**stage
        for block in range(layers):
            for part, out, inp, k in (("1", planes, inputs, 1), ("2", planes, planes, 3), ("3", planes * 4, planes, 1)):
                state |= conv(rng, name(stage, block, f"conv{part}"), out, inp, k)
                state |= norm(rng, name(stage, block, f"bn{part}"), out)
            if block == 0:
                state |= conv(rng, name(stage, block, "downsample.0"), planes * 4, inputs, 1)
                state |= norm(rng, name(stage, block, "downsample.1"), planes * 4)
            inputs = planes * 4
    return state


SCHEMES = {"timm": (timm, "v1c"), "huggingface": (huggingface, "v1"), "torchvision": (torchvision, "v1")}


@pytest.fixture(params=SCHEMES)
def case(request):
    make, stem = SCHEMES[request.param]
    return request.param, make(np.random.default_rng(0)), variables_for(stem)


def test_every_scheme_fills_the_backbone(case):
    name, state, variables = case
    assert W.detect_format(state) == name
    assert W.STEMS[name] in ("v1", "v1c")
    before = traverse_util.flatten_dict(variables)
    after = traverse_util.flatten_dict(W.convert_state_dict(state, variables))
    assert after.keys() == before.keys()
    sums = sorted(float(np.sum(leaf)) for path, leaf in after.items() if path[1] == "backbone")
    theirs = sorted(
        float(np.sum(value))
        for key, value in state.items()
        if not key.startswith(("fc", "classifier")) and not key.endswith("tracked")
    )
    np.testing.assert_allclose(sums, theirs, rtol=1e-4, atol=1e-5)  # each array went somewhere, once
    for path, leaf in after.items():
        if path[1] == "head":
            np.testing.assert_array_equal(leaf, before[path])


def test_leaves_arrive_at_their_places():
    timm_state, hf_state = timm(np.random.default_rng(0)), huggingface(np.random.default_rng(0))
    converted = W.convert_state_dict(timm_state, variables_for("v1c"))
    block = converted["params"]["backbone"]["layer1_1"]
    np.testing.assert_array_equal(block["conv2"]["kernel"][2, 0, 1, 3], timm_state["layer1.1.conv2.weight"][3, 1, 2, 0])
    np.testing.assert_array_equal(block["bn3"]["scale"], timm_state["layer1.1.bn3.weight"])
    np.testing.assert_array_equal(converted["params"]["backbone"]["bn3"]["bias"], timm_state["bn1.bias"])
    converted = W.convert_state_dict(hf_state, variables_for("v1"))
    prefix = "resnet.encoder.stages.3.layers.0"
    np.testing.assert_array_equal(
        converted["batch_stats"]["backbone"]["layer4_0"]["downsample_1"]["var"],
        hf_state[f"{prefix}.shortcut.normalization.running_var"],
    )
    np.testing.assert_array_equal(
        converted["params"]["backbone"]["layer4_0"]["conv3"]["kernel"][0, 0],
        hf_state[f"{prefix}.layer.2.convolution.weight"][:, :, 0, 0].T,
    )


def test_both_sides_are_listed(case):
    name, state, variables = case
    key = next(key for key in state if key.endswith("weight") and ("layer1.0.conv2" in key or "0.layer.1.conv" in key))
    state["surplus.weight"] = state.pop(key)
    with pytest.raises(UserError) as error:
        W.convert_state_dict(state, variables)
    assert f"{name} weights" in str(error.value)
    assert "their keys unused: surplus.weight" in str(error.value)
    assert "our parameters unfilled: params/backbone/layer1_0/conv2/kernel" in str(error.value)
    assert "\n" not in str(error.value)


def test_another_depth_stem_or_width_is_refused():
    state = timm(np.random.default_rng(0))
    deeper = {key.replace("layer4.0", "layer4.1"): value for key, value in state.items() if "layer4.0" in key}
    with pytest.raises(UserError, match=r"unused: layer4\.1"):
        W.convert_state_dict(state | deeper, variables_for("v1c"))
    with pytest.raises(UserError, match=r"unused: bn1\.bias|unused: .*conv1\.3"):
        W.convert_state_dict(state, variables_for("v1"))
    state["layer1.0.conv1.weight"] = np.zeros((5, 4, 1, 1), np.float32)
    with pytest.raises(UserError, match=r"layer1\.0\.conv1\.weight \(1, 1, 4, 5\) for .*conv1/kernel \(1, 1, 4, 4\)"):
        W.convert_state_dict(state, variables_for("v1c"))


def test_unknown_format_is_refused():
    with pytest.raises(UserError, match="no known format"):
        W.convert_state_dict({"features.0.weight": np.zeros(3)}, variables_for("v1"))


@pytest.mark.parametrize(("depth", "blocks3"), [("resnet50", 6), ("resnet101", 23)])
def test_tables_cover_the_full_size_backbones(depth, blocks3):
    """Keys of the real files, without their arrays: every one of ours is named once."""
    for stem, make in (("v1c", timm), ("v1", huggingface)):
        student = create_student(StudentConfig(width=8, backbone=depth, stem=stem))
        ours = traverse_util.flatten_dict(shapes_of(student, IMAGES, TEXT))
        table = W.FORMATS[W.detect_format(make(np.random.default_rng(0)))][1]
        layers = (3, 4, blocks3, 3)
        names = real_names(stem, layers)
        paths = [W._our_leaf(name, table) for name in names]
        assert len(set(paths)) == len(names)
        assert set(paths) == {path for path in ours if path[1] == "backbone"}


def real_names(stem, layers):
    hf = stem == "v1"
    if hf:
        embedder = "resnet.embedder.embedder"
        convs, norms = [f"{embedder}.convolution"], [f"{embedder}.normalization"]
    else:
        convs, norms = ["conv1.0", "conv1.3", "conv1.6"], ["conv1.1", "conv1.4", "bn1"]
    for stage, n in enumerate(layers):
        for block in range(n):
            prefix = f"resnet.encoder.stages.{stage}.layers.{block}" if hf else f"layer{stage + 1}.{block}"
            convs += [f"{prefix}.layer.{i}.convolution" if hf else f"{prefix}.conv{i + 1}" for i in range(3)]
            norms += [f"{prefix}.layer.{i}.normalization" if hf else f"{prefix}.bn{i + 1}" for i in range(3)]
            if block == 0:
                convs.append(f"{prefix}.shortcut.convolution" if hf else f"{prefix}.downsample.0")
                norms.append(f"{prefix}.shortcut.normalization" if hf else f"{prefix}.downsample.1")
    leaves = ("weight", "bias", "running_mean", "running_var")
    return [f"{name}.weight" for name in convs] + [f"{name}.{leaf}" for name in norms for leaf in leaves]


def test_files_and_folders_are_read(tmp_path):
    state = {key: np.ascontiguousarray(value) for key, value in timm(np.random.default_rng(0)).items()}
    save_file({key: value.astype(np.float16) for key, value in state.items()}, tmp_path / "model.safetensors")
    variables = variables_for("v1c")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded = W.load_backbone_weights(path, variables)
        kernel = loaded["params"]["backbone"]["conv1"]["kernel"]
        assert kernel.dtype == np.float32
        np.testing.assert_allclose(kernel, state["conv1.0.weight"].transpose(2, 3, 1, 0), rtol=1e-3)


def test_files_of_torch_are_read_without_it(tmp_path):
    """As a file of any suffix, as a folder's `pytorch_model.bin`, and out of a training checkpoint's "state_dict"."""
    expected = make_torch_files.forms()
    for name in ("state.pt", "legacy.pt", "training.pt"):
        content = (GOLDEN / "torch_files" / name).read_bytes()
        (tmp_path / "resnet50.pth").write_bytes(content)
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        for path in (tmp_path, tmp_path / "resnet50.pth"):
            state = W.read_state_dict(path)
            prefix = "module." if name == "training.pt" else ""
            assert {prefix + key for key in expected} <= set(state)
            for key, array in expected.items():
                np.testing.assert_array_equal(state[prefix + key], array)


def test_missing_and_broken_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no ImageNet weights at"):
        W.read_state_dict(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match=r"no ImageNet weights in .*: it holds none of model.safetensors"):
        W.read_state_dict(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        W.read_state_dict(tmp_path)
    with pytest.raises(UserError, match="which is not run"):
        W.read_state_dict(GOLDEN / "torch_files" / "hostile.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.astype(np.int8), "is of type int8"),
        (lambda x: np.full_like(x, np.nan), "holds NaN or infinity"),
        (lambda x: np.full_like(x, -1), "is a negative variance"),
    ],
)
def test_numbers_that_are_no_weights(change, words):
    state = timm(np.random.default_rng(0))
    state["bn1.running_var"] = change(state["bn1.running_var"])
    with pytest.raises(UserError, match=f"finite floating-point numbers, but bn1.running_var {words}"):
        W.convert_state_dict(state, variables_for("v1c"))


def test_clip_tower_becomes_the_backbone():
    """Fine-tuned CLIP (paper §3.2): the teacher's tower nests its stem and has an attention pool besides."""
    variables = variables_for("clip")
    donor = traverse_util.flatten_dict(variables)
    tower = {}
    for (collection, part, *path), leaf in donor.items():
        if part == "backbone":
            path = path if path[0].startswith("layer") else ["stem", *path]
            tower[(collection, *path)] = leaf + 1.0
    tower[("params", "attnpool", "c_proj", "kernel")] = np.zeros((2, 2))
    after = W.backbone_from_clip(traverse_util.unflatten_dict(tower), variables)
    for path, leaf in traverse_util.flatten_dict(after).items():
        np.testing.assert_array_equal(leaf, donor[path] + (1.0 if path[1] == "backbone" else 0.0))
    tower[("params", "layer9_0", "conv1", "kernel")] = tower.pop(("params", "layer1_0", "conv1", "kernel"))
    with pytest.raises(UserError, match=r"unused: params/backbone/layer9_0.*unfilled: params/backbone/layer1_0"):
        W.backbone_from_clip(traverse_util.unflatten_dict(tower), variables)


def test_a_student_starts_from_another_and_keeps_what_is_its_own():
    """All of the other's arrays are taken; what it has not, here a decoder, stays as it was."""
    theirs, ours = variables_for("clip"), variables_for("clip")
    ours["params"]["head"]["decoder_0"] = {"conv": {"kernel": np.ones((1, 1, 24, 3), np.float32)}}
    theirs = jax.tree.map(lambda x: np.asarray(x + 1, np.float64), theirs)
    found = W.start_from_student(theirs, ours)
    assert W.modules_beyond(theirs["params"], ours["params"]) == ["head/decoder_0"]
    kernel = found["params"]["head"].pop("decoder_0")["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, 1)
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.float32, theirs))


def test_a_student_that_does_not_fit_is_told_by_what():
    theirs, ours = variables_for("clip"), variables_for("clip")
    theirs["params"]["head"]["bottleneck"] = {"conv": {"kernel": np.ones((1, 1, 4, 4), np.float32)}}
    theirs["params"]["head"]["aspp_0"]["conv"]["kernel"] = np.ones((3, 3, 2, 8), np.float32)
    with pytest.raises(UserError) as error:
        W.start_from_student(theirs, ours)
    assert "the student to start from does not fit this one" in str(error.value)
    assert "unused: params/head/bottleneck/conv/kernel" in str(error.value)
    assert "(3, 3, 2, 8) for params/head/aspp_0/conv/kernel" in str(error.value)
