"""Data to learn acting from, made here: policies that a library trains for minutes, and what they did."""

from minrnn.demonstrations.make import QUALITIES, make_data, plan_for
from minrnn.demonstrations.trainers import TRAINERS

__all__ = ["QUALITIES", "TRAINERS", "make_data", "plan_for"]
