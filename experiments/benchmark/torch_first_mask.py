"""PyTorch's side of `first_mask`: `python torch_first_mask.py FOLDER PHOTO WORDS OUT.png`, with transformers.

MaskCLIP's reading as one would write it: the last block's values instead of its attention, at short side 512.
"""

import sys

import numpy as np
import torch  # pyright: ignore[reportMissingImports]: of another environment
from PIL import Image
from transformers import CLIPModel, PreTrainedTokenizerFast


@torch.no_grad()
def main(folder: str, photo: str, words: str, out: str) -> None:
    clip = CLIPModel.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", pad_token="<|endoftext|>")
    image = Image.open(photo).convert("RGB")
    scale, patch = 512 / min(image.size), clip.config.vision_config.patch_size
    width, height = (round(side * scale / patch) * patch for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    x = torch.from_numpy((pixels - 0.45) / 0.27).permute(2, 0, 1)[None]
    vision, last = clip.vision_model, clip.vision_model.encoder.layers[-1]
    hidden = vision.pre_layrnorm(vision.embeddings(x, interpolate_pos_encoding=True))
    for layer in vision.encoder.layers[:-1]:
        hidden = layer(hidden, None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    values = last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(hidden[:, 1:])))
    features = clip.visual_projection(vision.post_layernorm(values))
    prompts = tokenizer(
        [f"a photo of a {word.strip()}." for word in words.split(",")], return_tensors="pt", padding=True
    )
    text = clip.text_model(input_ids=prompts["input_ids"]).pooler_output
    text = torch.nn.functional.normalize(clip.text_projection(text), dim=-1)
    scores = torch.nn.functional.normalize(features, dim=-1) @ text.T
    scores = scores.reshape(1, height // patch, width // patch, -1).permute(0, 3, 1, 2)
    scores = torch.nn.functional.interpolate(scores, image.size[::-1], mode="bilinear")
    Image.fromarray(scores.argmax(1)[0].numpy().astype(np.uint8)).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
