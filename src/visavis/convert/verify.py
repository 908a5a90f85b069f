"""Probes for a model and its conversion, and the comparison of their answers.

The probes are a fixed set of texts and drawn images.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visavis.api import Model
from visavis.checkpoints.checkpoint import INTEGERS
from visavis.checkpoints.formats import TARGETS
from visavis.checkpoints.gguf.export import mmproj_path
from visavis.checkpoints.gguf.load import find_parts
from visavis.checkpoints.load import load_checkpoint
from visavis.convert.conversion import Conversion
from visavis.model.vision.vit import ViT
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.resize import process_image

TEXTS = (
    "A cup of coffee stands on a wooden table.",
    "猫が窓のそばで寝ています。  12:30 — déjà midi ?",
    "def area(radius):\n    return 3.14159 * radius**2\n",
    "Name three colours of the rainbow, separated by commas.",
)
QUESTION = "What is in this picture?"
SHORT = 40  # characters that fit every text tower


@dataclass(frozen=True)
class Probe:
    """One thing that is asked: a text, or an image with one."""

    name: str
    text: str
    image: Image.Image | None = None

    @property
    def item(self) -> Any:
        """The probe as `Model.embed` takes it."""
        if self.image is None:
            return self.text
        return {"image": self.image, "text": self.text}


@dataclass(frozen=True)
class Answer:
    """The outputs of a model for a probe; an output that is not available is empty.

    Attributes:
        vector: the embedding of the probe, [D].
        hidden: the last hidden state of the probe in its chat format, [W].
        log_probs: of the token after it, [vocab]; -inf for tokens that are not reported.
        token_ids: of the probe in its chat format.
    """

    vector: np.ndarray | None = None
    hidden: np.ndarray | None = None
    log_probs: np.ndarray | None = None
    token_ids: tuple[int, ...] = ()

    @property
    def is_empty(self) -> bool:
        return self.vector is None and self.hidden is None and self.log_probs is None


def probes(with_pictures: bool) -> list[Probe]:
    """Return the probes: texts and, if requested, images of several shapes."""
    asked = [Probe(f"text {number}", text) for number, text in enumerate(TEXTS, start=1)]
    if with_pictures:
        drawn = {"gradient": _gradient(), "checkers": _checkers(), "blocks": _blocks()}
        asked += [Probe(f"image of {name}", QUESTION, image) for name, image in drawn.items()]
    return asked


def cosine(first: Answer, second: Answer) -> float | None:
    """Return the smaller cosine of vectors and hidden states; None if one has neither."""
    pairs = [(first.vector, second.vector), (first.hidden, second.hidden)]
    found = [
        float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        for a, b in pairs
        if a is not None and b is not None
    ]
    return float(np.min(found)) if found else None  # NaN if one is


def divergence(first: Answer, second: Answer) -> float | None:
    """Return the Kullback-Leibler divergence of the second's next token from the first's, over
    the tokens that both tell; None if one tells nothing."""
    if first.log_probs is None or second.log_probs is None:
        return None
    size = min(len(first.log_probs), len(second.log_probs))  # a placeholder may have been added
    p, q = (one[:size].astype(np.float64) for one in (first.log_probs, second.log_probs))
    if np.isnan(p).any() or np.isnan(q).any():
        return float("inf")
    told = np.isfinite(p) & np.isfinite(q)
    p, q = (one[told] - np.logaddexp.reduce(one[told]) for one in (p, q))
    return max(0.0, float((np.exp(p) * (p - q)).sum()))


def _gradient() -> Image.Image:
    rows, columns = np.mgrid[0:240, 0:400]
    pixels = np.stack((rows, columns * 0.6, 255 - rows), -1)
    return Image.fromarray(pixels.astype(np.uint8))


def _checkers() -> Image.Image:
    rows, columns = np.mgrid[0:360, 0:200] // 40
    light = (rows + columns) % 2 == 0
    return Image.fromarray(np.where(light[..., None], (250, 240, 210), (120, 60, 20)).astype("u1"))


def _blocks() -> Image.Image:
    blocks = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((300, 300), Image.Resampling.NEAREST)


NUM_TOLD = 50  # likeliest tokens that llama.cpp is asked for
TIMEOUT_S = 600

Ask = Callable[[Path, str, Sequence[Probe], Sequence[Answer]], list[Answer]]


def ask_transformers(
    place: Path, precision: str, probes: Sequence[Probe], _: Sequence[Answer]
) -> list[Answer]:
    """Ask a folder's `Auto…` classes, with the folder's own chat template and processor."""
    import transformers

    with_pictures = any(probe.image is not None for probe in probes)
    vision = (place / "processor_config.json").is_file()
    auto: Any = (
        transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    )
    model = auto.from_pretrained(place, dtype="auto", local_files_only=True).eval()
    reader_class: Any = transformers.AutoProcessor if vision else transformers.AutoTokenizer
    reader = reader_class.from_pretrained(place, local_files_only=True)
    assert vision or not with_pictures
    answers = []
    for probe in probes:
        inputs = _inputs(reader, probe, vision)
        if vision and "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        with torch.inference_mode():
            found = model(**inputs, output_hidden_states=True)
        answers.append(
            Answer(
                hidden=found.hidden_states[-1][0, -1].float().numpy(),
                log_probs=found.logits[0, -1].float().log_softmax(-1).numpy(),
                token_ids=tuple(inputs["input_ids"][0].tolist()),
            )
        )
    return answers


def _inputs(reader: Any, probe: Probe, vision: bool) -> Any:
    if reader.chat_template:
        image = [] if probe.image is None else [{"type": "image", "image": probe.image}]
        content: Any = [*image, {"type": "text", "text": probe.text}] if vision else probe.text
        inputs = reader.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        images = [] if probe.image is None else [probe.image]
        text = "".join(reader.image_token for _ in images) + probe.text
        settings: dict[str, Any] = {"images": images or None} if vision else {}
        inputs = reader(text=text, return_tensors="pt", **settings)
    inputs.pop("token_type_ids", None)
    return inputs


def ask_sentence_transformers(
    place: Path, precision: str, probes: Sequence[Probe], _: Sequence[Answer]
) -> list[Answer]:
    """Ask `SentenceTransformer(folder)`."""
    import sentence_transformers

    model = sentence_transformers.SentenceTransformer(
        str(place),
        trust_remote_code=True,
        device="cpu",
        local_files_only=True,
        model_kwargs={"precision": precision},
    )
    vectors = model.encode([probe.item for probe in probes])
    return [Answer(vector=vector) for vector in vectors]


def ask_llama_cpp(
    place: Path, precision: str, probes: Sequence[Probe], expected: Sequence[Answer]
) -> list[Answer]:
    """Ask llama.cpp for the token after each prompt.

    Texts are given as the ids of the source's tokenizer; images go through llama.cpp's own chat
    template and tokenizer. A token that is a part of a character has no probabilities in the
    answer, so a whole character is forced; the probabilities are those before that.
    """
    import xllamacpp

    model, vision = find_parts(place) if place.is_dir() else (place, mmproj_path(place))
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    if vision is not None and vision.is_file():
        parameters.mmproj.path = str(vision)
        parameters.mmproj_use_gpu = False
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.n_ctx = 256 * (2 + max(len(one.token_ids) for one in expected) // 256)
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)
    address = server.listening_address.removeprefix("http://")
    forced = _post(address, "/tokenize", {"content": "a"})["tokens"][-1]
    answers = []
    for probe, answer in zip(probes, expected, strict=True):
        if answer.log_probs is None:
            answers.append(Answer())
            continue
        prompt: Any = list(answer.token_ids)
        if probe.image is not None:
            prompt = _multimodal_prompt(address, probe)
        request = {
            "prompt": prompt,
            "n_predict": 1,
            "temperature": 0,
            "n_probs": NUM_TOLD,
            "logit_bias": [[forced, 1000]],
            "cache_prompt": False,
        }
        body = _post(address, "/completion", request)
        told = np.full(len(answer.log_probs), -np.inf, np.float32)
        for token in body["completion_probabilities"][0]["top_logprobs"]:
            told[token["id"]] = token["logprob"]
        answers.append(Answer(log_probs=told, token_ids=answer.token_ids))
    del server
    return answers


def _multimodal_prompt(address: str, probe: Probe) -> dict[str, Any]:
    """Return a probe with an image as llama.cpp's own chat template renders it."""
    assert probe.image is not None
    buffer = io.BytesIO()
    probe.image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    url = {"url": f"data:image/png;base64,{data}"}
    content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": probe.text}]
    messages = [{"role": "user", "content": content}]
    text = _post(address, "/apply-template", {"messages": messages})["prompt"]
    return {"prompt_string": text, "multimodal_data": [data]}


def _post(address: str, path: str, request: dict[str, Any]) -> Any:
    """Return the JSON answer of a local server.

    Raises:
        RuntimeError: the server refuses the request.
    """
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
    response = connection.getresponse()
    body = json.loads(response.read())
    connection.close()
    if response.status != http.HTTPStatus.OK:
        raise RuntimeError(f"{path} answers {response.status}: {body}")
    return body


@contextmanager
def as_llama_cpp_computes(model: Model) -> Iterator[None]:
    """Let a vision tower put its class token behind the patches, as llama.cpp does (see
    docs/checkpoints.md): each patch gets the position of the one before it."""
    tower = model.vlm.tower
    if not isinstance(tower, ViT) or tower.class_token is None:
        yield
        return
    class_token = tower.class_token

    def embed(pixels: Tensor) -> Tensor:
        x = tower.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((x, class_token.expand(len(x), 1, -1)), 1) + tower.positions
        return x if tower.pre_norm is None else tower.pre_norm(x)

    tower.embed = embed  # type: ignore[method-assign]
    try:
        yield
    finally:
        del tower.embed


def sized(probe: Probe, processor: ImageProcessorConfig | None) -> Probe:
    """Return a probe whose image has the size of the vision tower, because llama.cpp resizes
    otherwise; without its image where the model cuts images into tiles, which it lays otherwise."""
    if probe.image is None or processor is None:
        return probe
    if processor.tiles is not None:
        return replace(probe, image=None)
    pixels = process_image(probe.image, processor)
    mean, std = (
        np.array(one, np.float32)[:, None, None] for one in (processor.mean, processor.std)
    )
    levels = ((pixels * std + mean) * 255).round().clip(0, 255).astype(np.uint8)
    return replace(probe, image=Image.fromarray(levels.transpose(1, 2, 0)))


PEERS: dict[str, tuple[str, Ask]] = {  # Python package -> what people call it, how it is asked
    "transformers": ("transformers", ask_transformers),
    "sentence_transformers": ("sentence-transformers", ask_sentence_transformers),
    "xllamacpp": ("llama.cpp", ask_llama_cpp),
}


# Least cosine and largest KL by what the weights are stored in. Several times what rounding does to
# nano and SmolLM2-135M, whose numbers are in docs/convert.md.
LIMITS = {"f32": (0.9999, 1e-3), "bf16": (0.99, 0.05), "f16": (0.99, 0.05)}
LIMITS |= dict.fromkeys(INTEGERS, LIMITS["bf16"])  # both sides hold the same integers
KINDS = {"F32": LIMITS["f32"], "F16": LIMITS["f16"], "BF16": LIMITS["bf16"], "Q8_0": (0.99, 0.05)}
FEWER_BITS = (0.8, 1.0)


@dataclass(frozen=True)
class Check:
    """One probe's answers, compared."""

    name: str
    cosine: float | None
    kl: float | None
    same: bool


@dataclass(frozen=True)
class Verdict:
    """All of it.

    Attributes:
        asked: who opened what was written.
        reason: why it is not the same; empty if it is.
    """

    asked: str
    min_cosine: float
    max_kl: float
    checks: list[Check] = field(default_factory=list)
    reason: str = ""

    @property
    def same(self) -> bool:
        return not self.reason

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "same": self.same}


def verify(done: Conversion) -> Verdict:
    """Compare a conversion with the model that it was written from."""
    min_cosine, max_kl = limits(done.precision, done.kind)
    asked = probes(done.loaded.vlm.tower is not None)
    expected = answers(Model.of(done.loaded), asked)
    peer = TARGETS[done.target].peer if done.loaded.vlm.config.has_decoder else ""
    checks: list[Check] = []
    names = []
    try:
        if peer and find_spec(peer):
            name, ask = PEERS[peer]
            names.append(name)
            told, wanted = asked, expected
            if name == "llama.cpp":
                told = [sized(probe, done.loaded.processor) for probe in asked]
                model = Model.of(done.loaded)
                with as_llama_cpp_computes(model):
                    wanted = answers(model, told)
            found = ask(done.out, done.precision, told, wanted)
            checks += _compare(name, told, wanted, found, min_cosine, max_kl)
        if done.target != "sentence-transformers" or not names:
            names.append("visavis again")
            found = answers(_reload(done), asked)
            checks += _compare("visavis", asked, expected, found, min_cosine, max_kl)
    except Exception as error:  # whatever a peer raises on what it cannot open
        reason = f"{names[-1]} cannot use it ({type(error).__name__}: {error})"
        return Verdict(" and ".join(names), min_cosine, max_kl, checks, reason)
    different = [check.name for check in checks if not check.same]
    return Verdict(" and ".join(names), min_cosine, max_kl, checks, ", ".join(different))


def limits(precision: str, kind: str) -> tuple[float, float]:
    """Return the least cosine and the largest KL divergence of a right conversion.

    Args:
        kind: the type of a GGUF file's tensors, if it is one.
    """
    stored = KINDS.get(kind, FEWER_BITS) if kind else LIMITS[precision]
    return max(LIMITS[precision], stored, key=lambda limit: limit[1])


def answers(model: Model, asked: Sequence[Probe]) -> list[Answer]:
    """Return the answer of a model to each probe; empty for an image it cannot take."""
    found = []
    for probe in asked:
        if probe.image is not None and not model.takes_images:
            found.append(Answer())
            continue
        if not model.vlm.config.has_decoder:  # it embeds, and CLIP's like texts and images apart
            alone = probe.text[:SHORT] if probe.image is None else probe.image
            found.append(Answer(vector=model.embed([alone])[0]))
            continue
        trace = model.trace(probe.item)
        found.append(
            Answer(
                vector=model.embed([probe.item])[0],
                hidden=trace.hidden[-1],
                log_probs=torch.from_numpy(trace.logits[-1]).log_softmax(-1).numpy(),
                token_ids=tuple(trace.token_ids.tolist()),
            )
        )
    return found


def _reload(done: Conversion) -> Model:
    """Load what was written; a GGUF file with its vision half, in the chat format of the source."""
    beside = done.files[1] if done.out.is_file() and len(done.files) > 1 else None
    loaded = load_checkpoint(
        done.out,
        precision=done.precision,
        device="cpu",
        chat_template=done.loaded.profile.chat_template,
        vision_tower=beside,
    )
    return Model.of(loaded)


def _compare(
    who: str,
    asked: Sequence[Probe],
    expected: Sequence[Answer],
    found: Sequence[Answer],
    min_cosine: float,
    max_kl: float,
) -> list[Check]:
    """Return a check for each probe that was answered."""
    checks = []
    for probe, first, second in zip(asked, expected, found, strict=True):
        if second.is_empty:
            continue
        near, kl = cosine(first, second), divergence(first, second)
        same = (near is None or near >= min_cosine) and (kl is None or kl <= max_kl)
        checks.append(Check(f"{who}: {probe.name}", near, kl, same))
    return checks
