"""MaskCLIP and MaskCLIP+ in JAX: name what you want to see, and get a mask for it.

Data flows one way, and so do the imports (held by `tests/test_import_rule.py`):

    data  ->  clip  ->  segment  ->  evaluate  ->  distill  ->  run.py, experiments

Shapes are written in signatures, `Float[Array, "B h w E"]`:

    B batch · H W image (pixels) · h w patch grid · L = h·w tokens · D width of the image tower
    E width of the joint embedding · C classes · N prompts · T text tokens
"""

from maskclip_jax.clip.config import Fidelity as Fidelity
from maskclip_jax.clip.load import Pretrained as Pretrained
from maskclip_jax.clip.load import load_clip as load_clip
from maskclip_jax.errors import UserError as UserError
from maskclip_jax.segment.predict import Segmentation as Segmentation
from maskclip_jax.segment.predict import segment_images as segment_images
