"""Sixty emoji by six artists: five draw training scenes, two of them the held-out ones, Twemoji the shift test alone.

Noto comes from Debian's `fonts-noto-color-emoji`; the others from the npm registry (`npm pack` of the packages below,
each `@iconify-json/NAME`), read from the tarballs as they are. Nothing here is needed to run or to test the library:
it only makes scenes.
"""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maskclip_jax.data.vocabulary import SCENE_OBJECTS
from maskclip_jax.errors import UserError

NOTO_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NOTO_SIZE = 109  # the font holds bitmaps of this size and no other
IN_STYLE = ("noto", "fluent")  # held-out scenes are drawn by these
TRAIN_STYLES = (*IN_STYLE, "fluent3d", "openmoji", "emojione")
STYLES = (*TRAIN_STYLES, "twemoji")  # Twemoji never in training
PACKAGES = {
    "fluent": "fluent-emoji-flat",
    "fluent3d": "fluent-emoji",
    "openmoji": "openmoji",
    "emojione": "emojione",
    "twemoji": "twemoji",
}
GLYPH_SIDE = 128  # px, the longer side of every stored glyph

# In the order of SCENE_OBJECTS. Characters whose default is text carry VS16 (U+FE0F), or fonts draw them in black.
EMOJI = dict(
    zip(
        SCENE_OBJECTS,
        "🐕 🐈 🐎 🐄 🐑 🐖 🐦 🐟 🐘 🦒 🦁 🐒 🐇 🐢 🐍 🐸 🚗 🚌 🚚 🚆 🚲 🏍️ ✈️ ⛵ 🚢 🚀 🚜 🏠 🏰 🌳 🌴 🌻 🌵 🍄 🍎 🍌 🍕 "
        "🎂 🍾 🪑 🛋️ 🛏️ 📺 💻 ⏰ ☂️ ⚽ 🎸 📕 🧍 🧒 🤖 👻 🌞 🌙 ⭐ ☁️ ⛄ 🔑 🎩".split(),
        strict=True,
    )
)


def _cropped(image: Image.Image) -> np.ndarray:
    """Crops to what is drawn and scales the longer side to GLYPH_SIDE; RGBA uint8 [h, w, 4]."""
    image = image.crop(image.getchannel("A").point([255 * (a > 16) for a in range(256)]).getbbox())
    scale = GLYPH_SIDE / max(image.size)
    return np.asarray(image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS))


def _noto(font_path: Path) -> dict[str, np.ndarray]:
    font = ImageFont.truetype(str(font_path), NOTO_SIZE)
    glyphs = {}
    for name, character in EMOJI.items():
        canvas = Image.new("RGBA", (200, 200))
        # Without libraqm Pillow draws VS16 as a glyph of its own; the font needs it for nothing.
        ImageDraw.Draw(canvas).text((20, 20), character[0], font=font, embedded_color=True)
        glyphs[name] = _cropped(canvas)
    return glyphs


def _iconify(npm: Path, package: str) -> dict[str, np.ndarray]:
    """Icons of one `@iconify-json` tarball: `chars.json` maps code points to names, `icons.json` names to SVGs.

    Packages without `chars.json` use the same names, which are then Fluent's. What a package lacks is left out.
    """
    import resvg_py  # pyright: ignore[reportMissingImports]  # only to make scenes

    def read(package: str) -> tuple[dict, dict]:
        found = sorted(npm.glob(f"iconify-json-{package}-[0-9]*.tgz"))
        if not found:
            raise UserError(f"no iconify-json-{package}-*.tgz in {npm}: run `npm pack @iconify-json/{package}` there")
        with tarfile.open(found[-1]) as tar:
            return tuple(json.load(tar.extractfile(f"package/{part}.json")) for part in ("icons", "chars"))

    icons, characters = read(package)
    characters = characters or read(PACKAGES["fluent"])[1]
    glyphs = {}
    for name, emoji in EMOJI.items():
        keys = ("-".join(f"{ord(c):x}" for c in emoji), f"{ord(emoji[0]):x}")
        icon_name = next(characters[key] for key in keys if key in characters)
        while icon_name in icons.get("aliases", {}):
            icon_name = icons["aliases"][icon_name]["parent"]
        if icon_name not in icons["icons"]:
            continue
        icon = icons["icons"][icon_name]
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=192, skip_system_fonts=True)
        glyphs[name] = _cropped(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    return glyphs


def load_glyphs(
    npm: str | os.PathLike = "/tmp/npm",
    cache: str | os.PathLike | None = "/tmp/maskclip_glyphs.npz",
    font: str | os.PathLike = NOTO_FONT,
) -> dict[str, dict[str, np.ndarray]]:
    """Every glyph as `glyphs[style][name]`, RGBA uint8 [h, w, 4] with the longer side GLYPH_SIDE px.

    Args:
        npm: folder with the `iconify-json-*.tgz` tarballs.
        cache: an .npz to read if there, else to write; None for neither.
        font: NotoColorEmoji.ttf.

    Raises:
        UserError: a tarball or the font is missing.
    """
    if cache is not None and Path(cache).exists():
        with np.load(cache, allow_pickle=False) as stored:
            return {
                style: {name: stored[f"{style}/{name}"] for name in SCENE_OBJECTS if f"{style}/{name}" in stored}
                for style in STYLES
            }
    if not Path(font).exists():
        raise UserError(f"no font at {font}: install Debian's fonts-noto-color-emoji")
    glyphs = {"noto": _noto(Path(font))}
    glyphs |= {style: _iconify(Path(npm), package) for style, package in PACKAGES.items()}
    if cache is not None:
        temporary = Path(f"{cache}.{os.getpid()}.tmp.npz")
        np.savez_compressed(temporary, **{f"{s}/{n}": array for s, of in glyphs.items() for n, array in of.items()})
        temporary.rename(cache)
    return glyphs


def contact_sheet(glyphs: dict[str, dict[str, np.ndarray]], side: int = 64) -> Image.Image:
    """All glyphs, ten names a row, the styles below one another: for a person to check that each is the right thing."""
    rows = -(-len(SCENE_OBJECTS) // 10)
    sheet = Image.new("RGB", (10 * side, rows * (len(STYLES) * side + 14)), (150, 170, 150))
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(SCENE_OBJECTS):
        x, y = i % 10 * side, i // 10 * (len(STYLES) * side + 14)
        pen.text((x + 2, y + 1), name, fill=(0, 0, 0))
        for j, style in enumerate(STYLES):
            if name not in glyphs[style]:
                continue
            glyph = Image.fromarray(glyphs[style][name])
            glyph.thumbnail((side - 4, side - 4))
            sheet.paste(glyph, (x + 2, y + 14 + j * side), glyph)
    return sheet
