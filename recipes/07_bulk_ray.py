"""Score many files of pairs with Ray Data, on one machine or a cluster; go on where it ended.

    python recipes/07_bulk_ray.py pairs/ scored/ --model Qwen/Qwen3-Reranker-0.6B --dry_run
    python recipes/07_bulk_ray.py pairs/ scored/ --model Qwen/Qwen3-Reranker-0.6B --actors 2

Parquet files with columns `query`, `document` and perhaps `instruction` become files of the same
names with scores beside. A file is scored by one actor and appears when it is whole, so a run that
was killed goes on with the others: have many, sorted by query. One run and one model for an output
folder. On a cluster (--address auto --num_gpus 1) all have the extra `ray` and see both folders.
"""

import argparse
import os
from itertools import islice
from pathlib import Path
from time import perf_counter
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from qwen3_reranker.bulk import BulkScorer

ADDED = {"score": pa.float64(), "log_odds": pa.float64(), "truncated": pa.bool_()}


class FileScorer(BulkScorer):
    def __call__(self, batch):
        path, start, rows = Path(batch["file"][0]), perf_counter(), 0
        partial = args.output / f".{uuid4().hex}.partial"
        with pq.ParquetFile(path) as source:
            schema = pa.schema([*source.schema_arrow, *map(pa.field, ADDED, ADDED.values())])
            with pq.ParquetWriter(partial, schema) as writer:
                parts = source.iter_batches(256 if args.dry_run else 4096)
                for part in islice(parts, 1 if args.dry_run else None):
                    writer.write(pa.table(super().__call__(part.to_pydict()), schema))
                    rows += part.num_rows
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, args.output / (".sample.partial" if args.dry_run else path.name))
        return {"file": [path.name], "rows": [rows], "seconds": [perf_counter() - start]}


def is_scored(file):
    target = args.output / file.name
    return target.exists() and pq.read_metadata(target).num_rows == pq.read_metadata(file).num_rows


parser = argparse.ArgumentParser()
parser.add_argument("input", type=Path)
parser.add_argument("output", type=lambda folder: Path(folder).resolve())
parser.add_argument("--model", default="embedded")
parser.add_argument("--actors", type=int, default=1, help="each loads the model")
parser.add_argument("--num_cpus", type=int, default=1, help="threads of an actor")
parser.add_argument("--num_gpus", type=float, default=0, help="of an actor")
parser.add_argument("--address", default="local", help="of a Ray cluster; 'auto' finds it")
parser.add_argument("--dry_run", action="store_true", help="score a sample and tell how long")
args = parser.parse_args()
args.output.mkdir(parents=True, exist_ok=True)
for left_over in args.output.glob(".*.partial"):
    left_over.unlink()
files = sorted(args.input.resolve().glob("*.parquet"))
waiting = [{"file": str(file)} for file in files if not is_scored(file)]
print(f"{len(files)} files, {len(files) - len(waiting)} of them scored already", flush=True)
waiting = waiting[: args.actors if args.dry_run else None]
# Only names of files travel between processes; the texts never enter the object store.
ray.init(args.address, object_store_memory=100 * 2**20 if args.address == "local" else None)
ray.data.DataContext.get_current().enable_progress_bars = False
done = ray.data.from_items(waiting, override_num_blocks=len(waiting) or 1).map_batches(
    FileScorer, fn_constructor_args=[args.model], batch_size=1,
    compute=ray.data.ActorPoolStrategy(size=args.actors, max_tasks_in_flight_per_actor=1),
    num_cpus=args.num_cpus, num_gpus=args.num_gpus,
)  # fmt: skip
rates = []
for number, row in enumerate(done.iter_rows() if waiting else [], 1):
    rates.append(row["rows"] / row["seconds"])
    print(f"[{number}/{len(waiting)}] {row['file']}: {row['rows']} pairs, {rates[-1]:.1f} a second")
if args.dry_run and rates:
    print(f"{sum(rates):.1f} pairs a second, {1e6 / sum(rates) / 3600:.1f} hours for a million")
