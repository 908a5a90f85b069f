"""The programs that layouts are made for, asked themselves: transformers, sentence-transformers and
llama.cpp, if they are installed.

The one file of the package that imports them, each within its function, and only for `--verify`.
What they are asked and how answers are compared is in `probes.py`.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visavis.checkpoints.gguf.model import find_parts
from visavis.convert.probes import Answer, Probe

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
    images = [] if probe.image is None else [probe.image]
    if reader.chat_template:
        content: Any = [{"type": "image"} for _ in images] + [{"type": "text", "text": probe.text}]
        message = {"role": "user", "content": content if vision else probe.text}
        text = reader.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    else:
        text = "".join(reader.image_token for _ in images) + probe.text
    # A template of a language model writes all special tokens itself, one of a LLaVA all but bos.
    settings: dict[str, Any] = {"images": images or None} if vision else {}
    if reader.chat_template and not vision:
        settings["add_special_tokens"] = False
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
    """Ask llama.cpp for the token after each text; pictures are left out.

    The ids are those of the source's tokenizer.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(find_parts(place)[0] if place.is_dir() else place)
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.n_ctx = 512
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)
    address = server.listening_address.removeprefix("http://")
    answers = []
    for probe, answer in zip(probes, expected, strict=True):
        if probe.image is not None or answer.log_probs is None:
            answers.append(Answer())
            continue
        ids = list(answer.token_ids)
        request = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": NUM_TOLD}
        connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
        connection.request(
            "POST", "/completion", json.dumps(request), {"Content-Type": "application/json"}
        )
        body = json.loads(connection.getresponse().read())
        connection.close()
        told = np.full(len(answer.log_probs), -np.inf, np.float32)
        for token in body["completion_probabilities"][0]["top_logprobs"]:
            told[token["id"]] = token["logprob"]
        answers.append(Answer(log_probs=told, token_ids=answer.token_ids))
    del server
    return answers


PEERS: dict[str, tuple[str, Ask]] = {  # Python package -> what people call it, how it is asked
    "transformers": ("transformers", ask_transformers),
    "sentence_transformers": ("sentence-transformers", ask_sentence_transformers),
    "xllamacpp": ("llama.cpp", ask_llama_cpp),
}
