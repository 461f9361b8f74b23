"""How many floating-point operations a function *must* do: its matrix products, two operations a multiply-add.

By formula from the architecture, not from a program: what a program does beyond that (keys that nobody reads, products
with padding) is its own loss. Norms, activations and softmax are left out, as is usual.
"""

from __future__ import annotations

from maskclip_jax.encoders.config import CLIPConfig, ResNetConfig, ViTConfig
from maskclip_jax.students import StudentConfig
from maskclip_jax.students.resnet import STAGES


def taps(size: int, kernel: int, stride: int, dilation: int) -> int:
    """Along one axis: pairs of an output and a kernel tap that lies on the image, padding dilation · (k // 2)."""
    pad = dilation * (kernel // 2)
    reads = (o * stride + t * dilation - pad for o in range(-(-size // stride)) for t in range(kernel))
    return sum(0 <= r < size for r in reads)


def conv(
    height: int, width: int, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, dilation: int = 1
) -> int:
    """A convolution of one image; products with the zeros around it are not counted."""
    along = [taps(n, kernel, stride, dilation) for n in (height, width)]
    return 2 * along[0] * along[1] * inputs * outputs


def dense(config: CLIPConfig, height: int, width: int, classes: int) -> int:
    """`dense_logits` of one image of `height` × `width` pixels, value path folded, keys not read."""
    v = config.vision
    if isinstance(v, ViTConfig):
        return _vit(v, config.embed_dim, (height // v.patch_size) * (width // v.patch_size), classes)
    return _clip_resnet(v, config.embed_dim, height, width, classes)


def _vit(v: ViTConfig, embed_dim: int, length: int, classes: int) -> int:
    """Class tokens (registers too) go through all blocks but the last; a pooling head follows after all blocks, every
    patch's value and MLP."""
    tokens, d, pooled = length + v.class_tokens, v.width, v.head == "map"
    mlp = (3 if v.activation == "swiglu" else 2) * d * v.mlp_width
    block = tokens * (4 * d * d + 2 * tokens * d + mlp)
    value = length * (d * d + mlp)  # of the last block, or of the head
    projected = length * embed_dim * (d * (v.head == "projection") + classes)
    return 2 * (length * 3 * v.patch_size**2 * d + (v.layers - 1 + pooled) * block + value + projected)


def _clip_resnet(v: ResNetConfig, embed_dim: int, height: int, width: int, classes: int) -> int:
    if v.dense_stride != 32:
        raise ValueError("counted for stride 32 only")
    half = v.width // 2
    h, w = height // 2, width // 2
    total = conv(height, width, 3, half, 3, 2) + conv(h, w, half, half, 3) + conv(h, w, half, v.width, 3)
    h, w, inputs = h // 2, w // 2, v.width
    for stage, blocks in enumerate(v.layers):
        planes = v.width * 2**stage
        for i in range(blocks):
            total += conv(h, w, inputs, planes) + conv(h, w, planes, planes, 3)
            if i == 0 and stage > 0:  # the average pool comes between the 3×3 and the last 1×1
                h, w = h // 2, w // 2
            total += conv(h, w, planes, 4 * planes)
            total += conv(h, w, inputs, 4 * planes) if i == 0 else 0
            inputs = 4 * planes
    return total + 2 * h * w * embed_dim * (inputs + classes)


def smoothing(length: int, width: int, classes: int) -> int:
    """Key smoothing in the cheaper order of products."""
    return 2 * min(2 * length * width * classes, length * length * (width + classes))


def deeplab_v2(config: StudentConfig, height: int, width: int, classes: int) -> tuple[int, int]:
    """Forward pass of one image, and forward plus backward: each product again for either gradient, but none for the
    gradient of the image."""
    v = config.variant
    base = v.base_width
    first = conv(height, width, 3, base // 2, 3, 2)
    h, w = -(-height // 2), -(-width // 2)
    total = first + conv(h, w, base // 2, base // 2, 3) + conv(h, w, base // 2, base, 3)
    h, w, inputs = -(-h // 2), -(-w // 2), base
    for stage, (stride, dilation) in enumerate(STAGES[config.output_stride]):
        planes = base * 2**stage
        outputs = planes * v.expansion
        for i in range(v.layers[stage]):
            s, d = (stride, max(1, dilation // 2)) if i == 0 else (1, dilation)
            total += conv(h, w, inputs, planes) + conv(h, w, planes, planes, 3, s, d)
            total += conv(h, w, inputs, outputs, 1, s) if i == 0 else 0
            h, w = -(-h // s), -(-w // s)
            total += conv(h, w, planes, outputs)
            inputs = outputs
    for dilation in config.rates or (6, 12, 18, 24):
        total += conv(h, w, inputs, config.width, 3, 1, dilation)
    total += conv(h, w, config.width, classes)
    return total, 3 * total - first
