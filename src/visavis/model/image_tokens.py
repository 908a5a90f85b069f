"""Image features to image tokens.

    pixels [V, 3, S, S], the views of an image or the frames of a video
      └─ vision tower ──► features [V, prefix + P, W]        hidden state `select_layer`
           └─ select ───► [V, P, W]                          with or without the class token
                └─ connector ──► tokens of each view [V, P', D]
                     └─ pack_image_features ──► [n, D]       views arranged in order
                          └─ merge_image_features ──►        placeholders of the stream [T, D]

The number of placeholders is computed by `count_tokens` from the grid alone, when a prompt is
tokenized. It is compared here with the number of tokens; a mismatch is an error, because writing
anyway would shift all later images.

Phi-3.5-vision's order of tokens (`pack_phi3v_features`):

    tiles, put together: rows * s lines of columns * s tokens, each ended by `line`
    `middle`, one token
    base view: s lines of s tokens, each ended by `line`

`line` and `middle` are learned in the input width of the connector and pass through it like tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.errors import InputError
from visavis.model.config import ImageLayoutConfig, VLMConfig
from visavis.model.connectors import connector_tokens
from visavis.model.image_input import ImageGrid

TYPICAL_TOKENS = 256  # of an image, where they depend on its size


class Separators(nn.Module):
    """The learned marks, as two rows [2, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.line = nn.Parameter(torch.zeros(width))
        self.middle = nn.Parameter(torch.zeros(width))

    def forward(self) -> Tensor:
        return torch.stack((self.line, self.middle))


def count_phi3v_tokens(side: int, shape: ImageGrid) -> int:
    """Return the number of image tokens for views of side x side tokens."""
    tiles = shape.rows * side * (shape.columns * side + 1)
    return tiles + 1 + side * (side + 1)


def pack_phi3v_features(tokens: Tensor, shape: ImageGrid, marks: Tensor) -> Tensor:
    """Return the run of tokens [n, D] of the views' tokens [V, s, s, D], the base view first.

    Args:
        marks: what `Separators` become in the decoder's width, [2, D].
    """
    line, middle = marks.to(tokens.dtype)[:, None, None]  # each [1, 1, D]
    tiles = tokens[1:].unflatten(0, (shape.rows, shape.columns)).transpose(1, 2)
    whole = tiles.flatten(2, 3).flatten(0, 1)  # [rows * s, columns * s, D]
    runs = [
        torch.cat((image, line.expand(len(image), 1, -1)), 1).flatten(0, 1)
        for image in (whole, tokens[0])
    ]
    return torch.cat((runs[0], middle[0], runs[1]))


def select(hidden: Tensor, config: VLMConfig) -> Tensor:
    """Return the features a connector reads, [V, P, W], of a tower's hidden state."""
    if config.tower is not None and config.select_feature == "patch":
        hidden = hidden[:, config.tower.num_prefix_tokens :]
    return hidden[:, 1:] if config.drop_first_token else hidden


def tokens_per_view(config: VLMConfig) -> int:
    """Return the tokens of one view of a tower of one resolution, before views are put together;
    0 without a tower."""
    if config.tower is None or config.connector is None:
        return 0
    return connector_tokens(config.connector, config.features_per_image)


def typical_tokens(config: VLMConfig) -> int:
    """Return about how many tokens an image of a usual size becomes, to spread work evenly."""
    if config.tower is not None and config.tower.any_resolution:
        return TYPICAL_TOKENS
    return tokens_per_view(config)


def count_tokens(config: VLMConfig, shape: ImageGrid) -> int:
    """Return how many tokens an image or video of this shape becomes; 1 in a dual encoder."""
    if config.connector is None:
        return 1
    if config.tower is not None and config.tower.any_resolution:
        assert config.connector is not None
        return connector_tokens(config.connector, config.tower.num_patches(shape))
    merge, per_view = config.merge, tokens_per_view(config)
    if merge.kind == "flat" and not _is_pooled(shape, merge):
        return shape.views * per_view
    side = round(per_view**0.5)
    if merge.kind == "hd":
        return count_phi3v_tokens(side, shape)
    if shape.video:
        pooled = pooled_side(side, merge)
        where = merge.video_newline if merge.newline else "no_token"
        each = pooled * pooled + {"grid": pooled, "frame": 1}.get(where, 0)
        return shape.frames * each + (where == "one_token")
    if not shape.rows:
        return per_view + merge.newline
    _, _, height, width = image_area(shape, side, merge)
    height, width = reduced_grid(height, width, side, merge)
    return per_view + height * (width + merge.newline)


def pack_image_features(
    tokens: Tensor, shape: ImageGrid, merge: ImageLayoutConfig, newline: Tensor | None
) -> Tensor:
    """Return the run of tokens [n, D] that the views' tokens [V, P, D] become.

    Args:
        newline: the learned vector [D], where the config has one; of `hd` both, [2, D].
    """
    if merge.kind == "flat" and not _is_pooled(shape, merge):
        return tokens.flatten(0, 1)
    side = round(tokens.shape[1] ** 0.5)
    if merge.kind == "hd":
        assert newline is not None
        return pack_phi3v_features(tokens.unflatten(1, (side, side)), shape, newline)
    if shape.video:
        return _arrange_frames(tokens.unflatten(1, (side, side)), merge, newline)
    base = tokens[0]  # [P, D]
    if not shape.rows:
        return base if newline is None else torch.cat((base, newline[None].to(base.dtype)))
    whole = tokens[1:].view(shape.rows, shape.columns, side, side, -1)
    whole = whole.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)  # [rows * s, columns * s, D]
    top, left, height, width = image_area(shape, side, merge)
    whole = whole[top : top + height, left : left + width]
    smaller = reduced_grid(height, width, side, merge)
    if smaller != (height, width):
        whole = resize(whole[None], smaller)[0]
    if newline is not None:
        whole = _end_rows(whole[None], newline)[0]
    return torch.cat((base, whole.flatten(0, 1)))


def image_area(shape: ImageGrid, side: int, merge: ImageLayoutConfig) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the image in its tiles' tokens, padding cut off.

    The same margin is cut at both ends, so the result may be one row higher than the image.
    """
    rows, columns = shape.rows * side, shape.columns * side
    if not merge.unpad:
        return 0, 0, rows, columns
    width, height = shape.size

    def whole(x: float) -> int:
        return int(round(x, 7)) if merge.round_unpad else int(x)

    if width / height > columns / rows:
        margin = (rows - whole(height * (columns / width))) // 2
        return margin, 0, rows - 2 * margin, columns
    margin = (columns - whole(width * (rows / height))) // 2
    return 0, margin, rows, columns - 2 * margin


def reduced_grid(height: int, width: int, side: int, merge: ImageLayoutConfig) -> tuple[int, int]:
    """Return the size to which an image of this many tokens is reduced (anyres_max_N)."""
    if not merge.max_tiles:
        return height, width
    times = (height * width / (merge.max_tiles * side * side)) ** 0.5
    return (int(height // times), int(width // times)) if times > 1.1 else (height, width)


def _is_pooled(shape: ImageGrid, merge: ImageLayoutConfig) -> bool:
    return shape.video and merge.video_pool > 1


def pooled_side(side: int, merge: ImageLayoutConfig) -> int:
    """Return the side of a frame's tokens after pooling."""
    if merge.video_pool_mode == "bilinear":
        return -(-side // merge.video_pool)
    return side // merge.video_pool


def resize(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Return tokens [N, h, w, D] on another grid, bilinear, computed in float32."""
    image = tokens.permute(0, 3, 1, 2).float()
    image = F.interpolate(image, size, mode="bilinear", align_corners=False)
    return image.permute(0, 2, 3, 1).to(tokens.dtype)


def _arrange_frames(frames: Tensor, merge: ImageLayoutConfig, newline: Tensor | None) -> Tensor:
    """Pool frames [N, s, s, D], put newlines in, and lay all in one run [n, D]."""
    stride = merge.video_pool
    if stride > 1 and merge.video_pool_mode == "bilinear":
        side = pooled_side(frames.shape[1], merge)
        frames = resize(frames, (side, side))
    elif stride > 1:
        pool = F.avg_pool2d if merge.video_pool_mode == "average" else F.max_pool2d
        frames = pool(frames.permute(0, 3, 1, 2), stride).permute(0, 2, 3, 1)
    if newline is not None and merge.video_newline == "grid":
        frames = _end_rows(frames, newline)
    run = frames.flatten(1, 2)  # [N, n, D]
    if newline is None or merge.video_newline in ("grid", "no_token"):
        return run.flatten(0, 1)
    end = newline.to(run.dtype)
    if merge.video_newline == "frame":
        run = torch.cat((run, end.expand(len(run), 1, -1)), 1)
        return run.flatten(0, 1)
    return torch.cat((run.flatten(0, 1), end[None]))


def _end_rows(tokens: Tensor, newline: Tensor) -> Tensor:
    """Put a learned vector [D] at the end of each row of [N, h, w, D]."""
    column = newline.to(tokens.dtype).expand(*tokens.shape[:2], 1, -1)
    return torch.cat((tokens, column), 2)


def merge_image_features(
    embeddings: Tensor, image_tokens: Tensor, image_positions: Tensor
) -> Tensor:
    """Write image tokens over their placeholders.

    Args:
        embeddings: token embeddings of the packed stream [T, D].
        image_tokens: [S, D], those of all images in order of appearance.
        image_positions: int64 [S], where placeholders stand in the stream, ascending.

    Raises:
        InputError: the numbers differ.
    """
    if len(image_tokens) != len(image_positions):
        raise InputError(
            f"the prompt holds {len(image_positions)} image placeholders but its images give "
            f"{len(image_tokens)} image tokens; each image needs as many placeholders as it has "
            "tokens. Build prompts with visavis.Prompt, which counts them."
        )
    return embeddings.index_copy(0, image_positions, image_tokens.to(embeddings.dtype))
