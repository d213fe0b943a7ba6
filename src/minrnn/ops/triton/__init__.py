"""The GPU engine, in Triton: engine.py launches the kernels in kernels.py; the other files hold their
parts."""

from minrnn.ops.triton.installed import VERSION as VERSION
