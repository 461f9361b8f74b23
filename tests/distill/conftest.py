"""One uninterrupted run, for the tests of a file that look at it."""

import pytest
from tiny_run import arrays_of, run_config, train, write_data


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its config, folder and last state."""
    folder = tmp_path_factory.mktemp("whole")
    config = run_config(write_data(folder))
    return config, folder / "run", arrays_of(train(config, folder / "run"))
