"""Training on several processes, called ranks: what a rank computes, and how ranks exchange and fail."""

from minrnn.distributed.group import RankGroup as RankGroup
from minrnn.distributed.launch import Launch as Launch
from minrnn.distributed.launch import join as join
from minrnn.distributed.ranks import ALONE as ALONE
from minrnn.distributed.ranks import Ranks as Ranks
from minrnn.distributed.sequences import sequence_parallel as sequence_parallel
from minrnn.distributed.sequences import shard_sequence as shard_sequence
