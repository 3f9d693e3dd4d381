"""Tables, charts and pages from the records in results/. No figure on a page is typed by hand.

    python results/report.py                                                       every page again, byte for byte
    python results/report.py score   --profiles DIR --data DIR --out results/NAME  IDs against the planted groups
    python results/report.py meaning --profiles DIR --data DIR --out results/NAME  what IDs tell of known attributes
    python results/report.py summary --results results/demo --profiles DIR --seconds FILE    the demo's summary.json
    python results/report.py forecast --profiles DIR                               how long `reproduce.sh full` takes

Records: NAME/{runs.jsonl, meta.json} of ctr.py run, NAME/{score, meaning, summary}.json of this program,
NAME/cards.md of codebook.py cards, bench/*.json of bench.py. NAME is a data set, or DATASET-PROTOCOL-LABEL; behind it
may stand -without-PART (an ablation) or -codes-K (another codebook size). Pages: README.md here, and the blocks
<!-- SECTION --> … <!-- /SECTION --> of the README at the top.
"""
from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from codebook import perplexity, read_profiles, rows_by_id
from ctr import (KNOWN, by_fold, cell, difference, known_auc, known_table, markdown, metric_mean, overall_table,
                 read_runs, signed)

ROOT = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------- what IDs are: score and meaning

def ari(a, b) -> float:
    """Adjusted Rand index of two labellings [N] (Hubert & Arabie 1985): 1 = same, 0 = chance; nan for N = 0."""
    a, b = (np.unique(np.asarray(labels), return_inverse=True)[1] for labels in (a, b))
    if len(a) != len(b):
        raise ValueError(f"two labellings of {len(a)} and {len(b)} rows")
    if not len(a):
        return math.nan
    pairs = lambda counts: float((counts * (counts - 1.0) / 2).sum())
    both = pairs(np.unique(a * (b.max() + 1) + b, return_counts=True)[1])
    rows, columns, everything = pairs(np.bincount(a)), pairs(np.bincount(b)), pairs(np.array([len(a)]))
    expected = rows * columns / everything if everything else 0.0
    span = (rows + columns) / 2 - expected
    return (both - expected) / span if span else 1.0


def mutual_information(codes: np.ndarray, classes: np.ndarray) -> float:
    """Mutual information of two labellings [N] ≥ 0, in bits. Biased upwards by chance: compare with shuffled codes."""
    both = np.zeros((codes.max() + 1, classes.max() + 1))
    np.add.at(both, (codes, classes), 1 / len(codes))
    seen = both > 0
    return float((both[seen] * np.log2(both[seen] / (both.sum(1, keepdims=True) * both.sum(0))[seen])).sum())


def heldout_accuracy(codes: np.ndarray, classes: np.ndarray, folds: int = 10) -> float:
    """Accuracy of guessing a user's class [N] as the most frequent one of the user's code in the other folds.

    A user's fold is its place modulo `folds`; a code that the other folds lack is guessed as their most frequent class.
    """
    right = 0
    for fold in range(folds):
        held = np.arange(len(codes)) % folds == fold
        counts = np.zeros((codes.max() + 1, classes.max() + 1))
        np.add.at(counts, (codes[~held], classes[~held]), 1)
        counts[counts.sum(1) == 0] = counts.sum(0)
        right += int((counts.argmax(1)[codes[held]] == classes[held]).sum())
    return right / len(codes)


def read_both(args):
    """Profiles, data set, and the row of each of the data set's users in the profiles (−1: absent)."""
    profiles, source = read_profiles(args.profiles), data.read_data(args.data)
    row = rows_by_id(source.users, profiles.users)
    if not (row >= 0).any():
        raise ValueError(f"{args.profiles} and {args.data} have no user in common")
    return profiles, source, row


def command_score(args) -> None:
    """score.json: counts of the data, and IDs against the groups that made it (adjusted Rand index)."""
    (profiles, source, row), truth, out = read_both(args), data.read_truth(args.data) or {}, Path(args.out)
    rows = np.bincount(source.user[source.part == 0], minlength=len(row))                    # training rows of a user
    groups = {"dense": (row >= 0) & (rows >= 6), "sparse": (row >= 0) & (rows < 6)}
    planted = [(p, name) for p, name in enumerate(profiles.names) if name in truth]

    def scores(users: np.ndarray) -> dict:
        index = lambda p, group: ari(profiles.ids[row[users], p], truth[group][users])
        others = lambda p, name: [abs(index(p, other)) for _, other in planted if other != name]
        return {name: {"own": round(index(p, name), 6), "other": round(max(others(p, name), default=0.0), 6)}
                for p, name in planted if users.any()}

    columns = [(name, profiles.ids[:, p], profiles.probability[:, p]) for p, name in enumerate(profiles.names)]
    found = {"lm": profiles.meta.get("lm"), "ari": scores(groups["dense"]), "ari_sparse": scores(groups["sparse"]),
             "perplexity": {name: round(perplexity(ids[ids >= 0].astype(np.int64), len(profiles.books[p].pi)), 6)
                            for p, (name, ids, _) in enumerate(columns)},
             "users": {name: int(group.sum()) for name, group in groups.items()},
             "unsure": {name: round(float((sure[ids >= 0] < 0.5).mean()), 6) for name, ids, sure in columns}}
    print(json.dumps(found, ensure_ascii=False))
    found["data"] = {key: source.meta[key] for key in ("name", "seed", "kinds", "parts")}
    out.mkdir(parents=True, exist_ok=True)
    data.write_json(out / "score.json", found)


def command_meaning(args) -> None:
    """meaning.json: what IDs tell of known attributes, in bits and held-out accuracy, beside shuffled IDs."""
    (profiles, _, row), truth, rng = read_both(args), data.read_truth(args.data), np.random.default_rng(0)
    if truth is None:
        raise ValueError(f"{args.data} has no truth.npz: nothing is known of its users")
    order, told = rng.permutation(np.flatnonzero(row >= 0)), []        # folds must not follow the users' order
    for attribute in sorted(set(truth) - {"users", "n_train"}):
        classes = np.unique(truth[attribute][order], return_inverse=True)[1]
        for p, name in enumerate(profiles.names):
            codes = profiles.ids[row[order], p].astype(np.int64) + 1   # 0: no evidence
            bits = mutual_information(codes, classes)
            dealt = [rng.permutation(codes) for _ in range(args.shuffles)]
            chance = [mutual_information(one, classes) for one in dealt]
            luck = [heldout_accuracy(one, classes) for one in dealt]
            told.append({"profile": name, "attribute": attribute, "classes": int(classes.max()) + 1, "bits": bits,
                         "bits_shuffled": float(np.mean(chance)),
                         "p": (1 + int(np.greater_equal(chance, bits).sum())) / (1 + args.shuffles),
                         "accuracy": heldout_accuracy(codes, classes), "accuracy_shuffled": float(np.mean(luck)),
                         "accuracy_majority": heldout_accuracy(0 * codes, classes)})
    Path(args.out).mkdir(parents=True, exist_ok=True)
    data.write_json(Path(args.out, "meaning.json"),
                    {"lm": profiles.meta.get("lm"), "users": len(order), "shuffles": args.shuffles, "meaning": told})
    print(json.dumps(told, ensure_ascii=False))


def command_summary(args) -> None:
    """summary.json of a results folder: ARI, log-likelihood of the EM, AUC per seed, seconds per stage.

    seconds_of keeps the seconds of the last run on each machine.
    """
    folder = Path(args.results)
    score, runs = data.read_json(folder / "score.json", "ari"), read_runs(folder)
    trace = read_profiles(args.profiles).meta.get("trace", {})
    history, scores = {name: entry.get("F") or entry.get("log_likelihood") or [] for name, entry in trace.items()}, {}
    length = max(map(len, history.values()), default=0)
    total = [sum(one[min(i, len(one) - 1)] for one in history.values() if one) for i in range(length)]
    for model, features in dict.fromkeys((run["model"], run["features"]) for run in runs):
        folds = by_fold(runs, lambda run: run["auc"], model, features).values()
        seeds = sorted(set.intersection(*map(set, folds)))
        scores.setdefault(model, {})[features] = [
            round(float(np.mean([fold[seed] for fold in folds])), 6) for seed in seeds]
    run, seconds = data.read_json(folder / "meta.json", "run")["run"], data.read_json(args.seconds)
    place = "{}, {cores} cores".format(run.get("gpu", {}).get("name", run["machine"]["processor"]), **run["machine"])
    data.write_json(folder / "summary.json", {
        **{key: score[key] for key in ("lm", "ari", "ari_sparse", "perplexity", "users", "unsure")}, "F": total,
        "F_by_profile": history, "auc": scores, "seconds": seconds,
        "seconds_of": {**read_if_there(folder / "summary.json").get("seconds_of", {}), place: seconds}})


REVIEWS = {"Video_Games": 231_780, "Clothing": 278_677, "Movies_and_TV": 1_697_533}          # rows of the 2014 5-cores


def command_forecast(args) -> None:
    """What `reproduce.sh full` would take at least: the LLM by the demo's text table here, click models by our records.

    Five passes of the LLM: the table, the reversed one, and those without views, mask and pretraining. An epoch with
    the label chosen has two examples a row.
    """
    if not (ROOT / "bench/em.json").exists() or not (ROOT / "bench/ctr.json").exists():
        return                                                         # a copy of the kit without its figures
    folder, em = Path(args.profiles, "table"), data.read_json(ROOT / "bench/em.json")
    table = data.read_json(folder / "meta.json", "seconds")
    with open(folder / "texts.jsonl", encoding="utf-8") as lines:
        slower = 1000 * table["seconds"] / sum(1 for _ in lines) / em["ms_per_text"]         # than the bench's machine
    speed = data.read_json(ROOT / "bench/ctr.json")["rows_per_s"]
    epochs = sum(run["epochs_run"] * (1 + ("chosen" in folder.name))
                 for folder in ROOT.glob("amazon14-Office_Products-*") for run in read_runs(folder))
    print("What `full` would take at least for its three data sets, estimated from the demo's text table here, and "
          "from the epochs of our records of Office_Products at the speed of our CPU:")
    for name, rows in REVIEWS.items():
        minutes, hours = 5 * slower * em["estimates"][name]["minutes"], epochs * rows / speed / 3600
        print(f"  {name}: text tables of the LLM {minutes:.1f} minutes, all tables of click models {hours:.1f} hours")


# --------------------------------------------------------------------------------------------- tables and charts

def read_if_there(path: Path) -> dict:
    """A JSON file; an empty object where there is none."""
    return data.read_json(path) if path.exists() else {}


class Record:
    """A results folder: its name taken apart, its runs, and its JSON files (an empty object where there is none)."""

    def __init__(self, folder: Path):
        self.folder, self.name, self.runs = folder, folder.name, read_runs(folder)
        parts = re.fullmatch(r"(.*?)(?:-without-(.+)|-codes-(\d+))?", folder.name)
        self.base, self.without, self.codes = parts.groups()
        self.whole, self.meta = self.base == self.name, self.read("meta") if self.runs else {}
        self.models = list(dict.fromkeys(run["model"] for run in self.runs))
        self.model = "deepfm" if "deepfm" in self.models else next(iter(self.models), None)

    def read(self, name: str) -> dict:
        return read_if_there(self.folder / f"{name}.json")

    def gap(self, a: str, b: str, metric: str = "auc", model: str | None = None):
        return difference(self.runs, lambda run: run[metric], model or self.model, a, b)

    def mean(self, features: str, metric: str = "auc", model: str | None = None) -> float | None:
        return metric_mean(self.runs, lambda run: run[metric], model or self.model, features)

    def heading(self) -> str:
        return "\n**{}** ({dataset}, protocol {protocol}, label {label})\n\n".format(self.name, **self.meta)


SHOPS = ("demo", "demo-1", "demo-2", "null")                           # planted shops, in the order of the pages


def read_records(root: Path) -> list[Record]:
    """All results folders: planted shops first, then by name; a data set before its ablations and codebook sizes."""
    records = [Record(path) for path in root.iterdir() if path.is_dir() and path.name not in ("bench", "faults")]
    place = lambda base: SHOPS.index(base) if base in SHOPS else len(SHOPS)
    return sorted(records, key=lambda one: (place(one.base), one.base, not one.whole, int(one.codes or 0), one.name))


def chart(title: str, names: list, *series: list, kind: str = "bar") -> str:
    """A Mermaid chart, whose axis does not start at 0; kind: bar or line. Empty for fewer than two points or a gap."""
    values = [value for one in series for value in one]
    if len(names) < 2 or None in values:
        return ""
    low, high = min(values), max(values)
    room = 0.1 * (high - low) or 0.01
    lines = "\n".join(f"    {kind} [{', '.join(f'{value:.4f}' for value in one)}]" for one in series)
    axis = ", ".join(f'"{name}"' for name in names)
    return (f'\n```mermaid\nxychart-beta\n    title "{title}"\n    x-axis [{axis}]\n'
            f'    y-axis {low - room:.4f} --> {high + room:.4f}\n{lines}\n```\n')


def count_sides(gaps) -> str:
    """'above 0 in 2 and below 0 in 1 of 4 cases', by whole 95 % intervals; only differences that were run count."""
    gaps = [gap for gap in gaps if gap is not None]
    above, below = sum(mean - half > 0 for mean, half, _ in gaps), sum(mean + half < 0 for mean, half, _ in gaps)
    return f"above 0 in {above} and below 0 in {below} of {len(gaps)} cases"


def table(head: str, rows: list[list[str]]) -> str:
    """A Markdown table, its head parted by bars; nothing without rows."""
    return markdown(head.split("|"), rows) if rows else ""


# Each section: (records, root) → Markdown, empty where nothing was recorded. Two sentences, then tables and charts.

def section_data(records: list[Record], _) -> str:
    sets = {json.dumps(one.read("score")["data"]): one for one in reversed(records) if "data" in one.read("score")}
    found = [(one.base, json.loads(text)) for text, one in reversed(sets.items())]
    count = "users items rows positives".split()
    rows = [[f"{base} ({one['name']})", part, *(f"{each[key]:,}" for key in count), f"{sum(one['kinds'].values()):,}"]
            for base, one in found for part, each in one["parts"].items()]
    whole = [one["parts"]["all"] for _, one in found]
    users, share = sorted(one["users"] for one in whole), sorted(one["positives"] / one["rows"] for one in whole)
    return found and (f"The number of users is {users[0]:,} in the smallest data set and {users[-1]:,} in the largest. "
                      f"Positives (ratings above 3) are from {share[0]:.1%} to {share[-1]:.1%} of a set's rows.\n\n"
                      + table("data set|part|users|items|rows|positives|distinct texts", rows))


def section_overall(records: list[Record], _, label: str = "liked") -> str:
    text, mine = "", [one for one in records if one.whole and one.runs and one.meta["label"] == label]
    against = lambda other: count_sides([one.gap("userip", other, model=model) for one in mine for model in one.models])
    for one in mine:
        names = list(dict.fromkeys(run["features"] for run in one.runs if run["model"] == one.model))
        text += one.heading() + overall_table(one.runs, one.meta)
        text += chart(f"{one.name}: mean AUC of {one.model}", names, [one.mean(name) for name in names])
    return text and ("Each case is a data set with a model. The 95 % interval of the AUC of userip − none lies "
                     f"{against('none')}; that of userip − stats lies {against('stats')}, and that of userip − gap "
                     f"{against('gap')}.\n" + text)


def compare_variants(records: list[Record], column: str, name, of_whole) -> tuple[str, list, str]:
    """Table of each data set and its variants, those where name(record); differences between them; charts.

    of_whole(record): the name of the row of the data set itself, where name(record) is None.
    """
    rows, gaps, charts, label = [], [], "", lambda one: name(one) or of_whole(one)
    for whole in records:
        parts = [one for one in records if one.base == whole.name and name(one)] if whole.whole and whole.runs else []
        for one in [whole, *parts] if parts else []:
            pair = (("whole", whole), ("variant", one))[:1 + (one is not whole)]
            runs = [{**run, "features": side} for side, owner in pair for run in owner.runs
                    if run["features"] == "userip"]
            found = [difference(runs, lambda run: run[metric], whole.model, "variant", "whole")
                     for metric in ("auc", "logloss")]
            gaps += found[:1]
            means = [cell(one.mean("userip", metric, whole.model)) for metric in ("auc", "logloss")]
            scores = one.read("score").get("ari", {}).items()
            own = ", ".join(f"{profile} {score['own']:.3f}" for profile, score in scores)
            rows.append([whole.name, label(one), *means, *map(signed, found), own])
        size = lambda one: int(label(one)) if label(one).isdigit() else 0
        bars = sorted([whole, *parts] if len(parts) > 1 else [], key=size)
        charts += chart(f"{whole.name}: AUC of userip", list(map(label, bars)),
                        [one.mean("userip", "auc", whole.model) for one in bars])
    return table(f"data set|{column}|AUC|logloss|AUC − whole|logloss − whole|ARI own", rows), gaps, charts


def section_ablation(records: list[Record], _) -> str:
    text, gaps, charts = compare_variants(records, "method", lambda one: one.without and f"without {one.without}",
                                          lambda one: "the whole method")
    return text and ("All rows have the feature userip and the same model; differences are paired per fold and seed. "
                     "The AUC without a part, less that of the whole method, has an interval "
                     f"{count_sides(gaps)}.\n\n{text}{charts}")


def section_transfer(records: list[Record], _) -> str:
    pairs = [(one, model) for one in records if one.whole and len(one.models) > 1 for model in one.models]
    against = (("userip", "none"), ("userip", "random"), ("userip", "stats"), ("userip", "untuned"),
               ("stats+gap+userip", "stats+gap"))
    gaps = [[one.gap(*names, "auc", model) for names in against] for one, model in pairs]
    rows = [[one.name, model, *(cell(one.mean(name, model=model)) for name in ("none", "userip")), *map(signed, line)]
            for (one, model), line in zip(pairs, gaps)]
    sides = [count_sides([line[column] for line in gaps]) for column in (0, 1)]
    return rows and ("All models read the same IDs, which were made without them. The AUC of userip − none has an "
                     f"interval {sides[0]}, that of userip − random {sides[1]}.\n\n"
                     + table("|".join(["data set|model|AUC none|AUC userip", *map(" − ".join, against)]), rows))


def section_codes(records: list[Record], _) -> str:
    text, gaps, charts = compare_variants(records, "codes", lambda one: one.codes,
                                          lambda one: ",".join(dict.fromkeys(map(str, one.meta["codes"]))))
    return text and (
        "All rows have the same text table; only the number of codes differs. The AUC with other codes, less that of "
        f"the first row, has an interval {count_sides(gaps)}.\n\n{text}{charts}")


def section_known(records: list[Record], _) -> str:
    text, ends = "", ([], [])
    for one in records:
        if one.whole and any("known" in run for run in one.runs):
            means = {name: [metric_mean(one.runs, known_auc(n), one.model, name) for n in KNOWN]
                     for name in ("none", "userip")}
            there = [n for n, value in zip(KNOWN, means["userip"]) if value is not None]
            lines = [[value for n, value in zip(KNOWN, line) if n in there] for line in means.values()]
            text += one.heading() + known_table(one.runs, one.model)
            text += chart(f"{one.name}: AUC by rows known, none (first line) and userip", there, *lines, kind="line")
            some = [n for n in there if n != KNOWN[0]]                 # without a known row, each ID is 0
            for gaps, n in zip(ends, some[:1] + some[-1:]):
                gaps.append(difference(one.runs, known_auc(n), one.model, "userip", "none"))
    return text and ("All users are new to the model, and each row sees its user's earlier rows only. The AUC of "
                     f"userip − none has an interval {count_sides(ends[0])} with the fewest rows known (but 0), and "
                     f"{count_sides(ends[1])} with the most.\n" + text)


def section_meaning(records: list[Record], _) -> str:
    told = [(one.name, found) for one in records for found in one.read("meaning").get("meaning", [])]
    rows = [[name, found["profile"], f"{found['attribute']} ({found['classes']} classes)",
             *(f"{found[key]:.3f}" for key in ("bits", "bits_shuffled", "p")),
             *(f"{found[key]:.1%}" for key in ("accuracy", "accuracy_shuffled", "accuracy_majority"))]
            for name, found in told]
    sure = sum(found["p"] < 0.05 for _, found in told)
    ahead = sum(found["accuracy"] > found["accuracy_majority"] for _, found in told)
    text = rows and (
        f"In {sure} of {len(rows)} rows, IDs share more bits with the attribute than 95 % of shuffled IDs do. In "
        f"{ahead}, they tell a held-out user's class more often than the most frequent class is right.\n\n"
        + table("data set|profile|attribute|bits|bits, shuffled|p|held-out accuracy|shuffled|majority", rows))
    cards = [(one.name, one.folder / "cards.md") for one in records if one.whole and (one.folder / "cards.md").exists()]
    return (text or "") + "".join(f"\n**{name}: cards**\n\n{path.read_text(encoding='utf-8').strip()}\n"
                                  for name, path in cards)


# A row per figure: file of bench/, keys on the way to it (in each case of the list named as the file, if there is one),
# what it is, format, aim, and whether the README shows it.
FIGURES = (
    ("em", "of_limit", "text table: share of the speed of the LLM's bare passes", ".2f", "≥ 0.85", 1),
    ("em", "vs_naive", "text table: times as fast as one prompt per text, fp32", ".1f", "≥ 3", 1),
    ("em", "vs_naive_same_dtype", "text table: … in the table's own dtype", ".1f", "", 0),
    ("em", "tokens_per_s", "text table: tokens per second", ",.0f", "", 1),
    ("em", "ms_per_text", "text table: ms for a distinct text, the LLM at request time", ".1f", "", 0),
    ("scale", "users_per_s", "{users:,} users: users per second once the text table is there", ",.0f", "≥ 50,000", 1),
    ("scale", "em_s", "{users:,} users: seconds of the EM, the codes and all IDs, from the table", ".2f", "", 0),
    ("scale", "peak_mb", "{users:,} users: peak memory, MB, with {arrays_mb:,.0f} of arrays", ",.0f", "", 0),
    ("scale", "update_us", "{users:,} users: µs for a live update of one ID", ",.0f", "", 0),
    ("kmeans", "ratio/sklearn", "k-means, {n:,} × {d}, K = {k}: scikit-learn / ours", ".2f", "≥ 1", 0),
    ("kmeans", "ratio/faiss", "k-means, {n:,} × {d}, K = {k}: faiss / ours", ".2f", "≥ 1", 0),
    ("bank", "bytes_per_user", "bank, {users:,} users: bytes per user", ".1f", "≤ 16", 1),
    ("bank", "open_ms", "bank, {users:,} users: ms to open", ".1f", "< 50", 0),
    ("bank", "lookups_per_s", "bank, {users:,} users: lookups per second", ",.0f", "≥ 2,000,000", 1),
    ("bank", "list_lookups_per_s", "bank: lookups per second, Python lists of ids", ",.0f", "", 0),
    ("bank", "vs_sqlite", "bank, {users:,} users: SQLite / ours", ".1f", "≥ 20", 0),
    ("bank", "single_p99_us", "bank, {users:,} users: µs for one look-up (99 %)", ".1f", "< 50", 1),
    ("ctr", "rows_per_s", "DeepFM, {rows:,} rows: training rows per second", ",.0f", "", 1),
    ("data", "rows_per_s", "reviews, {rows:,} lines: lines per CPU second", ",.0f", "", 1),
    ("data", "of_json", "reviews, {rows:,} lines: share of json.loads' speed", ".2f", "≥ 0.6", 0))


def figures(bench: Path, brief: bool = False) -> list[list[str]]:
    """[what, figure, aim, machine] for each figure found in bench/FILE.json; brief: of the largest case only."""
    rows = []
    for file, keys, what, form, aim, shown in FIGURES:
        found = read_if_there(bench / f"{file}.json") if shown or not brief else {}
        about = found.get("machine", {})
        place = about.get("gpu") or f"{about.get('processor', '')}, {about.get('threads', 1)} thread(s)"
        cases = []
        for value in found[file] if isinstance(found.get(file), list) else [found] if found else []:
            figure = functools.reduce(lambda one, key: one.get(key) if isinstance(one, dict) else None,
                                      keys.split("/"), value)
            if isinstance(figure, (int, float)):
                label = re.sub(r"{(\w+):?(.*?)}", lambda match: format(value.get(match[1], ""), match[2]), what)
                cases.append([label, format(figure, form), aim, place])
        rows += cases[-1:] if brief else cases
    return rows


# What a part of bench/gpu.json says: the figure, its format, and where it stands; blank where a part lacks it.
GPU_FIGURES = (
    ("not run", "", lambda part: part.get("error") or part["skipped"]),
    ("largest error of summed text gradients, relative", ".1e",
     lambda part: max(part["summed_packed"], part["summed_single"])),
    ("users with the CPU's ID", ".1%", lambda part: part["equal_to_cpu"]),
    ("AUC of DeepFM less that of the CPU", "+.4f", lambda part: part["auc_gap"]),
    ("tokens per second", ",.0f", lambda part: part["tokens_per_s"]),
    ("share of the speed of the LLM's bare passes", ".2f", lambda part: part["of_limit"]),
    ("times as fast as one prompt per text, equal dtype", ".1f", lambda part: part["vs_naive_same_dtype"]),
    ("seconds, {n:,} × {d}, K = {k}", ".3f", lambda part: part["k"] and part["seconds"]["ours"]),
    ("seconds of the text table", ".1f", lambda part: float(part["seconds"])),
    ("seconds of the text table, {dtype}", ".1f", lambda part: part["table_s"]),
    ("users with the CPU's ID, {dtype}", ".1%", lambda part: min(part["equal_to_cpu"])),
    ("adjusted Rand index of these and the CPU's IDs", ".2f", lambda part: min(part["ari_to_cpu"])),
    ("users of the shop", ",", lambda part: part["users_per_s"] and part["users"]),
    ("users per second once the text table is there", ",.0f", lambda part: part["users_per_s"]))


def gpu_tables(bench: Path, goal: float = 0.85) -> str:
    """The figures of one GPU, each beside the CPU's: of an LLM of equal size, equal k-means, the largest shop."""
    found, em, means, shops = (read_if_there(bench / f"{name}.json") for name in ("gpu", "em", "kmeans", "scale"))
    size = lambda case: tuple(case.get(key) for key in ("parameters", "n", "d", "k"))
    cpu = {size(case): case for case in (em, *means.get("kmeans", []), *shops.get("scale", []))}

    def cell(case: dict, get, form: str) -> str:
        try:
            return format(get(case), form)
        except (KeyError, TypeError):
            return ""

    types = lambda part: [{"dtype": name, **part[name]} for name in ("float32", "bfloat16") if name in part]
    parts = [{**part, **case} for part in found.get("gpu", []) for case in part.get("kmeans") or types(part) or [{}]]
    rows = [[part["part"], what.format_map(part), mine, cell(cpu.get(size(part), {}), get, form)]
            for part in parts for what, form, get in GPU_FIGURES if (mine := cell(part, get, form))]
    speeds = [(part["part"], round(part["of_limit"], 2)) for part in parts if "of_limit" in part]
    low = " and ".join(name for name, share in speeds if share < goal)
    return rows and (
        "\n**One GPU: {gpu}, torch {torch}**\n\n".format_map({"gpu": "none", **found["machine"]})
        + "The text table's share of the speed of the LLM's bare passes (forward and backward) is "
        f"{' and '.join(f'{share:.2f} for {name}' for name, share in speeds)}. "
        f"The goal of {goal} is {f'missed by {low}' if low else 'reached'}.\n\n"
        + table("part|figure|GPU|CPU", rows))


def block_minutes(_, root: Path) -> str:
    """Minutes of the LLM for large data sets, a column per machine and LLM."""
    cpu, gpu = read_if_there(root / "bench/em.json"), read_if_there(root / "bench/gpu.json")
    columns = [("SmolLM2-135M, {processor}, {threads} threads".format(**cpu["machine"]), cpu)] if cpu else []
    columns += [(f"{one['part']}, {gpu['machine'].get('gpu', 'CPU')}", one)
                for one in gpu.get("gpu", []) if "estimates" in one]
    minutes = lambda one, name: one["estimates"][name]["minutes"]
    rows = [[name, f"{each['items']:,}", *(f"{minutes(one, name):,.1f}" if minutes(one, name) else "< 0.1"
                                           for _, one in columns)]
            for name, each in (columns[0][1]["estimates"] if columns else {}).items()]
    names = ["LLM minutes of one text table, *estimates*", "items", *(name for name, _ in columns)]
    return table("|".join(names), rows)


def section_cost(records: list[Record], root: Path) -> str:
    rows = figures(root / "bench")
    value = lambda text: float(text.strip("≥<≤ ").replace(",", ""))
    missed = sum(value(figure) < value(aim) if "≥" in aim else value(figure) > value(aim) for _, figure, aim, _ in rows
                 if aim)
    demo = [one for one in records if one.name == "demo"]              # the others were timed on a busy machine
    stages = [[one.name, stage, f"{taken:,.1f}"] for one in demo
              for stage, taken in one.read("summary").get("seconds", {}).items()]
    return (rows or stages) and (
        f"{missed or 'None'} of the {sum(bool(aim) for *_, aim, _ in rows)} figures that have an aim miss it; each row "
        "names its machine. The LLM reads each distinct text once, so its time does not grow with the number of users. "
        "Its bare passes go forward and backward over as many tokens.\n\n"
        + table("what|figure|aim|machine", rows) + "\n"
        + block_minutes(records, root) + "\n"
        + table("data set|stage|seconds", stages) + (gpu_tables(root / "bench") or ""))


def block_speed(_, root: Path) -> str:
    return table("what|figure|aim|machine", figures(root / "bench", brief=True)[:10])


CONTROLS = ("none", "random", "shuffled", "items", "stats", "gap", "untuned", "reversed", "bag")
PAIRS = (*(("userip", other) for other in CONTROLS),
         *(("stats+gap+userip", f"stats+gap{other}") for other in ("", "+items", "+untuned", "+bag")))


def block_findings(records: list[Record], _) -> str:
    mine = [one for one in records if one.whole and one.name not in SHOPS
            and one.gap("userip", "gap") and one.gap("userip", "random")]
    gaps = [[one.gap(*pair) for pair in PAIRS] for one in mine]
    count = [f"{a} − {b} is {count_sides(column)}" for (a, b), column in zip(PAIRS, zip(*gaps))
             if b in ("random", "stats", "gap", "untuned", "bag", "items", "stats+gap")]
    gains = [(one.name, row[CONTROLS.index("random")][0]) for one, row in zip(mine, gaps)]
    return mine and (
        "Differences in AUC between two feature sets of one model, with 95 % intervals: over folds of users for `new`, "
        f"over seeds for `warm`. {'; '.join(count)}.\n\n"
        + table("|".join(["data set, protocol, label", *(f"{a} − {b}" for a, b in PAIRS)]),
                [[one.name, *map(signed, row)] for one, row in zip(mine, gaps)])
        + chart("AUC of userip − random", [name for name, _ in gains], [gain for _, gain in gains]))


def block_demo(records: list[Record], _) -> str:
    text, shops = "", {one.name: one for one in records if one.name in SHOPS}
    found = {name: one.read("score").get("ari", {}).values() for name, one in shops.items()}
    planted = [score for name in SHOPS[:3] for score in found.get(name, [])]
    null = [abs(score[side]) for score in found.get("null", []) for side in ("own", "other")]
    if planted:
        text = ("For users with 6 or more training rows, hobby IDs match the planted hobbies, and background IDs the "
                "planted spending levels, with an adjusted Rand index (1: equal groups, 0: chance) of at least "
                f"{min(score['own'] for score in planted):.3f}, and each other's groups with at most "
                f"{max(score['other'] for score in planted):.3f}. ")
    if null:
        text += f"In a shop where shoppers differ in neither, its size is at most {max(null):.3f}. "
    if "demo" in shops and shops["demo"].runs:
        one = shops["demo"]
        kept = list(dict.fromkeys(run["features"] for run in one.runs))[:10]
        runs = [run for run in one.runs if run["model"] == one.model and run["features"] in kept]
        stats = [signed(gap) for name in SHOPS[:3] if name in shops and (gap := shops[name].gap("userip", "stats"))]
        text += (f"The AUC of userip − none is {signed(one.gap('userip', 'none'))}, that of userip − stats "
                 f"{', '.join(stats)} (one interval per data seed, the table's first).\n\n"
                 + overall_table(runs, one.meta))
    return text


def block_seconds(records: list[Record], root: Path) -> str:
    """Seconds of the demo's stages, a row per machine; blank where they depend on a network that was not there."""
    demo = next((one for one in records if one.name == "demo"), None)
    took = demo.read("summary").get("seconds_of", {}) if demo else {}
    stages, gpu = list(dict.fromkeys(itertools.chain(*took.values()))), read_if_there(root / "bench/gpu.json")
    for part in gpu.get("gpu", []):
        if "demo_seconds" in part:
            took = {**took, "{gpu}, {cores} cores".format(**gpu["machine"]): part["demo_seconds"]}
    return took and table("|".join(["seconds", *stages]), [
        [place, *(str(seconds.get(stage, "")) for stage in stages)] for place, seconds in took.items()])


SECTIONS = {"data": ("Data sets", section_data), "overall": ("Overall, label liked", section_overall),
            "ablation": ("Ablation", section_ablation), "transfer": ("Transfer to other backbones", section_transfer),
            "codes": ("Codebook size", section_codes), "known": ("Rows known of a user", section_known),
            "chosen": ("Overall, label chosen", functools.partial(section_overall, label="chosen")),
            "cost": ("Cost", section_cost), "meaning": ("What IDs mean", section_meaning)}
BLOCKS = {"demo": block_demo, "seconds": block_seconds, "findings": block_findings, "speed": block_speed,
          "minutes": block_minutes}


def command_pages(args) -> None:
    """Every page from the records."""
    root, readme = Path(args.results), Path(args.readme)
    records = read_records(root)
    made = {name: section(records, root) or "" for name, (_, section) in SECTIONS.items()}
    titles = [name for name in SECTIONS if made[name]]
    page = ("# Results\n\nAll tables, made by `python results/report.py` from the records beside this page. AUC and "
            "logloss are\nmeans over seeds, then over folds. Cells that were not run stay blank.\n")
    page += "".join(f"\n## {place}. {SECTIONS[name][0]}\n\n{made[name]}" for place, name in enumerate(titles, 1))
    data.write_text(root / "README.md", page)
    made |= {name: block(records, root) or "" for name, block in BLOCKS.items()}
    if readme.exists():
        old = readme.read_text(encoding="utf-8")
        fill = lambda match: match[1] + made.get(match[2], match[3]) + match[4]
        new = re.sub(r"(<!-- (\w+) -->\n)(.*?)(<!-- /\2 -->)", fill, old, flags=re.S)
        if new != old:
            data.write_text(readme, new)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.set_defaults(run=command_pages)
    parser.add_argument("--results", default=str(ROOT), help="folder of records [where this file is]")
    parser.add_argument("--readme", default=str(ROOT.parent / "README.md"), help="page with blocks to fill")
    commands, folders = parser.add_subparsers(metavar="COMMAND"), ("profiles", "data", "out")
    for name, run, flags in (("score", command_score, folders), ("meaning", command_meaning, folders),
                             ("summary", command_summary, ("results", "profiles", "seconds")),
                             ("forecast", command_forecast, ("profiles",))):
        sub = commands.add_parser(name, help=run.__doc__, allow_abbrev=False)
        sub.set_defaults(run=run)
        for flag in flags:
            sub.add_argument(f"--{flag}", required=True, help="JSON {stage: s}" if flag == "seconds" else "folder")
    commands.choices["meaning"].add_argument("--shuffles", type=data.positive_int, default=200, help="times [200]")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    data.run_command("report.py", main)
