"""Shapes in signatures are checked while testing (jaxtyping + beartype), and only then."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no network in tests
if os.environ["JAX_PLATFORMS"] != "cpu":  # float32 means float32: a GPU's own is TF32, a TPU's bfloat16
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
from compile_flags import QUICK

os.environ.setdefault("XLA_FLAGS", QUICK)

import pytest
from jaxtyping import install_import_hook

# Not `ops.module`: it makes flax's own layers, whose annotations cannot be checked.
CHECKED = "data encoders checkpoints segment label evaluate students distill export web visualize".split()
CHECKED += ["ops.conv", "ops.matmul", "ops.winograd"]
install_import_hook([f"maskclip_jax.{name}" for name in CHECKED], "beartype.beartype")

# A file is one process's: whoever starts one of these last is waited for. The first two have JAX forget all programs,
# which takes 20 s where it knows thousands, and those that follow compile theirs again.
LONGEST = (
    "web/test_limits.py",
    "web/test_load.py",
    "distill/test_resume.py",
    "experiments/test_full_configs.py",
    "segment/test_released_protocol.py",
    "distill/test_multi_host.py",
    "distill/test_train.py",
    "distill/test_released_training.py",
    "cli/test_demo.py",
    "docs/test_docs.py",
    "docs/test_notebooks.py",
    "cli/test_label_hosts.py",
    "segment/test_predict.py",
    "web/test_browser.py",
    "encoders/test_padding.py",
    "distill/test_multi_device.py",
    "distill/test_step.py",
    "students/test_student.py",
)


def pytest_collection_modifyitems(items):
    """The longest files first: `--dist loadfile --no-loadscope-reorder` gives files out in this order."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get("/".join(item.path.parts[-2:]), len(rank)))


@pytest.fixture(autouse=True, scope="session")
def classifiers_of_this_run(tmp_path_factory):
    """Nothing is read from, or left in, the cache of whoever runs the tests."""
    os.environ["MASKCLIP_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def checkpoints():
    """The module of tiny CLIPs and their folders: `checkpoints.write_folder(…)`."""
    import clip_checkpoints

    return clip_checkpoints
