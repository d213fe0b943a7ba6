"""Benchmarks: results are checked against a reference, then timed in turns and compared with a limit."""

from minrnn.benchmarks.bench import Entry

BENCHES: dict[str, Entry] = {
    "scan": Entry("minrnn.benchmarks.scan", "gated scans: time, share of the copy bandwidth, peak memory"),
    "layer": Entry("minrnn.benchmarks.layer", "training steps of layers, compared with GRU, LSTM and Linear"),
    "train": Entry("minrnn.benchmarks.train", "a model's training step, as it is and with train.compile"),
    "ranks": Entry("minrnn.benchmarks.ranks", "a model's training step by several processes, and by one"),
    "decode": Entry("minrnn.benchmarks.decode", "latency of single steps of a layer from a carried state"),
    "step": Entry("minrnn.benchmarks.step", "latency of a model's single step, by a Decoder and in torch"),
    "export": Entry(
        "minrnn.benchmarks.export", "a model's single step in other runtimes, and its file's size"
    ),
    "selective": Entry("minrnn.benchmarks.selective", "Mamba's selective scan, compared with mambapy's"),
    "prefix": Entry("minrnn.benchmarks.prefix", "what a sequence divided over ranks costs beside its scan"),
    "accuracy": Entry("minrnn.benchmarks.accuracy", "error against a float64 loop by sequence length"),
    "gpu": Entry("minrnn.benchmarks.gpu", "on a GPU: the engine's tests, then scans, layers and peers"),
    "kernels": Entry(
        "minrnn.benchmarks.kernels", "the GPU kernels as compiled: bytes, registers, instructions"
    ),
}
"""The benchmarks of `minrnn bench`, by name."""
