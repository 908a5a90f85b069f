"""LLaVA 1.6 and OneVision in their original layout, written down again plainly: pictures to views,
views to tokens, videos to tokens. One picture at a time, (width, height) throughout.

Shares nothing with the package; tests compare the two.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


class Original:
    """The settings of a checkpoint, and a peer that has its weights.

    Args:
        peer: transformers' LLaVA 1.5 with the tower, projector and language model.
        processor: transformers' processor of the tower's pictures.
        newline: the learned vector.
        settings: of config.json.
    """

    def __init__(self, peer: Any, processor: Any, newline: Tensor, **settings: Any) -> None:
        self.peer, self.processor, self.newline = peer, processor, newline
        self.aspect = settings.get("image_aspect_ratio", "square")
        self.merge = settings.get("mm_patch_merge_type", "flat")
        self.position = settings.get("mm_newline_position", "one_token")
        self.mode = settings.get("mm_spatial_pool_mode", "bilinear")
        self.tile = peer.config.vision_config.image_size
        self.side = self.tile // peer.config.vision_config.patch_size
        self.grids: list[tuple[int, int]] = settings.get("grids", [])

    # --- pictures -------------------------------------------------------------------------------

    def pixels(self, image: Image.Image) -> Tensor:
        """Return what the tower's own processor makes of one picture, [1, 3, S, S]."""
        return self.processor(images=[image], return_tensors="pt")["pixel_values"]

    def padded(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in self.mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square

    @property
    def mean(self) -> list[float]:
        return list(self.processor.image_mean)

    def best_grid(self, width: int, height: int) -> tuple[int, int]:
        best, most, least = (0, 0), 0, math.inf
        for right, bottom in self.grids:
            scale = min(right / width, bottom / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            wasted = right * bottom - kept
            if kept > most or (kept == most and wasted < least):
                best, most, least = (right, bottom), kept, wasted
        return best

    def views(self, image: Image.Image) -> Tensor:
        """Return the base view and the tiles, [1 + n, 3, S, S]."""
        width, height = image.size
        right, bottom = self.best_grid(width, height)
        x, y = right / width, bottom / height
        if x < y:
            inner = (right, min(math.ceil(height * x), bottom))
        else:
            inner = (min(math.ceil(width * y), right), bottom)
        canvas = Image.new("RGB", (right, bottom), (0, 0, 0))
        corner = ((right - inner[0]) // 2, (bottom - inner[1]) // 2)
        canvas.paste(image.resize(inner), corner)
        views = [image.resize((self.tile, self.tile))]
        for top in range(0, bottom, self.tile):
            for left in range(0, right, self.tile):
                views.append(canvas.crop((left, top, left + self.tile, top + self.tile)))
        return torch.cat([self.pixels(view) for view in views])

    # --- tokens ---------------------------------------------------------------------------------

    def tokens(self, pixels: Tensor) -> Tensor:
        """Return the projected tokens of views, [V, P, D]."""
        features = self.peer.model.get_image_features(pixel_values=pixels).pooler_output
        return torch.stack(list(features))

    def image(self, image: Image.Image, alone: bool = True) -> Tensor:
        """Return the tokens of a picture, [n, D]."""
        if "anyres" not in self.aspect or ("max" in self.aspect and not alone):
            pads = self.aspect != "square"
            tokens = self.tokens(self.pixels(self.padded(image) if pads else image))[0]
            ends = self.merge == "spatial_unpad"
            return torch.cat((tokens, self.newline[None])) if ends else tokens
        tokens = self.tokens(self.views(image))
        if self.merge == "flat":
            return tokens.flatten(0, 1)
        right, bottom = self.best_grid(*image.size)
        across, down, side = right // self.tile, bottom // self.tile, self.side
        rows = []  # of tokens, over all tiles
        for number in range(down * side):
            tile_row, row = divmod(number, side)
            tiles = tokens[1 + tile_row * across : 1 + (tile_row + 1) * across]
            rows.append(torch.cat([tile.view(side, side, -1)[row] for tile in tiles]))
        whole = torch.stack(rows)  # [h, w, D]
        if self.merge == "spatial":
            return torch.cat((tokens[0], whole.flatten(0, 1)))
        whole = self.shrunk(self.unpadded(whole, image.size))
        lines = [torch.cat((line, self.newline[None])) for line in whole]
        return torch.cat((tokens[0], *lines))

    def unpadded(self, whole: Tensor, size: tuple[int, int]) -> Tensor:
        (width, height), (rows, columns) = size, whole.shape[:2]
        if width / height > columns / rows:
            cut = (rows - int(height * (columns / width))) // 2
            return whole[cut : rows - cut]
        cut = (columns - int(width * (rows / height))) // 2
        return whole[:, cut : columns - cut]

    def shrunk(self, whole: Tensor) -> Tensor:
        if "max" not in self.aspect:
            return whole
        (rows, columns), most = whole.shape[:2], int(self.aspect.rsplit("_", 1)[1])
        times = math.sqrt(rows * columns / (most * self.side**2))
        if times <= 1.1:
            return whole
        size = (int(rows // times), int(columns // times))
        image = F.interpolate(whole.permute(2, 0, 1)[None], size, mode="bilinear")
        return image[0].permute(1, 2, 0)

    def video(self, frames: list[Image.Image]) -> Tensor:
        """Return the tokens of a video, [n, D]."""
        tokens = self.tokens(torch.cat([self.pixels(frame) for frame in frames]))
        image = tokens.view(len(frames), self.side, self.side, -1).permute(0, 3, 1, 2)
        if self.mode == "bilinear":
            half = math.ceil(self.side / 2)
            image = F.interpolate(image, (half, half), mode="bilinear")
        else:
            image = (F.avg_pool2d if self.mode == "average" else F.max_pool2d)(image, 2)
        pooled, end = image.permute(0, 2, 3, 1), self.newline[None]
        unpad = self.merge == "spatial_unpad"
        pieces = []
        for frame in pooled:
            for row in frame:
                pieces += [row, end] if self.position == "grid" else [row]
            if self.position == "frame":
                pieces.append(end)
        if self.position == "one_token" and unpad:
            pieces.append(end)
        return torch.cat(pieces)

    # --- sequences ------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, ids: list[int], slots: list[tuple[int, int]], visuals: list[Tensor]) -> Tensor:
        """Return the logits of ids with tokens of images written over them, [T, vocab]."""
        embeddings = self.peer.get_input_embeddings()(torch.tensor(ids))
        for (start, length), tokens in zip(slots, visuals, strict=True):
            assert len(tokens) == length
            embeddings[start : start + length] = tokens
        hidden = self.peer.model.language_model(inputs_embeds=embeddings[None])
        return self.peer.lm_head(hidden.last_hidden_state)[0]
