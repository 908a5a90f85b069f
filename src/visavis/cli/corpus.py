"""`visavis embed --corpus`: a whole corpus into Parquet shards, in this process or on Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from visavis.cli.common import Loading, print_json, say, show_progress
from visavis.errors import InputError

if TYPE_CHECKING:
    from visavis.index.ray_engine import EmbedJob
    from visavis.index.shard_plan import PlannedShard
    from visavis.index.shards import ShardReport

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class CorpusOptions:
    """Options of a run over a corpus."""

    engine: str
    workers: int | None
    shard_size: int
    instruction: str
    ocr: bool


def embed_corpus(
    model: str,
    corpus: Sequence[str],
    output: str | None,
    options: CorpusOptions,
    loading: Loading,
    *,
    as_json: bool,
) -> None:
    """Make the shards that are not there yet, and print what was made.

    Raises:
        InputError: an option cannot be used.
        VisavisError: a shard cannot be made.
    """
    from visavis.index.shard_plan import kept_plan
    from visavis.index.shards import done_shards
    from visavis.utils import track

    if output is None or output.endswith(".npy"):
        raise InputError("--corpus needs --output, a folder or URL for its shards")
    if options.engine not in ENGINES:
        raise InputError(f"--engine is {options.engine!r}, expected local or ray")
    if options.workers is not None and options.engine != "ray":
        raise InputError("--workers counts processes of Ray: add --engine ray")
    plan = kept_plan(output, corpus, options.shard_size, progress=show_progress())
    done = set(done_shards(output))
    missing = [shard for shard in plan.shards if shard.name not in done]
    for (suffix, reason), count in sorted(plan.left_out.items()):
        say(f"left out: {count} of suffix {suffix or 'none'} ({reason})")
    num_items, failed = 0, 0
    reports = _reports(_job(model, output, options, loading), missing, options, loading)
    weights = [1] * len(missing)
    for report in track(reports, "embedding", weights=weights, show=show_progress()):
        num_items += report.items
        failed += len(report.failed)
        for source, reason in report.failed:
            say(f"failed: {source}: {reason}")
    if as_json:
        print_json(
            {
                "output": output,
                "shards": len(plan.shards),
                "made": len(missing),
                "items": num_items,
                "failed": failed,
                "left_out": [
                    {"suffix": suffix, "reason": reason, "files": count}
                    for (suffix, reason), count in sorted(plan.left_out.items())
                ],
            }
        )
        return
    typer.echo(
        f"{num_items} items in {len(missing)} shards made, {failed} failed; {output} holds "
        f"{len(plan.shards)} shards"
    )


def _job(model: str, output: str, options: CorpusOptions, loading: Loading) -> EmbedJob:
    from visavis.index.ray_engine import EmbedJob

    settings = {key: value for key, value in vars(loading).items() if key != "max_pixels"}
    return EmbedJob(model, output, settings, options.instruction, options.ocr, loading.max_pixels)


def _reports(
    job: EmbedJob, shards: Sequence[PlannedShard], options: CorpusOptions, loading: Loading
) -> Iterator[ShardReport]:
    if not shards:
        return
    if options.engine == "ray":
        from visavis.index.ray_engine import run_on_ray

        gpu = loading.device.startswith("cuda")
        yield from run_on_ray(job, shards, workers=options.workers, gpu=gpu)
        return
    writer = job.writer(lambda name, **_: loading.load(name))
    for shard in shards:
        yield writer.write(shard)
