"""Tiny TinyLLaVA models made of transformers' stock parts, written in each of its layouts.

`Peer` composes the parts as the original does; names of tensors and files are written by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.checkpoints.transformers_files import TEXT, VISION, fast_tokenizer
from tests.parity.peers import randomized

TOWERS = {
    CLIPVisionConfig: CLIPVisionModel,
    SiglipVisionConfig: SiglipVisionModel,
    Dinov2Config: Dinov2Model,
}
DINOV2: dict[str, Any] = {**VISION, "image_size": 40}  # positions learned on other pictures
HIDDEN = TEXT["hidden_size"]
OLD_CLASSES = {"llama": "TinyLlavaLlamaForCausalLM", "stablelm": "TinyLlavaStablelmForCausalLM",
               "phi": "TinyLlavaPhiForCausalLM"}  # fmt: skip


class Holder(nn.Module):
    """Gives a module the name it hangs under in the original."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        setattr(self, name, module)
        self.inner = [module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner[0](*args, **kwargs)


def mlp(inside: int = VISION["hidden_size"]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))


class Peer(nn.Module):
    """Tower(s), connector and language model, as the original puts them together."""

    def __init__(
        self,
        text: PreTrainedConfig | None = None,
        vision: PreTrainedConfig | None = None,
        second: PreTrainedConfig | None = None,
        *,
        layer: int = -2,
    ) -> None:
        super().__init__()
        towers = [vision or CLIPVisionConfig(**VISION), *([second] if second else [])]
        built = [TOWERS[type(config)](config) for config in towers]
        self.language_model: Any = AutoModelForCausalLM.from_config(text or LlamaConfig(**TEXT))
        self.is_mixture, self.layer = second is not None, layer
        names = ("clip", "dinov2")
        tower = nn.ModuleDict(dict(zip(names, built, strict=True))) if second else built[0]
        parts = nn.ModuleDict({name: mlp() for name in names}) if second else mlp()
        self.vision_tower = Holder("_vision_tower", tower)
        self.connector = Holder("_connector", parts)
        randomized(self)

    def image_tokens(self, pixels: Tensor) -> Tensor:  # [N, 3, S, S] -> [N, P, D]
        def features(tower: PreTrainedModel) -> Tensor:
            return tower(pixels, output_hidden_states=True).hidden_states[self.layer][:, 1:]

        tower, connector = self.vision_tower.inner[0], self.connector.inner[0]
        if not self.is_mixture:
            return connector(features(tower))
        both = [connector[name](features(tower[name])) for name in ("clip", "dinov2")]
        return torch.stack(both, 2).flatten(1, 2)

    def logits(self, ids: Tensor, slots: list[int], pixels: Tensor | None) -> Tensor:
        """Return the logits [T, vocab] of ids [T] with image tokens at `slots`."""
        embeddings = self.language_model.get_input_embeddings()(ids)
        if pixels is not None:
            embeddings[slots] = self.image_tokens(pixels).flatten(0, 1)
        return self.language_model(inputs_embeds=embeddings[None]).logits[0]


def hub_name(name: str) -> str:
    """Return a peer's tensor name as files on the hub have it."""
    parts = ("embeddings", "encoder", "pre_layrnorm", "post_layernorm", "head")
    for prefix in ("vision_tower._vision_tower.clip.", "vision_tower._vision_tower."):
        rest = name.removeprefix(prefix)
        if rest != name and rest.split(".")[0] in parts:
            return f"{prefix}vision_model.{rest}"
    return name


def tensors_of(peer: Peer) -> dict[str, Tensor]:
    """Return what a repository holds; tied heads once, as the original saves parameters."""
    dino = peer.is_mixture or isinstance(peer.vision_tower.inner[0], Dinov2Model)
    names = {
        name: name if dino and ".clip." not in name else hub_name(name)
        for name, _ in peer.named_parameters()
    }
    return {names[n]: p.detach().clone() for n, p in peer.named_parameters()}


def nested(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a config without what its class defaults to."""
    found = config.to_diff_dict()
    if config.model_type in ("llama", "clip_vision_model"):  # the original's own defaults
        found.pop("model_type", None)
    return found


def config_of(peer: Peer, **settings: Any) -> dict[str, Any]:
    tower = peer.vision_tower.inner[0]
    first = tower["clip"] if peer.is_mixture else tower
    config = {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "connector_type": "mof_mlp" if peer.is_mixture else "mlp2x_gelu",
        "llm_model_name_or_path": "someone/model",
        "vision_model_name_or_path": "mof:someone/clip" if peer.is_mixture else "someone/tower",
        "vision_model_name_or_path2": "mof:someone/dinov2" if peer.is_mixture else "",
        "image_token_index": -200,
        "text_config": nested(peer.language_model.config),
        "vision_config": nested(first.config),
        "vision_feature_layer": peer.layer,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "square",
        "tokenizer_use_fast": False,
        "num_queries": 128,
        "num_resampler_layers": 3,
        "tune_type_llm": "full",
    }
    if peer.is_mixture:  # the original fetches it; ours writes it beside the first
        config["vision_config2"] = nested(tower["dinov2"].config)
    return config | settings


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, default=str), encoding="utf-8")


def save_repository(folder: Path, peer: Peer, *, shards: int = 1, **settings: Any) -> Path:
    """Write layout (b) or (d): all at the root."""
    write_json(folder / "config.json", config_of(peer, **settings))
    tensors = tensors_of(peer)
    _save(folder, tensors, shards)
    fast_tokenizer().save_pretrained(folder)
    return folder


def _save(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    names = sorted(tensors)
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
        where = {name: files[at % shards] for at, name in enumerate(names)}
        write_json(folder / "model.safetensors.index.json", {"weight_map": where})
    for number, file in enumerate(files):
        save_file({name: tensors[name] for name in names[number::shards]}, folder / file)


def save_stage(folder: Path, peer: Peer, wrapped: set[str] = frozenset(), **settings: Any) -> Path:  # type: ignore[assignment]
    """Write layout (a): a folder for each part; `wrapped` linears' names as PEFT leaves them."""
    write_json(folder / "config.json", config_of(peer, **settings))
    write_json(folder / "trainer_state.json", {"global_step": 1})
    prefixes = {"language_model": "language_model.", "vision_tower": "vision_tower._vision_tower.",
                "connector": "connector."}  # fmt: skip
    for part, prefix in prefixes.items():
        tensors = {}
        for name, tensor in tensors_of(peer).items():
            module, _, last = name.rpartition(".")
            if name.startswith(prefix):
                base = f"{module}.base_layer.{last}" if module in wrapped else name
                tensors[base.removeprefix(prefix)] = tensor
        (folder / part).mkdir()
        torch.save(tensors, folder / part / "pytorch_model.bin")
    write_json(folder / "language_model" / "config.json", nested(peer.language_model.config))
    fast_tokenizer().save_pretrained(folder)
    return folder


def save_old(folder: Path, peer: Peer, **settings: Any) -> Path:
    """Write layout (e) of a SigLIP: LLaVA's settings and names, TinyLLaVABench's classes."""
    text = peer.language_model.config
    config = text.to_dict() | {
        "architectures": [OLD_CLASSES[text.model_type]],
        "model_type": "tiny_llava",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": VISION["hidden_size"],
    }
    write_json(folder / "config.json", config | settings)
    renamed = {}
    for name, tensor in tensors_of(peer).items():
        name = name.replace("vision_tower._vision_tower.", "model.vision_tower.vision_tower.")
        name = name.replace("connector._connector.", "model.mm_projector.")
        renamed[name.removeprefix("language_model.")] = tensor
    renamed.pop("lm_head.bias", None)  # their classes have neither
    cut = f"encoder.layers.{VISION['num_hidden_layers'] - 1}."
    kept = {name: tensor for name, tensor in renamed.items() if cut not in name}
    save_file(kept, folder / "model.safetensors")
    fast_tokenizer().save_pretrained(folder)
    return folder
