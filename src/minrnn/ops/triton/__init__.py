"""The GPU engine, in Triton: engine.py launches the kernels of kernels.py, which the other files make up."""

from minrnn.ops.triton.installed import VERSION as VERSION
