"""The registry EXPERIMENTS: every table and figure of the paper, each reproduced by one command."""

from minrnn.experiments.experiment import Entry

EXPERIMENTS: dict[str, Entry] = {
    "runtime": Entry(
        "minrnn.experiments.runtime",
        "figure 1",
        "time and memory of a training step against sequence length",
    ),
    "inference": Entry(
        "minrnn.experiments.inference",
        "appendix D.2",
        "time and memory of a generated token against context length",
    ),
    "selective-copying": Entry(
        "minrnn.experiments.selective_copying",
        "tables 1 and 2",
        "copying tokens that are hidden in noise: depth, mixers, longer sequences",
    ),
    "stability": Entry(
        "minrnn.experiments.stability",
        "figure 5",
        "learning curves over seeds, and the forget gate's initial bias",
    ),
    "shakespeare": Entry(
        "minrnn.experiments.shakespeare",
        "Shakespeare",
        "a language model of characters: loss against steps and seconds",
    ),
    "shakespeare-best": Entry(
        "minrnn.experiments.shakespeare",
        "Shakespeare",
        "our best run on two cores, compared with nanoGPT's published loss",
        "BEST",
    ),
    "shakespeare-cpu": Entry(
        "minrnn.experiments.shakespeare",
        "Shakespeare",
        "the recipe shakespeare-cpu for every mixer, with nanoGPT's budget for a CPU",
        "CPU",
    ),
    "documents": Entry(
        "minrnn.experiments.documents",
        "beyond the paper",
        "documents with resets or joined, bytes or subwords: bits a byte",
    ),
    "formal-languages": Entry(
        "minrnn.experiments.formal_languages",
        "table 4, Chomsky hierarchy",
        "seven formal languages, trained on short strings and tested on long ones",
    ),
    "listops": Entry(
        "minrnn.experiments.listops",
        "table 4, Long Range Arena, and table 6",
        "nested expressions: mixers, and an ablation of the block",
    ),
    "locomotion": Entry(
        "minrnn.experiments.locomotion",
        "table 3",
        "policies trained on recorded episodes, and their returns",
    ),
    "acting": Entry(
        "minrnn.experiments.acting",
        "beside table 3",
        "time and memory of a policy's action against the episode's length",
    ),
}
"""The experiments, by name."""
