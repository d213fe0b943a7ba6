"""Benchmarks: equality first, then times in turns, each beside the limit that bounds it."""

from minrnn.benchmarks.accuracy import AccuracyBench, bench_accuracy
from minrnn.benchmarks.decode import DecodeBench, bench_decode
from minrnn.benchmarks.layer import LayerBench, bench_layer
from minrnn.benchmarks.scan import ScanBench, bench_scan

__all__ = [
    "AccuracyBench",
    "DecodeBench",
    "LayerBench",
    "ScanBench",
    "bench_accuracy",
    "bench_decode",
    "bench_layer",
    "bench_scan",
]
