"""The GPU engine of the selective scan, in Triton: engine.py launches the kernels in kernels.py."""

from minrnn.ops.triton.installed import VERSION as VERSION
