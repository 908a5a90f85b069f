"""A loaded model as a folder in LLaVA's original layout, its vision tower within.

    config.json  generation_config.json  model.safetensors (or shards and their index)
    tokenizer.json  tokenizer_config.json  chat_template.jinja  preprocessor_config.json
    vision_tower/config.json  preprocessor_config.json        settings of the tower

What is written is read again by `load.py` and must come out the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from visavis.checkpoints.checkpoint import (
    Checkpoint,
    Written,
    whole_state,
    write_json,
    write_tensors,
    write_words,
)
from visavis.checkpoints.llava.config import (
    CLASSES,
    KNOWN_TOWERS,
    TYPES,
    name_table,
    tiles_config,
    turns_of,
    vlm_config,
)
from visavis.checkpoints.transformers.export import chat_template, library_norms, lost_settings
from visavis.checkpoints.transformers.export_config import (
    decoder_json,
    describe_connector,
    inexpressible,
    tower_json,
)
from visavis.checkpoints.transformers.export_processor import processor_json
from visavis.checkpoints.transformers.vision_models import vit_config
from visavis.checkpoints.transformers.weights import write_as
from visavis.model.config import ConnectorConfig, ImageLayoutConfig, ViTConfig, VLMConfig
from visavis.processing.config import ImageProcessorConfig

TOWER = "vision_tower"
OTHERS = "`--to native` keeps every part"


def write_llava(loaded: Checkpoint, folder: Path, *, progress: bool = False) -> Written:
    """Write a loaded model; all tensors in the type that its matmuls compute in.

    Raises:
        CheckpointError: a part that the layout does not have; it is named.
    """
    state, config = library_norms(whole_state(loaded.vlm), loaded.vlm.config)
    processor = loaded.processor
    if config.head is not None:
        raise inexpressible("the embedding head", "LLaVA has none", OTHERS)
    if not isinstance(config.select_layer, int):
        raise inexpressible("features of several layers", "LLaVA selects one", OTHERS)
    if processor is None or not isinstance(config.tower, ViTConfig):
        kind = config.tower.kind if config.tower else "none"
        raise inexpressible(f"the vision tower ({kind})", "LLaVA has CLIP or SigLIP", OTHERS)
    text, vision = decoder_json(config.decoder), _tower(config)
    data = _config(config, text, vision, processor, loaded)
    read = vlm_config(data, text, vision)
    if read != _as_read(config):
        raise inexpressible(f"a part of the model ({config})", f"it is read as {read}", OTHERS)
    dtype = loaded.vlm.decoder.dtype
    data["torch_dtype"] = str(dtype).removeprefix("torch.")
    files = [write_json(folder / "config.json", data)]
    context_length = config.decoder.context_length
    files += write_words(folder, loaded.tokenizer, loaded.specials, context_length=context_length)
    template = chat_template(loaded.profile, "<image>")
    if template:
        files.append(folder / "chat_template.jinja")
        files[-1].write_text(template, encoding="utf-8")
    (folder / TOWER).mkdir()
    whole = replace(processor, resize=_whole(processor, vision), tiles=None, video=None)
    settings = processor_json(whole)
    files.append(write_json(folder / TOWER / "config.json", vision))
    files += [
        write_json(place / "preprocessor_config.json", settings)
        for place in (folder, folder / TOWER)
    ]
    table = name_table(text, vision, read)
    files += write_tensors(folder, write_as(read, table, state), dtype=dtype, progress=progress)
    profile = replace(loaded.profile, video_times="")  # it has a place here
    return Written(files, [*lost_settings(profile), *_lost_turns(data, text, loaded)])


def _config(
    config: VLMConfig,
    text: dict[str, Any],
    vision: dict[str, Any],
    processor: ImageProcessorConfig,
    loaded: Checkpoint,
) -> dict[str, Any]:
    """Return the layout's config.json: the language model's settings and its own."""
    known = {kind: name for name, kind in CLASSES.items()}
    types = {kind: name for name, kind in TYPES.items()}
    kind = text["model_type"]
    if kind not in known:
        names = ", ".join(known)
        raise inexpressible(f"the language model ({kind})", f"LLaVA's are {names}", OTHERS)
    start_end = bool(loaded.profile.image_start)
    data = {
        **text,
        "architectures": [known[kind]],
        "model_type": types[kind],
        "bos_token_id": loaded.specials.bos_id,
        "eos_token_id": loaded.specials.eos_id,
        "pad_token_id": loaded.specials.pad_id,
        "use_mm_proj": True,
        "mm_vision_tower": _tower_name(vision),
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": _projector(config.connector),
        "mm_vision_select_layer": config.select_layer if vit_config(vision).class_token else -2,
        "mm_vision_select_feature": "patch" if config.select_feature == "patch" else "cls_patch",
        "mm_use_im_start_end": start_end,
        "mm_use_im_patch_token": False,
        "add_time_instruction": bool(loaded.profile.video_times),
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,  # the tower's weights are those in this folder
        **_merge(config.merge),
    }
    tiles = processor.tiles
    if tiles is None:
        return data | {"image_aspect_ratio": "pad" if processor.resize == "pad" else "square"}
    flip = 1 if tiles.axes == "wh" else -1
    most = config.merge.max_tiles
    data["image_aspect_ratio"] = f"anyres_max_{most}" if most else "anyres"
    data["image_grid_pinpoints"] = [list(grid[::flip]) for grid in tiles.grids]
    found = tiles_config(data, processor.size)
    if found is None or found.multi_image != tiles.multi_image:
        way = f"several pictures in a prompt ({tiles.multi_image})"
        raise inexpressible(way, f"{data['image_aspect_ratio']} does otherwise", OTHERS)
    return data


def _tower(config: VLMConfig) -> dict[str, Any]:
    """Return the tower's config.json; of SigLIP with the block that LLaVA cuts off."""
    tower = config.tower
    assert isinstance(tower, ViTConfig)
    if tower.class_token:
        return tower_json(tower)
    if config.select_layer != -1:
        reason = "LLaVA reads SigLIP's last but one"
        raise inexpressible(f"hidden state {config.select_layer} of the tower", reason, OTHERS)
    return tower_json(replace(tower, num_layers=tower.num_layers + 1))


def _tower_name(vision: dict[str, Any]) -> str:
    """Return the hub's name of a tower of known settings, else the folder within."""
    found = vit_config(vision)
    return next((n for n, known in KNOWN_TOWERS.items() if vit_config(known[0]) == found), TOWER)


def _projector(connector: ConnectorConfig | None) -> str:
    plain = connector and ConnectorConfig(
        connector.kind, connector.in_width, connector.out_width, connector.depth
    )
    if connector is None or connector != plain or connector.kind not in ("linear", "mlp"):
        described = describe_connector(connector)
        raise inexpressible(f"the connector ({described})", "LLaVA has linear and MLP", OTHERS)
    return "linear" if connector.kind == "linear" else f"mlp{connector.depth}x_gelu"


def _merge(merge: ImageLayoutConfig) -> dict[str, Any]:
    pool = {"mm_spatial_pool_mode": merge.video_pool_mode} if merge.video_pool > 1 else {}
    if merge.kind == "flat":
        return {"mm_patch_merge_type": "flat", **pool}
    return {
        "mm_patch_merge_type": "spatial_unpad" if merge.unpad else "spatial",
        "mm_newline_position": merge.video_newline,
        "mm_spatial_pool_mode": merge.video_pool_mode,
        "mm_spatial_pool_stride": merge.video_pool,
    }


def _as_read(config: VLMConfig) -> VLMConfig:
    """Return a config in the one of its spellings that is read back."""
    tower = config.tower
    assert isinstance(tower, ViTConfig)
    # int(x) and int(round(x, 7)) cut the same rows for all but one in 20,000 sizes.
    merge = replace(config.merge, round_unpad=False)
    config = replace(config, image_token_id=0, video_token_id=-1, merge=merge)
    return config if tower.num_prefix_tokens else replace(config, select_feature="patch")


def _whole(processor: ImageProcessorConfig, vision: dict[str, Any]) -> Any:
    """Return how a base view is sized: that of a tile is CLIP's crop, or SigLIP's square."""
    if processor.resize not in ("pad", "tiles"):
        return processor.resize
    return "crop" if vision["model_type"] == "clip_vision_model" else "squash"


def _lost_turns(data: dict[str, Any], text: dict[str, Any], loaded: Checkpoint) -> list[str]:
    """Return a note if loading the folder selects another chat format than the model has."""
    settled, ours = turns_of(data, text), loaded.profile.chat_template
    if settled == ours or not settled:
        return []
    named = f"load it with chat_template={ours!r}" if ours else "its own template is in the folder"
    return [f"the chat format (the layout's readers take {settled!r}; {named})"]
