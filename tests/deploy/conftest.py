"""A student's plain folder, as `convert` makes it of a run."""

import pytest
from tiny_distill import config_of, setup, text_rows

from maskclip_jax.distill.predict import TrainedStudent
from maskclip_jax.distill.student_folder import save_student


@pytest.fixture(scope="session")
def trained():
    config = config_of(mode="supervised", train_data="/home/alice/voc.npz")
    _, _, student, state = setup(config)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return TrainedStudent(config, student, variables, text_rows(), 7, "the latest", {"mIoU": 12.5, "images": 4})


@pytest.fixture
def student_folder(trained, tmp_path):
    return save_student(trained, tmp_path / "student")
