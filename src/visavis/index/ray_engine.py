"""Shards made by many processes and machines with Ray Data (`pip install 'visavis[ray]'`).

    missing shards ──► ray.data.map_batches(ShardWorker) ──► part-000000.parquet, …

A worker loads the model once. Ray gives the shard of a worker that dies to another one; a shard is
written whole or not at all and under one name, so each item is in the result once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from visavis.errors import InputError, VisavisError
from visavis.index.shard_plan import Part, PlannedShard
from visavis.index.shards import ShardReport, ShardWriter

if TYPE_CHECKING:
    from visavis.api import Model

MAX_BLOCKS = 1000  # in which Ray keeps the list of shards


@dataclass(frozen=True)
class EmbedJob:
    """Everything a worker needs.

    Attributes:
        model: name or path, which every machine can load.
        loading: options of `visavis.load`.
        output: folder that all machines share, or a URL.
    """

    model: str
    output: str
    loading: Mapping[str, Any] = field(default_factory=dict)
    instruction: str = ""
    ocr: bool = False
    max_pixels: int | None = None

    def writer(self, load: Callable[..., Model]) -> ShardWriter:
        """Return the writer of shards with the model that `load` gives."""
        model = load(self.model, **self.loading)
        return ShardWriter(model, self.output, instruction=self.instruction, ocr=self.ocr)


class ShardWorker:
    """A worker of Ray Data; it is started with a job and called with batches of shards."""

    def __init__(self, job: EmbedJob) -> None:
        from visavis.api import load
        from visavis.processing.images import set_max_pixels

        if job.max_pixels is not None:
            set_max_pixels(job.max_pixels)
        self.writer = job.writer(load)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        reports = [self.writer.write(_shard(one)) for one in batch["shard"]]
        return {
            "number": [report.number for report in reports],
            "items": [report.items for report in reports],
            "failed": [json.dumps(report.failed) for report in reports],
        }


def run_on_ray(
    job: EmbedJob, shards: Sequence[PlannedShard], *, workers: int | None, gpu: bool
) -> Iterator[ShardReport]:
    """Yield the report of each shard when it is written.

    Args:
        workers: processes, each with a model; None: as many as the cluster has processors (with
            `gpu`: GPUs).
        gpu: give each worker a GPU instead of a processor.

    Raises:
        InputError: Ray is not installed, or the cluster has no such worker.
        VisavisError: as `ShardWriter.write`.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(
            f"--engine ray needs Ray Data, which is not installed ({error}): "
            "pip install 'visavis[ray]'"
        ) from None
    if not ray.is_initialized():
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # Ray raises plain ones
            raise InputError(
                f"Ray cannot start or be reached ({error}); check RAY_ADDRESS, or wait until the "
                "machine is less busy"
            ) from error
    resource = "GPU" if gpu else "CPU"
    available = int(ray.cluster_resources().get(resource, 0))
    if available < (workers or 1):
        raise InputError(
            f"{workers or 1} workers need as many {resource}s, and the Ray cluster has {available};"
            " ask for fewer with --workers, or connect to a larger cluster (RAY_ADDRESS)"
        )
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # our own bar shows the progress
    ray.data.DataContext.get_current().enable_progress_bars = False
    found = ray.data.from_items(
        [_row(shard) for shard in shards], override_num_blocks=min(len(shards), MAX_BLOCKS)
    ).map_batches(
        ShardWorker,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers or available, len(shards))),
        **({"num_gpus": 1} if gpu else {"num_cpus": 1}),
    )
    try:
        for row in found.iter_rows():
            failed = [(source, reason) for source, reason in json.loads(row["failed"])]
            yield ShardReport(int(row["number"]), int(row["items"]), failed)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, VisavisError):
            raise cause from error
        reason = " ".join(str(error).split())[-400:]
        raise InputError(
            f"Ray ended the run ({reason}); the same command makes the rest"
        ) from error


def _row(shard: PlannedShard) -> dict[str, str]:
    """Return a shard as Arrow keeps it."""
    parts = [[part.path, part.start, part.stop] for part in shard.parts]
    return {"shard": json.dumps([shard.number, parts])}


def _shard(row: str) -> PlannedShard:
    number, parts = json.loads(row)
    return PlannedShard(number, tuple(Part(*part) for part in parts))
