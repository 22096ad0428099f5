"""A cluster's plan as text; every heading says that it is an estimate."""

from __future__ import annotations

from common.table import fact_table, table
from common.units import decimal_size, duration
from cost_model.cluster_plan import Scaling
from results.cluster import ClusterPlan, JobPlan


def cluster_table(found: ClusterPlan) -> str:
    """Return the text of a plan."""
    parts = [_facts(found)]
    for name, job in found.jobs.items():
        parts += [_job(name, job), _scaling(name, job), _stops(job)]
    notes = [f"estimate, measured elsewhere: {line}" for line in found.measured]
    notes += [f"estimate, assumed: {line}" for line in found.assumptions]
    return "\n\n".join([*parts, "\n".join(notes)])


def _facts(found: ClusterPlan) -> str:
    cluster = found.cluster
    sizes = ", ".join(f"{name} {number}" for name, number in found.sizes.items())
    return fact_table(
        {
            "ESTIMATE": f"for {cluster.name}, nothing was run",
            "model": f"{found.model}: {sizes}",
            "tokens": f"{found.tokens:,}",
            "cluster": f"{cluster.nodes} nodes of {cluster.workers_per_node} workers, each with "
            f"{cluster.compute / 1e12:.3g} TFLOP/s reached in layers",
            "device": f"{cluster.device.name}; {cluster.device.source}",
            "network": f"{cluster.network / 1e9:g} GB/s of a node",
            "file system": f"{cluster.write / 1e9:g} GB/s written, {cluster.read / 1e9:g} read, of "
            "all nodes together",
        }
    )


def _job(name: str, job: JobPlan) -> str:
    items = ", ".join(f"{number:,} {each}" for each, number in job.items.items())
    if job.seconds is None:
        time = "the model does not fit into these nodes together"
    else:
        time = f"{duration(job.seconds)}, limited by {job.limit}"
    facts = {
        f"estimate, psp {name}": time,
        "items": items,
        "disk": f"{decimal_size(round(job.disk_bytes))} at most",
        "network": f"{decimal_size(round(job.network_bytes))} in all",
    }
    for work, parts in job.item_seconds.items():
        told = ", ".join(f"{part} {seconds:.3g} s" for part, seconds in parts.items())
        facts[f"one of {work}"] = told
    if job.stages > 1:
        facts["the model is held by"] = f"{job.stages} workers together"
    return fact_table(facts)


def _scaling(name: str, job: JobPlan) -> str:
    heads = ("workers", "time", "speed-up", "efficiency", "limit")
    return table([f"estimate, {name}: nodes", *heads], list(map(_row, job.scaling)))


def _row(each: Scaling) -> list[str]:
    cells = ["–", "–", "–"]
    if each.seconds is not None and each.speedup is not None and each.efficiency is not None:
        cells = [duration(each.seconds), f"{each.speedup:.2f}", f"{each.efficiency:.0%}"]
    return [str(each.nodes), str(each.workers), *cells, each.limit]


def _stops(job: JobPlan) -> str:
    lines = [f"{stop.work} from {stop.workers:,} workers on: {stop.cause}" for stop in job.stops]
    return "more workers stop helping:\n" + "\n".join(f"  {line}" for line in lines)
