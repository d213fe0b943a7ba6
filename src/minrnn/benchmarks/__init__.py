"""Benchmarks: equality with a reference first, then times in turns, each beside the limit that bounds it."""

from minrnn.benchmarks.bench import Entry

BENCHES: dict[str, Entry] = {
    "scan": Entry("minrnn.benchmarks.scan", "gated scans: time, share of the copy bandwidth, peak memory"),
    "layer": Entry("minrnn.benchmarks.layer", "training steps of whole layers beside GRU, LSTM and Linear"),
    "decode": Entry("minrnn.benchmarks.decode", "latency of single steps of a layer from a carried state"),
    "step": Entry("minrnn.benchmarks.step", "latency of a whole model's step, by a Decoder and in torch"),
    "selective": Entry("minrnn.benchmarks.selective", "Mamba's selective scan beside mambapy's"),
    "accuracy": Entry("minrnn.benchmarks.accuracy", "errors against a float64 loop as sequences grow"),
    "gpu": Entry("minrnn.benchmarks.gpu", "on a GPU: the engine's tests, then scans, layers and peers"),
    "kernels": Entry(
        "minrnn.benchmarks.kernels", "the GPU kernels as compiled: bytes, registers, instructions"
    ),
}
"""Each benchmark of `minrnn bench` by its name."""
