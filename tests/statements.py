"""Every figure of the project's prose, and the record that it comes from: STATEMENTS and DEFINITIONS.

A statement is a part of a sentence, with its figures in braces, and a function that returns them from the
records in `results/` and `benchmarks/results/`. `test_measured.py` compares the two at the precision that is
printed. A part without braces is a claim, whose function returns whether it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev

from measurements import (
    LAYERS,
    MATCHED,
    OURS,
    QUALITY,
    RECURRENCES,
    SIGNED,
    SPEED,
    Above,
    Below,
    Values,
    action,
    average,
    best_loss,
    best_reached,
    best_run,
    carried_mb,
    carrying,
    case,
    characters,
    commonest_count,
    constant,
    copied,
    counts,
    data_score,
    ends,
    exported_layer,
    faster,
    first_right,
    growths,
    guess,
    halfcheetah,
    harder,
    heavier,
    hopper,
    languages,
    lead,
    learned,
    learning_spread,
    listeners,
    listops,
    machine,
    mean_and_ends,
    megabytes,
    minutes,
    model_steps,
    placed,
    players,
    playing_time,
    ratios,
    reached,
    reading,
    records,
    results,
    runs,
    scores,
    short_loss,
    short_recipe,
    shortest_steps,
    sigmoid,
    signed_runs,
    slowdowns,
    slower,
    spread,
    step_ms,
    steps_to_bits_of_bytes,
    time_to_bits_of_bytes,
    timed,
    token,
    token_shares,
    unlearned,
)

from minrnn.experiments.scores import HIGHEST, MEAN
from minrnn.experiments.shakespeare import NINE_TENTHS, seconds_a_step
from minrnn.ops import chunks, cpu, memory, projected
from minrnn.training import load_recipe, recipe_names

Statement = tuple[str, Callable[[], Values]]

STATEMENTS: dict[str, list[Statement]] = {
    "README.md": [
        ("float32, {two} threads of an {AMD EPYC}:", lambda: machine("layer", "threads", "processor")),
        ("{1.54} million characters of training", lambda: short_recipe("mingru")[0]["tokens"] / 1e6),
        ("{one} thread of an {AMD EPYC}.", lambda: placed(short_recipe("mingru")[0])),
        ("mean of {three} seeds:", lambda: {len(short_recipe(mixer)) for mixer in QUALITY}),
        ("but take {two} to {four} times as long", lambda: slowdowns("gru", "lstm")),
        (
            "GRU and LSTM reach a lower loss",
            lambda: (
                max(short_loss("gru"), short_loss("lstm")) < min(short_loss("mingru"), short_loss("minlstm"))
            ),
        ),
    ],
    "docs/results.md.template": [
        (
            "two runs at a time on",
            lambda: len({placed(run) for mixer in QUALITY for run in short_recipe(mixer)}) == 1,
        ),
        (
            "In the small model a Decoder's step is the shortest, in the large one ExecuTorch's.",
            lambda: [shortest_steps(width) for width in (192, 512)] == [{"minrnn"}, {"executorch"}],
        ),
        (
            "medians, all systems in turns within one run",
            lambda: len({machine(name, "processor", "cores", "threads") for name in SPEED}) == 1,
        ),
        ("768 characters, {1.54} million in all", lambda: short_recipe("mingru")[0]["tokens"] / 1e6),
        (
            "GRU and LSTM, whose gates see the state, learn more from each character than minGRU and minLSTM",
            lambda: max(map(short_loss, ("gru", "lstm"))) < min(map(short_loss, ("mingru", "minlstm"))),
        ),
        (", and RNN less;", lambda: short_loss("rnn") > max(short_loss("mingru"), short_loss("minlstm"))),
        (
            "minGRU and minLSTM are ahead of the Transformer in loss and in time.",
            lambda: all(
                measure("attention") > max(measure("mingru"), measure("minlstm"))
                for measure in (short_loss, lambda mixer: minutes(short_recipe(mixer)))
            ),
        ),
    ],
    "docs/cpu-backend.md": [
        ("On {two} threads of an {AMD EPYC} the scan", lambda: machine("scan", "threads", "processor")),
        ("takes {4.4} ms at (8, 1024, 512)", lambda: step_ms("scan", "minrnn", B=8, T=1024, D=512)),
        ("copying as many bytes takes {5.0} ms", lambda: step_ms("scan", "copy", B=8, T=1024, D=512)),
        (
            "minGRU's forward reaches {104} % of the copy bandwidth (float32)",
            lambda: (
                100
                * case("shares", "minrnn", B=1, gate="mingru", dtype="float32", threads=2)["share"]["forward"]
            ),
        ),
        ("needs {285} MB beside its inputs", lambda: megabytes("minrnn")),
        ("`Linear(256, 512)` alone needs {201} MB", lambda: megabytes("linear")),
        ("and takes {1.13} times as long", lambda: 1 / case("layer-lengths", "linear", T=4096)["times_ours"]),
        ("in backward: {168} MB for the step above", lambda: megabytes("minrnn-recompute")),
        (
            "in {1.31} times the time.",
            lambda: case("layer-lengths", "minrnn-recompute", T=4096)["times_ours"],
        ),
        ("Outputs of {4} MiB and more", lambda: cpu._LARGE / 2**20),
        ("what is unused for {ten} seconds", lambda: memory.IDLE),
        ("pre-activations fill {32} MiB or more", lambda: projected.LARGE_BYTES / 2**20),
    ],
    "docs/coming-from-torch.md": [
        (
            "The recipes that were tuned here use {1e-3} to {3e-3} with AdamW",
            lambda: ends(load_recipe(name).train.learning_rate for name in recipe_names()),
        ),
    ],
    "docs/gpu-backend.md": [
        (
            "minGRU's forward in bfloat16 moves {6} bytes an element with {60} instructions a step",
            lambda: counts("bytes", "instructions_a_step"),
        ),
    ],
    "docs/models-and-decoding.md": [
        ("decay starts near {0.73} instead of {0.5}", lambda: (sigmoid(1), sigmoid(0))),
        ("(signed: {0.46} instead of 0)", lambda: 2 * sigmoid(1) - 1),
        ("this takes {0.08} to {0.25} of the time of torch's", lambda: ends(model_steps(128, 192))),
    ],
    "docs/export.md": [("is a file of {29} kB: {25} kB of weights, and {19} nodes", exported_layer)],
    "docs/numerics.md": [
        ("cut float32 and float64 only, at {512} steps or more", lambda: chunks.MIN_STEPS),
    ],
    "docs/policies.md": [
        ("with {800} steps in place of", lambda: hopper("step")[0]),
        ("place of {2,000}, such", lambda: load_recipe("decisions").train.steps),
        ("that return {2,736} on average", lambda: hopper("data", "mean_return")[0]),
        ("were asked for {3,233}", lambda: hopper("target_return")[0]),
        ("and earned {3,176} to {3,216}", lambda: ends(map(mean, hopper("returns")))),
        (
            "the means of {three} seeds over {ten} episodes",
            lambda: (len(hopper("returns")), len(hopper("returns")[0])),
        ),
    ],
    "results/acting-cpu/reading.md": [
        (
            "A recurrence's action takes about as long after 999 steps as after 99, and carries as much",
            lambda: all(action(m) < 1.2 * action(m, 100) for m in ("mingru", "minlstm", *RECURRENCES)),
        ),
        ("minGRU's takes {0.22} ms and minLSTM's {0.20}", lambda: (action("mingru"), action("minlstm"))),
        (
            "less than {half} of RNN's and GRU's",
            lambda: Below(
                max(action(one) / action(m) for one in ("mingru", "minlstm") for m in ("rnn", "gru"))
            ),
        ),
        ("minGRU's is {0.08} of the time of Decision", lambda: action("mingru") / action("attention")),
        ("and {0.12} of that of attention", lambda: action("mingru") / action("attention-joined")),
        ("whole episode takes {3.8} ms after 999", lambda: action("attention-whole")),
        ("{18} times as long", lambda: action("attention-whole") / action("mingru")),
        (
            "and carries {9.2} MB",
            lambda: timed("acting", "attention-whole", "state_bytes", steps=1000)[0] / 1e6,
        ),
    ],
    "results/inference-cpu/reading.md": [
        ("minGRU's takes {0.2} ms at batch 8", lambda: mean(token("mingru", 8))),
        ("{0.15} of GRU's time and {0.11} of Mamba's,", lambda: token_shares(8)),
        ("and {0.5} to {0.9} ms at batch 64", lambda: ends(token("mingru", 64))),
        ("{0.39} and {0.33} of theirs", lambda: token_shares(64)),
        (
            "one by one ({1} to {10} ms)",
            lambda: ends(ms for mixer in RECURRENCES for batch in (8, 64) for ms in token(mixer, batch)),
        ),
        ("{178} ms and", lambda: token("attention", 64)[-1]),
        ("and {403} MB against", lambda: carried_mb("attention")),
        ("minGRU's {0.9} ms", lambda: token("mingru", 64)[-1]),
        ("and {0.4} MB; at", lambda: carried_mb("mingru")),
        ("at batch 8, {12} ms against {0.2}.", lambda: (token("attention", 8)[-1], token("mingru", 8)[-1])),
        ("2,048 in {0.35} to {0.59} of GRU's time", lambda: ends(reading("mingru", "gru"))),
        ("and in {0.72} to {0.81} of Mamba's", lambda: ends(reading("mingru", "mamba"))),
        ("minLSTM in {0.55} to {0.71} of LSTM's.", lambda: ends(reading("minlstm", "lstm"))),
    ],
    "results/runtime-cpu/reading.md": [
        (
            "minGRU's step is the shortest of all but Aaren's at every length",
            lambda: (
                min(
                    ratio
                    for m in LAYERS
                    if m not in ("mingru", "aaren")
                    for ratio in ratios("runtime", m, "mingru", "step")
                )
                > 1
            ),
        ),
        (
            "and nothing holds less.",
            lambda: (
                min(ratio for m in LAYERS for ratio in ratios("runtime", m, "mingru", "peak_bytes")) > 0.999
            ),
        ),
        ("it takes {0.09} to {0.22} of the time", lambda: ends(ratios("runtime", "mingru", "gru", "step"))),
        ("measured, {0.08} to {0.18}.", lambda: ends(ratios("runtime", "mingru", "gru-loop", "step"))),
        (
            "takes {0.19} to {0.44} of torch's LSTM's",
            lambda: ends(ratios("runtime", "minlstm", "lstm", "step")),
        ),
        ("minGRU holds {0.22} to {0.44} of", lambda: ends(ratios("runtime", "mingru", "gru", "peak_bytes"))),
        ("minLSTM {0.29} to {0.48} of", lambda: ends(ratios("runtime", "minlstm", "lstm", "peak_bytes"))),
        (
            "Mamba holds {2.7} to {3.9} times",
            lambda: ends(ratios("runtime", "mamba", "mingru", "peak_bytes")),
        ),
        (
            "of the lengths: {0.8} to {1.3} for",
            lambda: ends(growths(*(m for m in LAYERS if m != "attention"))),
        ),
        ("{1.5} to {1.5} for attention", lambda: ends(growths("attention"))),
    ],
    "results/selective-copying-cpu/reading.md": [
        (
            "learn the task with two layers and not with one",
            lambda: max(copied(OURS, (1,))) < 60 < 95 < min(copied(OURS, (2, 3))),
        ),
        ("give at least {99.3} % of the tokens", lambda: Above(min(copied(OURS, (2, 3))))),
        (
            "twice the length almost unchanged",
            lambda: min(copied(OURS, (2, 3), "x2")) > min(copied(OURS, (2, 3))) - 0.5,
        ),
        ("and give {84.7} to {99.8} % at four times", lambda: ends(copied(OURS, (2, 3), "x4"))),
        (
            "carries over on two seeds of three",
            lambda: sum(one > 90 for one in copied(["minlstm-unnormalised"], (3,), "x2")) == 2,
        ),
        ("GRU is perfect,", lambda: min(copied(["gru"], (2, 3), "x1")) > 99.95),
        (
            "at {9} to {15} minutes a run",
            lambda: ends(run / 60 for run in results("selective-copying", "seconds", mixer="gru")),
        ),
        (
            "minEMA (one seed) with three layers is perfect too, in {3.7} minutes",
            lambda: (
                (average("selective-copying", "seconds", mixer="minema", layers=3) / 60)
                if min(copied(["minema"], (3,))) > 99.9
                else None
            ),
        ),
        (
            "torch's LSTM, at the best of three rates and with three seeds, learns little",
            lambda: [len(runs("selective-copying", mixer="lstm", layers=n)) for n in (2, 3)] == [3, 3],
        ),
        (
            "learns little and its RNN (one seed) nothing",
            lambda: max(copied(["lstm"], (2, 3))) < 50 and max(copied(["rnn"], (2, 3))) < 8,
        ),
        (
            "Mamba (one seed) does as well as minGRU with two layers",
            lambda: min(copied(["mamba"], (2,))) > 99.5 and len(copied(["mamba"], (2,))) == 1,
        ),
        ("with three learns next to nothing", lambda: max(copied(["mamba"], (3,))) < 20),
        (
            "is nearly perfect at the length trained on and lost at twice that.",
            lambda: min(copied(["attention"], (3,))) > 99 and max(copied(["attention"], (2, 3), "x2")) < 25,
        ),
    ],
    "results/shakespeare-cpu/reading.md": [
        (
            "reach the loss that all {three} runs of the Transformer reach",
            lambda: len(characters("transformer")),
        ),
        ("reach in {0.60} of its steps", lambda: {faster(mixer)[0] for mixer in OURS}),
        ("and {0.37} to {0.39} of its time, at", lambda: faster(*OURS, x="seconds")),
        (
            "and end {0.08} and {0.06} nats lower on the test part",
            lambda: [lead(mixer, "transformer") for mixer in OURS],
        ),
        ("{1.5} million characters are", lambda: average("shakespeare", "tokens", mixer="mingru") / 1e6),
        ("it is {0.61} of its steps", lambda: {faster(mixer, matched="parameters")[0] for mixer in OURS}),
        (
            "and {0.45} to {0.49} of its time, and",
            lambda: faster(*OURS, matched="parameters", x="seconds"),
        ),
        (
            "they end {0.08} and {0.07} lower",
            lambda: [lead(mixer, "transformer", "parameters") for mixer in OURS],
        ),
        (
            "GRU and LSTM are {0.04} and {0.02} ahead of minGRU at the same width",
            lambda: [lead(mixer, "mingru") for mixer in ("gru", "lstm")],
        ),
        (
            "with {1.6} and {1.9} times the parameters",
            lambda: [heavier(mixer) for mixer in ("gru", "lstm")],
        ),
        (
            "and {0.03} and {0.02} with as many",
            lambda: [lead(mixer, "mingru", "parameters") for mixer in ("gru", "lstm")],
        ),
        ("it trains as fast as minGRU", lambda: 0.95 < slower("lstm") < 1.05),
        (
            "after {45} seconds to minGRU's {56}",
            lambda: [reached(mixer, "parameters", "seconds") for mixer in ("lstm", "mingru")],
        ),
        ("GRU trains {3.5} times as long", lambda: slower("gru")),
        ("Mamba, in {one} seed", lambda: len(characters("mamba"))),
        (
            "is {0.01} to {0.02} ahead of minGRU on the validation part",
            lambda: ends(lead("mamba", "mingru", matched, ("best",)) for matched in MATCHED),
        ),
        (
            "no further from it on the test part than minGRU's seeds are from each other",
            lambda: max(abs(lead("mamba", "mingru", matched)) for matched in MATCHED) < spread("mingru"),
        ),
        (
            "with the state carried beyond the lengths trained on it loses again, as S4D does",
            lambda: min(carrying(mixer) for mixer in ("aaren", "s4d")) > 0 > carrying("mingru"),
        ),
        (
            "for all but Aaren by {0.14} to {0.24} nats",
            lambda: ends(harder(run) for run in records("shakespeare") if run["setting"]["mixer"] != "aaren"),
        ),
        (
            "Two trials ran at a time, each on one core.",
            lambda: {run["machine"]["threads"] for run in records("shakespeare")} == {1},
        ),
    ],
    "src/minrnn/recipes/shakespeare-best.toml": [
        ("{66} minutes on one core", lambda: minutes([best_run("mingru", NINE_TENTHS)])),
        ("{1.449} nats a character", lambda: best_loss("mingru", NINE_TENTHS, "best")),
    ],
    "results/shakespeare-best-cpu/reading.md": [
        (
            "{2.9} million parameters and {16.6} million characters",
            lambda: [
                best_run("mingru", NINE_TENTHS)["result"][name] / 1e6 for name in ("parameters", "tokens")
            ],
        ),
        ("end at {1.451} nats in windows", lambda: best_loss("mingru", NINE_TENTHS)),
        (
            "{0.019} below nanoGPT's published loss",
            lambda: 1.4697 - best_loss("mingru", NINE_TENTHS),
        ),
        ("how nanoGPT's is chosen, is {1.449}.", lambda: best_loss("mingru", NINE_TENTHS, "best")),
        (
            "With the state carried it is {1.437} and {1.434}",
            lambda: [best_loss("mingru", NINE_TENTHS, *part, reads="val_loss") for part in ((), ("best",))],
        ),
        (
            "{0.031} nats ahead in windows on the last tenth, {0.026} at the last step, and {0.009} on",
            lambda: [
                best_loss("transformer", None, *part) - best_loss("mingru", None, *part)
                for part in (("best",), (), ("test",))
            ],
        ),
        ("That is {one} run of each", lambda: len(records("shakespeare-best")) / 3),
        (
            "seeds of the smaller minGRU of `shakespeare` are up to {0.035} apart on its test part",
            lambda: spread("mingru"),
        ),
        (
            "the Transformer's lowest loss on the last tenth after {50} % of the steps",
            lambda: 100 * best_reached("mingru", best_loss("transformer", None, "best")),
        ),
        (
            "at {1.43} seconds a step against {1.36}",
            lambda: [seconds_a_step(best_run(mixer)) for mixer in ("mingru", "transformer")],
        ),
        (
            "and is at its own after {65} %",
            lambda: 100 * best_reached("mingru", best_loss("mingru", None, "best")),
        ),
        (
            "The ninth tenth is worth {0.24} nats on the last",
            lambda: best_loss("mingru", None, "best") - best_loss("mingru", NINE_TENTHS, "best"),
        ),
    ],
    "results/stability-cpu/reading.md": [
        (
            "with a bias of 0 or 1 all twenty runs",
            lambda: not any(unlearned(*OURS, bias=bias) for bias in (0, 1)),
        ),
        (
            "minLSTM with less spread in when",
            lambda: all(
                learning_spread("minlstm", bias) < learning_spread("mingru", bias) for bias in (0, 1)
            ),
        ),
        ("one minGRU of five does not get there", lambda: unlearned("mingru", bias=3) == 1),
        (
            "from no run of five over two to all",
            lambda: [unlearned("minlstm-unnormalised", bias=bias) for bias in (0, 1, 3)] == [5, 3, 0],
        ),
        ("No run diverged.", lambda: all(run["failed"] is None for run in records("stability"))),
    ],
    "results/documents-cpu/reading.md": [
        ("after {half} of the steps", lambda: steps_to_bits_of_bytes() / 800),
        (
            "They take {1.3} times as long",
            lambda: (
                average("documents", "training_seconds", reads="4,096 subwords")
                / average("documents", "training_seconds", reads="bytes")
            ),
        ),
        ("in {0.65} of the time", time_to_bits_of_bytes),
    ],
    "results/formal-languages-cpu/reading.md": [
        ("learn it within {500} steps", lambda: max(map(first_right, signed_runs()))),
        (
            "least {99.5} % of strings of 256",
            lambda: Above(100 * min(run["result"]["by_length"]["256"] for run in signed_runs())),
        ),
        (
            "as are RNN and GRU (one seed each)",
            lambda: learned(("rnn", "gru"), "parity", "by_length", "256") == [1, 1],
        ),
        (
            "without the sign both guess, and so does LSTM here",
            lambda: max(learned((*OURS, "lstm"), "parity", "test", "accuracy")) < 0.53,
        ),
        (
            "trained on ({0.69} to {0.92} at 40 symbols)",
            lambda: ends(learned((*SIGNED, "lstm"), "cycle-navigation", "by_length", "40")),
        ),
        (
            "nobody does better than a guess at 256",
            lambda: (
                max(learned(languages(), "cycle-navigation", "by_length", "256"))
                < constant("cycle-navigation") + 0.03
            ),
        ),
        (
            "Even pairs are learnt by all but S4D, by attention not at every length",
            lambda: (
                [m for m in languages() if learned([m], "even-pairs", "test", "accuracy")[0] < 0.98]
                == ["attention", "s4d"]
            ),
        ),
        ("by Aaren ({0.96})", lambda: learned(["aaren"], "bucket-sort", "test", "accuracy")),
        (
            "unnormalised ({0.69} to {0.77})",
            lambda: ends(
                learned(("attention", "lstm", "minlstm-unnormalised"), "bucket-sort", "test", "accuracy")
            ),
        ),
        (
            "minGRU and minLSTM sort at the lengths trained on ({0.68} at 40",
            lambda: mean(learned(OURS, "bucket-sort", "by_length", "40")),
        ),
        ("found in {0.08} to {0.45} of", lambda: ends(learned(languages(), "majority", "test", "accuracy"))),
        (
            "the missing one no more often than by a guess",
            lambda: (
                max(learned(languages(), "missing-duplicate", "test", "accuracy"))
                < constant("missing-duplicate") + 0.02
            ),
        ),
        (
            "{0.08} against {0.17}, because",
            lambda: (
                mean(learned(languages(), "majority-count", "test", "accuracy")),
                constant("majority-count"),
            ),
        ),
        (
            "say {3}, which is right for {0.65} of strings of 40",
            lambda: (
                commonest_count(40, 40),
                mean(learned(languages(), "majority-count", "by_length", "40")),
            ),
        ),
        (
            "hardly any of 128",
            lambda: max(learned(languages(), "majority-count", "by_length", "128")) < 0.02,
        ),
        ("40 to 256 symbols is {7}", lambda: commonest_count(40, 256)),
    ],
    "results/listops-cpu/reading.md": [
        (
            "all but RNN answer {three} to {four} times as often",
            lambda: ends(listops(m) / guess() for m in listeners() if m != "rnn"),
        ),
        ("nobody {half} of the time", lambda: Below(max(map(listops, listeners())))),
        (
            "GRU, minGRU, minEMA and attention at {0.45} to {0.46}",
            lambda: ends(map(listops, ("gru", "mingru", "minema", "attention"))),
        ),
        ("minLSTM at {0.43}", lambda: listops("minlstm")),
        ("Mamba at {0.41}", lambda: listops("mamba")),
        ("LSTM, in other tables the strongest rival, at {0.40}", lambda: listops("lstm")),
        (
            "(minEMA, attention and Mamba with one seed)",
            lambda: all(len(runs("listops", mixer=m)) == 1 for m in ("minema", "attention", "mamba")),
        ),
        (
            "Between minGRU and GRU there is no difference beyond the seeds",
            lambda: abs(listops("mingru") - listops("gru")) < 0.01,
        ),
        (
            "takes {0.41} of GRU's time",
            lambda: (
                average("listops", "seconds", mixer="mingru") / average("listops", "seconds", mixer="gru")
            ),
        ),
        ("a convolution brings {0.030}", lambda: listops("minlstm", "conv") - listops("minlstm", "plain")),
        (
            "an MLP nothing",
            lambda: (
                max(
                    listops("minlstm", "mlp") - listops("minlstm", "plain"),
                    listops("minlstm") - listops("minlstm", "conv"),
                )
                < 0.005
            ),
        ),
    ],
    "results/locomotion-cpu/reading.md": [
        (
            "of Hopper and Walker2d score {100} and {108}",
            lambda: [data_score("best_score", env=env, quality="medium") for env in ("hopper", "walker2d")],
        ),
        ("cloning ({5} ± {4}) does", lambda: (mean(halfcheetah("bc")), stdev(halfcheetah("bc")))),
        (
            "do ({25} to {34}, but attention {11})",
            lambda: (
                *ends(mean(halfcheetah(m)) for m in players() if m != "attention"),
                mean(halfcheetah("attention")),
            ),
        ),
        ("({73.2} ± {2.1}; its runs {70.7} to {74.6})", lambda: mean_and_ends(scores("rnn"))),
        (
            "minGRU ({70.1} ± {1.2}; {68.8} to {71.0}) comes next",
            lambda: mean_and_ends(scores("mingru")),
        ),
        ("minLSTM ({69.2} ± {1.9}; {67.1} to {70.3})", lambda: mean_and_ends(scores("minlstm"))),
        (
            "beside S4D, Mamba and LSTM (one seed each)",
            lambda: all(
                len(scores(m)) == 1 and abs(scores(m)[0] - mean(scores("minlstm"))) < 1.9
                for m in ("s4d", "mamba", "lstm")
            ),
        ),
        ("above cloning ({68.9} ± {1.2})", lambda: mean_and_ends(scores("bc"))[:2]),
        ("the data's own mean ({39.9})", lambda: data_score("score")),
        ("at {0.43} to {0.47} of the time of a run of Mamba", lambda: ends(playing_time("mamba"))),
        ("and {0.27} to {0.29} of attention's", lambda: ends(playing_time("attention"))),
        (
            "return {14} to {23} points more",
            lambda: ends(mean(scores(m, MEAN)) - data_score("score") for m in players()),
        ),
        (
            "highest return of all, about as much",
            lambda: max(abs(mean(scores(m, HIGHEST)) - mean(scores(m))) for m in players()) < 2.5,
        ),
    ],
    "src/minrnn/recipes/formal-languages.toml": [
        ("an accuracy of {1.00} on up", lambda: learned(["minlstm"], "even-pairs", "by_length", "256")),
        ("(a guess: {0.50})", lambda: constant("even-pairs")),
    ],
    "src/minrnn/recipes/listops.toml": [
        ("above {0.43}, that after", lambda: listops("minlstm")),
        ("value: {0.12})", lambda: guess()),
    ],
    "src/minrnn/recipes/selective-copying.toml": [
        (
            "time: {3.3} minutes",
            lambda: average("selective-copying", "seconds", mixer="mingru", layers=3) / 60,
        ),
        ("{0.997} or more", lambda: Above(min(copied(["mingru"], (3,))) / 100)),
        ("(a guess: {0.07})", lambda: 1 / load_recipe("selective-copying").task.kinds),
    ],
    "src/minrnn/recipes/shakespeare-cpu.toml": [
        ("two CPU cores: {1.54} million", lambda: short_recipe("mingru")[0]["tokens"] / 1e6),
        ("under {0.9} million parameters", lambda: Below(short_recipe("mingru")[0]["parameters"] / 1e6)),
        (
            "time: {3.7} minutes ({one} thread of an {AMD EPYC}",
            lambda: (minutes(short_recipe("mingru")), *placed(short_recipe("mingru")[0])),
        ),
        ("a validation loss of {1.56} nats a", lambda: short_loss("mingru")),
        (
            "carried, {1.61} in windows of 64",
            lambda: mean(run["val_loss_windowed_64"] for run in short_recipe("mingru")),
        ),
    ],
}
"""Pages, and what they say that was measured, or that the code determines."""

DEFINITIONS: dict[str, list[tuple[str, str]]] = {
    "docs/text.md": [
        ("of more than 128 MiB, from evenly", "a limit"),
        ("in pieces of at most 1 MiB that end", "a limit"),
    ],
    "src/minrnn/recipes/python-bpe.toml": [
        ("at demo's (0.87 M against 0.88 M)", "counted from the settings"),
    ],
    "README.md": [
        ("With Python 3.11 or newer", "a version"),
    ],
    "docs/cpu-backend.md": [
        ("One wheel serves Python 3.11", "a version"),
        ("seen in the wheels of 2.13", "a version"),
        ("a sixteenth of the machine's memory", "a limit"),
        ("hardly forget, then twice", "the algorithm"),
    ],
    "docs/gpu-backend.md": [
        ("half of that in 16 bits", "the size of a number"),
        (
            "beside one millisecond of memory traffic",
            "derived from the shape and an H100's data sheet, not measured",
        ),
    ],
    "docs/coming-from-torch.md": [("forgets half of its state", "a gate of 0.5")],
    "docs/install.md": [
        ("You need Python 3.11 or newer", "a version"),
        ("compute capability 7.0", "a version"),
    ],
    "docs/policies.md": [("that hold a tenth of the steps", "a part of the data")],
    "docs/recurrence.md": [("(x + 0.5 for x >= 0", "the paper's equation")],
    "docs/models-and-decoding.md": [
        ("`forget_bias` (1.0)", "a default"),
        ("nears overflow (1e36)", "a threshold"),
    ],
    "docs/transformers.md": [
        ("since transformers 5.24 `cache`", "a version"),
        ("(above 50 GB)", "transformers' setting"),
        ("transformers 5.17 and 5.24", "versions"),
    ],
    "docs/distributed.md": [
        ("a checkpoint 120 seconds before", "the setting"),
        ("300 GB/s between the GPUs of a machine", "an assumption of the model of costs"),
        ("and 45 GB/s for each GPU between machines", "an assumption of the model of costs"),
        ("17,800 tokens at 45 GB/s; 2,200 where", "the model's arithmetic"),
        ("P = 1.25 billion", "an example"),
        ("computes for 153 ms and sends for 0, 29, 53 and 57 ms", "the model's arithmetic"),
        ("0.05, 0.4, 3.4 and 55 million", "the model's arithmetic"),
    ],
    "docs/sharded-weights.md": [
        ("such as AdamW's step, as 0 (torch 2.13)", "the version"),
        ("weights twice, gradients once", "the algorithm"),
        ("a half on two ranks, a quarter on four", "asserted by tests/test_weights.py"),
    ],
    "docs/numerics.md": [
        ("a state is rounded eight times at each of", "the algorithm"),
        ("loses a millionth in each step", "an example"),
        ("The tests hold it to 1e-6 of the largest", "a limit"),
        ("by up to 5e-7 of it for each border", "eight roundings of 2^-24"),
        ("allow errors ten times as large for signed", "a threshold"),
        ("a decay of 0.999 rounds to 1", "bfloat16"),
        ("hold the backends to 2e-6", "a threshold"),
        ("a decay above one half is", "the algorithm"),
        ("numbers near overflow (1e36)", "a threshold"),
        ("millionth step changes the former by a millionth", "arithmetic"),
    ],
    "docs/tasks-and-training.md": [
        ("any file (the last tenth validates)", "a part of the data"),
        ("leaves the last tenth for a test", "a part of the data"),
        ("half of a batch's rows continue and half start empty", "the setting"),
    ],
    "docs/your-text.md": [
        ("with Python 3.11 or newer", "a version"),
        ("its last tenth)", "a part of the data"),
        ("100 kB are enough to see something; 10 MB are not too much", "advice"),
    ],
    "docs/results.md.template": [
        ("the first nine tenths to train on and the last tenth to validate on", "a part of the data"),
        ("is 1.88 (0.80 M parameters)", "published: nanoGPT's README"),
    ],
    "results/runtime-cpu/reading.md": [
        ("held 1.88 times as much", "published: the paper's section 4.1"),
        ("(in the paper 1.56 times)", "published: the paper's section 4.1"),
        ("over the longer half of the lengths", "the fit"),
    ],
    "results/formal-languages-cpu/reading.md": [
        ("six times the length", "256 to 40 symbols"),
        ("the published minLSTM does at 0.94", "published: the paper's table 4"),
    ],
    "results/listops-cpu/reading.md": [
        ("a hundredth of the paper's and less", "1,500 steps of 32 to 250,000"),
        ("(0.46 to 0.59)", "published: the paper's table 6"),
    ],
    "results/selective-copying-cpu/reading.md": [
        ("sequences of twice the length", "the setting"),
        ("at four times;", "the setting"),
        ("at four times the length", "the setting"),
        ("lost at twice that", "the setting"),
    ],
    "results/shakespeare-cpu/reading.md": [
        ("(1.548, 1.555 and 1.547)", "published: the paper's section 4.2"),
    ],
    "results/locomotion-cpu/reading.md": [
        ("that of the best tenth", "a part of the data"),
    ],
    "results/shakespeare-best-cpu/reading.md": [
        *(
            (part, "parts of the text")
            for part in (
                "with nine tenths to train on",
                "both on eight tenths",
                "in windows on the last tenth",
                "on the ninth tenth, by which",
                "lowest loss on the last tenth",
                "The ninth tenth is",
            )
        ),
        (
            "56 % of the speeches are of its speakers, and 0.4 % of those of the first eight",
            "counted in the text: lines that end in a colon, by the tenth of the characters that they are in",
        ),
    ],
    "src/minrnn/recipes/shakespeare-best.toml": [
        ("nanoGPT's published 1.4697, with 10.65 M parameters", "published: nanoGPT's README"),
    ],
    "src/minrnn/recipes/shakespeare.toml": [
        ("the paper reports 1.548", "published: the paper's section 4.2"),
    ],
}
"""Figures that are no measurements of ours, and why: settings, thresholds, arithmetic, published figures."""
