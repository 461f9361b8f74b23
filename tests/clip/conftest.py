import clip_checkpoints
import pytest


@pytest.fixture
def checkpoints():
    """The module of tiny CLIPs and their folders: `checkpoints.write_folder(…)`."""
    return clip_checkpoints
