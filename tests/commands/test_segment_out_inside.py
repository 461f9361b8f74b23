"""Results written into the folder of images are not segmented themselves by the next run."""

from maskclip_jax.commands.segment import find_images


def test_what_an_earlier_run_wrote_is_left_out(tmp_path):
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "outer").mkdir()
    for name in ("a.png", "out/a_overlay.png", "out/deep/b.png", "outer/c.png"):
        (tmp_path / name).touch()
    images = list(find_images([tmp_path], tmp_path / "out"))
    assert images == [tmp_path / "a.png", tmp_path / "outer" / "c.png"]
    assert len(list(find_images([tmp_path]))) == 4
