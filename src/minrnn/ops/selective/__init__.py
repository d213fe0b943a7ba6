"""Mamba's selective scan: a recurrence with N states per channel, which are never stored for all steps."""

from minrnn.ops.selective.recurrence import selective_scan as selective_scan
