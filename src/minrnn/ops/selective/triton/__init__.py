"""The GPU engine of the selective scan, in Triton: engine.py launches the kernels of kernels.py."""

from minrnn.ops.triton.installed import VERSION as VERSION
