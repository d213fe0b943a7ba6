"""The recurrence h[t] = a[t] h[t-1] + b[t], and Mamba's selective scan, which has N states per channel."""

from minrnn.ops.decompositions import decompositions as decompositions
from minrnn.ops.gates import CANDIDATES as CANDIDATES
from minrnn.ops.gates import GATES as GATES
from minrnn.ops.memory import release_memory as release_memory
from minrnn.ops.projected import projected_scan as projected_scan
from minrnn.ops.recurrence import gated_scan as gated_scan
from minrnn.ops.recurrence import scan as scan
from minrnn.ops.registry import Engine as Engine
from minrnn.ops.registry import engines as engines
from minrnn.ops.selective import selective_scan as selective_scan
from minrnn.ops.sharded import sharded_scan as sharded_scan
