"""Makes corruptions.npz: what the imagecorruptions package (Apache-2.0) does to one picture, given the same noise.

    pip install imagecorruptions==1.1.2 "setuptools<81" && python tests/golden/make_corruptions.py

In an environment of its own: it needs OpenCV and scikit-image. NumPy's normal draws are replaced by stored ones, so
that the outputs can be compared pixel by pixel; shot and impulse noise are checked against their definitions instead.
"""

from pathlib import Path

import numpy as np
from imagecorruptions import corruptions
from PIL import Image
from skimage.filters import gaussian

SHAPE = (44, 60)  # no multiples of 16: JPEG has to pad


def picture() -> np.ndarray:
    """Smooth colours, a few edges, fine texture."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    image = np.stack([128 + 100 * np.sin(x / 9), 128 + 90 * np.cos(y / 7 + x / 20), 3 * x + 1.5 * y], -1)
    image[10:30, 15:35] = (220, 40, 30)
    image[24:40, 30:50] = (30, 60, 200)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def main() -> None:
    image = picture()
    noise = {n: np.random.default_rng(1).normal(size=(*SHAPE, *n)).astype(np.float32) for n in ((), (3,))}
    # scikit-image has renamed an argument since the package was written
    corruptions.gaussian = lambda im, sigma, multichannel=False: gaussian(
        im, sigma=sigma, channel_axis=-1 if multichannel else None
    )
    np.random.normal = lambda loc=0.0, scale=1.0, size=None: loc + scale * noise[tuple(size[2:])].astype(np.float64)
    names = ("gaussian_noise", "speckle_noise", "gaussian_blur", "defocus_blur", "spatter", "jpeg_compression")
    out = {"image": image, "normal_image": noise[(3,)], "normal_plane": noise[()]}
    for name in names:
        levels = [getattr(corruptions, name)(Image.fromarray(image), severity) for severity in range(1, 6)]
        out[name] = np.stack([np.uint8(np.asarray(level)) for level in levels])
    np.savez_compressed(Path(__file__).with_name("corruptions.npz"), **out)


if __name__ == "__main__":
    main()
