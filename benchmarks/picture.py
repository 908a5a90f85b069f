"""What a picture adds to the time to the first token: asked about first, and asked about again.

    python benchmarks/picture.py [--threads N] [--runs N] [--json FILE] [--quick] [--model MODEL]

The same questions are asked without a picture, and that time is taken off. Reading the file,
decoding and resizing it count. What is left counts as 1 ms at least. Ours alone: what is compared
is the first question and the others.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from _harness import Report, interleaved, parse_options, pin_to_cores
from _inputs import pictures

QUESTIONS = 8  # about each picture after the first
TIMES = 20  # as cheap as this the second question should be
LEAST = 1.0  # ms: a difference of two questions' times says no less


def main() -> int:
    options = parse_options("picture", __doc__, runs=5, model="nano")
    report = Report(options, "Second question about an image")
    pin_to_cores(options.threads)

    import torch

    import visavis
    from visavis.demo.samples import copy_samples
    from visavis.generate.prefix_cache import PrefixCache
    from visavis.processing.feature_cache import FeatureCache

    torch.set_num_threads(options.threads)
    model = visavis.load(options.model)
    asked = [f"What is shown in place {number} of it?" for number in range(QUESTIONS + 1)]

    def seconds(question: str, *images: Path) -> float:
        return model.chat(question, images, max_new_tokens=1).timings.prefill_s

    def forget() -> None:
        model.prefixes, model.image_encoder.cache = PrefixCache(), FeatureCache()

    def alone() -> float:
        """Return the time of a question without a picture of which nothing is known."""
        found = []
        for question in asked:
            forget()
            found.append(seconds(question))
        return statistics.median(found)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made = pictures(copy_samples(folder / "originals"), folder, options.runs + 1, 0)

        def first(run: int) -> float:
            forget()
            return 1000 * (seconds(asked[0], made[run + 1]) - alone())

        def again(run: int) -> float:
            without = alone()
            forget()
            seconds(asked[0], made[run + 1])
            found = [seconds(question, made[run + 1]) for question in asked[1:]]
            return max(1000 * (statistics.median(found) - without), LEAST)

        forget()
        remembered = [model.chat(question, [made[0]], max_new_tokens=16).text for question in asked]
        fresh = []
        for question in asked:
            forget()
            fresh.append(model.chat(question, [made[0]], max_new_tokens=16).text)
        different = sum(one != other for one, other in zip(remembered, fresh, strict=True))
        report.check("answers that what is remembered changes", different, passed=not different)
        samples = interleaved({"visavis": again, "visavis, first question": first}, options.runs)
        report.add(
            "second question about an image",
            samples,
            "ms",
            ratios={"visavis, first question": TIMES},
        )
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
