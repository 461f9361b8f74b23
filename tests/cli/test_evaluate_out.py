"""`evaluate --out`: the scores are written, and what cannot be written is said before the work."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from maskclip_jax.cli.common import output_file
from maskclip_jax.errors import UserError


def test_scores_are_written(call, model, draw, tmp_path):
    """Of a folder and of the same one in a zip file, to the digit."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for kind, array in (("images", draw(40, 60)), ("labels", draw(40, 60)[..., 0] % 2)):
            path = tmp_path / "data" / kind / "a.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.ascontiguousarray(array)).save(path)
            archive.write(path, f"data/{kind}/a.png")
    found = []
    for name, data in (("a", tmp_path / "data"), ("b", f"{tmp_path / 'data.zip'}!data")):
        out = tmp_path / "new" / f"{name}.json"
        result = call("evaluate", data, "--classes", "dog, cat", "--model", model, "--out", out)
        assert (result.code, result.errors, result.lines[-1]) == (0, [], f"wrote {out}")
        found.append(json.loads(out.read_text()))
        assert found[-1]["settings"]["scales"] == [1.0]
    assert 0 < found[0]["mIoU"] <= 100
    assert [one["mIoU"] for one in found] == [found[0]["mIoU"]] * 2
    # what is beyond counting whole images on the device goes the way of `segment`, and the score says so
    words = ("--classes", "dog, cat", "--model", model, "--window", 32, "--stride", 16)
    result = call("evaluate", tmp_path / "data", *words, "--out", tmp_path / "windows.json")
    assert (result.code, result.errors) == (0, [])
    assert {"window": 32, "stride": 16}.items() <= json.loads((tmp_path / "windows.json").read_text())[
        "protocol"
    ].items()
    label = tmp_path / "data" / "labels" / "a.png"
    Image.fromarray(np.full((40, 60), 255, np.uint8)).save(label)
    result = call("evaluate", tmp_path / "data", "--classes", "dog, cat", "--model", model)
    assert result.errors == ["warning: no pixel of these masks is labelled (255 is none): there is nothing to score"]
    before = (tmp_path / "data.zip").read_bytes()
    for out in (tmp_path / "data", tmp_path / "data.zip", tmp_path / "data.zip" / "a.json"):
        result = call(
            "evaluate",
            f"{tmp_path / 'data.zip'}!data",
            "--classes",
            "dog",
            "--model",
            model,
            "--scales",
            1,
            "--out",
            out,
        )
        assert (result.code, result.lines, len(result.errors)) == (2, [], 1)
        assert str(tmp_path / "data") in result.errors[0]
    assert (tmp_path / "data.zip").read_bytes() == before


def test_an_output_is_no_input(tmp_path):
    for name in ("a.npz", "b.json"):
        (tmp_path / name).touch()
    (tmp_path / "link.json").symlink_to(tmp_path / "a.npz")
    assert output_file(tmp_path / "b.json", [tmp_path / "a.npz", "embedded"]) == tmp_path / "b.json"
    for name in ("a.npz", "link.json"):
        with pytest.raises(UserError, match=f"{name} is an input"):
            output_file(tmp_path / name, ["scenes", str(tmp_path / "a.npz")])
