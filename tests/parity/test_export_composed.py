"""SmolLM2 with its own chat template, composed with small towers: every export is verified by the
program that it is for, images included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from visavis.checkpoints.checkpoint import Checkpoint
from visavis.checkpoints.compose import Composition, compose
from visavis.checkpoints.load import load_checkpoint
from visavis.checkpoints.native import write_native
from visavis.checkpoints.transformers.export import taking_parts
from visavis.convert import convert
from visavis.convert.verify import verify
from visavis.errors import CheckpointError
from visavis.processing.chat_template import ChatTemplate

pytestmark = pytest.mark.parity

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
TARGETS = ("native", "transformers", "gguf", "llava", "sentence-transformers")


def save_tower(kind: str, folder: Path) -> None:
    """Write a small random tower as transformers does."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (visavis[dev])")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}VisionConfig")(**SIZES)
    getattr(transformers, f"{kind}VisionModel")(config).save_pretrained(folder)
    square = {"height": 56, "width": 56}
    if kind == "CLIP":
        sizes: dict[str, Any] = {"size": {"shortest_edge": 56}, "crop_size": square}
    else:
        sizes = {"size": square}
    getattr(transformers, f"{kind}ImageProcessor")(**sizes).save_pretrained(folder)


def first_blocks(loaded: Checkpoint, number: int) -> Checkpoint:
    """Return a model with only the first blocks of its decoder."""
    decoder, config = loaded.vlm.decoder, loaded.vlm.config
    decoder.blocks = decoder.blocks[:number]
    decoder.config = replace(decoder.config, num_layers=number)
    loaded.vlm.config = replace(config, decoder=decoder.config)
    return loaded


def composed(kind: str, folder: Path, blocks: int) -> Path:
    save_tower(kind, folder / "tower")
    parts = Composition("smollm2-135m", str(folder / "tower"), {"kind": "mlp", "depth": 2})
    (folder / "own").mkdir()
    write_native(first_blocks(compose(parts, precision="f32"), blocks), folder / "own")
    return folder / "own"


@pytest.fixture(scope="module", params=["Siglip", "CLIP"])
def own(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    nano_files: dict[str, Path],
) -> Path:
    return composed(request.param, tmp_path_factory.mktemp("composed"), 2)


def check(source: Path, out: Path, target: str) -> None:
    kind = {"kind": "F32"} if target == "gguf" else {}
    verdict = verify(convert(source, out, to=target, precision="f32", **kind))
    assert verdict.same, verdict.reason
    asked = [one.name for one in verdict.checks]
    assert sum("text" in one for one in asked) >= 4 and sum("image" in one for one in asked) >= 3


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_verified(own: Path, target: str, tmp_path: Path) -> None:
    check(own, tmp_path / "out", target)


def test_tinyllava_is_refused_before_it_is_written(own: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"jinja chat template .*--chat-template.*vicuna_v1"):
        convert(own, tmp_path / "out", to="tinyllava", precision="f32")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_whole_language_model(target: str, tmp_path: Path, nano_files: dict[str, Path]) -> None:
    check(composed("Siglip", tmp_path, 30), tmp_path / "out", target)


IMAGE = {"type": "image"}
TALKS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What is it?"}]}],
    [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "See "}, IMAGE, IMAGE]},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ],
]
STRINGS_ONLY = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "first line empty": "\n  {% for message in messages %}\n{{ message.role }}: "
    "{{ message.content.strip() }}\n{% endfor %}",
    "system apart": "{% if messages[0]['role'] == 'system' %}{% set system = messages[0].content | "
    "trim %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{{ bos_token"
    " }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ (system + ' ' if loop.first else "
    "'') + m.content }} [/INST]{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("kind", STRINGS_ONLY)
@pytest.mark.parametrize("talk", TALKS)
def test_a_template_of_strings_takes_parts(kind: str, talk: list[dict[str, Any]]) -> None:
    """Ours and transformers' rendering of the wrapped template is that of the joined texts."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (visavis[dev])")
    loaded = load_checkpoint("tiny-random", precision="f32", device="cpu")
    joined = [
        {
            "role": one["role"],
            "content": one["content"]
            if isinstance(one["content"], str)
            else "".join(part.get("text", "<image>") for part in one["content"]),
        }
        for one in talk
    ]
    source = STRINGS_ONLY[kind]
    expected = ChatTemplate(source, "<s>", "</s>").render(joined)
    wrapped = taking_parts(source, "<image>")
    assert ChatTemplate(wrapped, "<s>", "</s>").render(talk) == expected
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=loaded.tokenizer, bos_token="<s>", eos_token="</s>"
    )
    theirs = peer.apply_chat_template(
        talk, chat_template=wrapped, tokenize=False, add_generation_prompt=True
    )
    assert theirs == expected
