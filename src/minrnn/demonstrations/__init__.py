"""Local demonstration data: behavior policies trained for minutes, and recordings of their episodes."""

from minrnn.demonstrations.make import QUALITIES, make_data, plan_for
from minrnn.demonstrations.trainers import TRAINERS

__all__ = ["QUALITIES", "TRAINERS", "make_data", "plan_for"]
