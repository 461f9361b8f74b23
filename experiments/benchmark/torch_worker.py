"""The process of PyTorch's side: the same computations, eager, on the same shapes. Run by `--torch-python`.

A file that needs PyTorch and nothing of ours but `worker_pipe`, which lies beside it.
"""

import torch  # pyright: ignore[reportMissingImports]: of another environment
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]: of another environment
from torch import nn  # pyright: ignore[reportMissingImports]: of another environment
from worker_pipe import read_spec, serve

CLASSES = 59


class Block(nn.Module):
    """A pre-norm transformer block. `released`: as torch's own `MultiheadAttention` computes it when it is also asked
    for the attention weights, which is what mmsegmentation's ViT does; else the fastest attention there is."""

    def __init__(self, width, heads, released):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.released = heads, released

    def mlp(self, x):
        y = self.c_fc(self.ln_2(x))
        return x + self.c_proj(F.gelu(y) if self.released else y * torch.sigmoid(1.702 * y))

    def forward(self, x):
        y = self.ln_1(x)
        if self.released:
            return self.mlp(x + self.attn(y, y, y, need_weights=True)[0])
        batch, tokens, width = y.shape
        qkv = F.linear(y, self.attn.in_proj_weight, self.attn.in_proj_bias).view(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        return self.mlp(x + self.attn.out_proj(out))

    def values(self, x):
        """The last block: with the released code's work, q and k too go through the output projection."""
        y, width = self.ln_1(x), x.shape[-1]
        if not self.released:
            v = F.linear(y, self.attn.in_proj_weight[2 * width :], self.attn.in_proj_bias[2 * width :])
            return self.mlp(x + self.attn.out_proj(v))
        q, k, v = F.linear(y, self.attn.in_proj_weight, self.attn.in_proj_bias).chunk(3, dim=-1)
        for unused in (q, k):
            self.attn.out_proj(unused)
        return self.mlp(x + self.attn.out_proj(v))


class ViT(nn.Module):
    def __init__(self, patch, width, layers, heads, embed, grid, released):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, grid * grid + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList([Block(width, heads, released) for _ in range(layers)])
        self.proj = nn.Conv2d(width, embed, 1, bias=False)
        self.text = nn.Conv2d(embed, CLASSES, 1, bias=False)
        self.grid, self.released = grid, released

    def forward(self, images):
        x = self.conv1(images)
        batch, width, h, w = x.shape
        square = self.position[:, 1:].reshape(1, self.grid, self.grid, width).permute(0, 3, 1, 2)
        patches = F.interpolate(square, (h, w), mode="bicubic").flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(batch, -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = self.ln_pre(x + torch.cat([self.position[:, :1], patches], 1))
        for block in self.blocks[:-1]:
            x = block(x)
        if self.released:
            self.blocks[-1](x)
        z = self.ln_post(self.blocks[-1].values(x))[:, 1:]
        f = self.proj(z.transpose(1, 2).reshape(batch, width, h, w))
        return self.text(f / f.norm(dim=1, keepdim=True))


def conv_bn(inputs, outputs, kernel=1, stride=1, dilation=1):
    pad = dilation * (kernel // 2)
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, pad, dilation, bias=False), nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    """ResNet's; `clip`: average pools stride, the 3×3 does not."""

    def __init__(self, inputs, planes, stride, dilation, project, clip):
        super().__init__()
        strided = 1 if clip else stride
        self.pool = nn.AvgPool2d(stride) if clip and stride > 1 else nn.Identity()
        self.conv1, self.conv2 = conv_bn(inputs, planes), conv_bn(planes, planes, 3, strided, dilation)
        self.conv3 = conv_bn(planes, 4 * planes)
        self.shortcut = conv_bn(inputs, 4 * planes, 1, strided) if project else nn.Identity()

    def forward(self, x):
        y = F.relu(self.conv2(F.relu(self.conv1(x))))
        return F.relu(self.conv3(self.pool(y)) + self.shortcut(self.pool(x)))


class ResNet(nn.Module):
    """CLIP's (`clip`) read densely, or v1c at output stride 8 under DeepLabv2's four summed branches."""

    def __init__(self, layers, clip, width):
        super().__init__()
        self.stem = nn.ModuleList([conv_bn(3, 32, 3, 2), conv_bn(32, 32, 3), conv_bn(32, 64, 3)])
        self.pool = nn.AvgPool2d(2) if clip else nn.MaxPool2d(3, 2, 1)
        strides, dilations = ((1, 2, 2, 2), (1, 1, 1, 1)) if clip else ((1, 2, 1, 1), (1, 1, 2, 4))
        blocks, inputs = [], 64
        for stage, (stride, dilation) in enumerate(zip(strides, dilations, strict=True)):
            planes = 64 * 2**stage
            for i in range(layers[stage]):
                s, d = (stride, max(1, dilation // 2)) if i == 0 else (1, dilation)
                blocks.append(Bottleneck(inputs, planes, s, d, i == 0, clip))
                inputs = 4 * planes
        self.blocks = nn.Sequential(*blocks)
        if clip:
            self.head = nn.Sequential(nn.Conv2d(inputs, inputs, 1), nn.Conv2d(inputs, width, 1))
            self.unused_keys = nn.Conv2d(inputs, inputs, 1)
        else:
            self.head = nn.ModuleList([conv_bn(inputs, width, 3, 1, d) for d in (6, 12, 18, 24)])
            self.dropout = nn.Dropout2d(0.1)
        self.text, self.clip = nn.Conv2d(width, CLASSES, 1, bias=False), clip

    def forward(self, x):
        for layer in self.stem:
            x = F.relu(layer(x))
        x = self.blocks(self.pool(x))
        if self.clip:
            f = self.head(x)
            return self.text(f / f.norm(dim=1, keepdim=True))
        return self.text(self.dropout(sum(F.relu(branch(x)) for branch in self.head)))


def dense(model="ViT-B/16", batch=1, size=512, dtype="float32", work="same"):
    if model == "RN50":
        net = ResNet((3, 4, 6, 3), True, 1024)
    else:
        patch, width, layers, heads, embed, grid = {
            "ViT-B/16": (16, 768, 12, 12, 512, 14),
            "ViT-L/14": (14, 1024, 24, 16, 768, 16),
        }[model]
        net = ViT(patch, width, layers, heads, embed, grid, work == "released")
    net = net.eval().to(getattr(torch, dtype))
    images = torch.randn(batch, 3, size, size).to(getattr(torch, dtype))
    if work == "channels_last":
        net, images = net.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)

    def run():
        with torch.inference_mode():
            net(images)

    return run


def smoothing(length=4096, width=768, times=1):
    """The released code's way: the L×L matrix."""
    keys, p = torch.randn(1, length, width), torch.randn(1, length, CLASSES).softmax(-1)

    def run():
        with torch.inference_mode():
            for _ in range(times):
                k = F.normalize(keys, dim=-1)
                mixed = (k @ k.transpose(1, 2)) @ p
                torch.where(p.amax(-1, keepdim=True) < 1, mixed, p)

    return run


def train(batch=2, size=256, width=512, dtype="float32", work="channels_last"):
    net = ResNet((3, 4, 23, 3), False, width).train()
    net.text.requires_grad_(False)
    layout = torch.channels_last if work == "channels_last" else torch.contiguous_format
    net = net.to(memory_format=layout)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=layout)
    labels = torch.randint(CLASSES, (batch, size, size))
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01, momentum=0.9, weight_decay=5e-4)

    def run():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = net(images)
        logits = F.interpolate(logits.float(), (size, size), mode="bilinear")
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return run


def main():
    spec, out = read_spec()
    torch.set_num_threads(spec["threads"] or torch.get_num_threads())
    run = {"dense": dense, "smoothing": smoothing, "train": train}[spec["kind"]](**spec["options"])
    serve(out, run, {"torch": torch.__version__})


if __name__ == "__main__":
    main()
