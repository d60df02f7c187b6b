"""How a model routes: traces, measures of them, and what caches would make of them."""

from edgemoe.profiling.importers import import_router_logits, trace_transformers
from edgemoe.profiling.metrics import hit_rates, sch_fixed, sch_future, srp
from edgemoe.profiling.trace import Trace, TraceWriter, read_trace

__all__ = [
    "Trace",
    "TraceWriter",
    "hit_rates",
    "import_router_logits",
    "read_trace",
    "sch_fixed",
    "sch_future",
    "srp",
    "trace_transformers",
]
