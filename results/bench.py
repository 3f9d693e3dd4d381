"""Speed of every part of the kit, beside its rivals. The last printed line is JSON; --out also writes it to a file.

    python results/bench.py em --lm DIR     the text table beside the LLM's own limit and the naive way
    python results/bench.py kmeans          k-means beside scikit-learn and faiss, where they are installed
    python results/bench.py bank            the feature bank beside SQLite
    python results/bench.py ctr             DeepFM training
    python results/bench.py data            reading reviews, beside json.loads of the same lines
    python results/bench.py scale           planted shops of many users, from the shop to the ID as of every row
    python results/bench.py gpu --out DIR   what one GPU is asked for (--device cpu --small tries the same code)

Rivals run in turn with our code in one process, from equal starts and with equal settings. Everything is synthetic.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import gzip
import io
import json
import re
import sqlite3
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import codebook
import ctr
import data
import uip
from codebook import Bank, assign, fit_codebook, kmeans, profile_evidence, responsibilities
from report import ari


def seconds(call, device: str | torch.device = "cpu", clock=time.perf_counter) -> float:
    """Seconds that call() takes, the work it gave to a GPU included."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    began = clock()
    call()
    wait()
    return clock() - began


def machine(device: str | torch.device = "cpu") -> dict:
    """What figures were measured on; a GPU only where it was used."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if torch.device(device).type == "cuda" else {}
    return {"device": str(device), **gpu, **data.machine(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "transformers": transformers.__version__}


def peak_mb(device: str | torch.device = "cpu") -> float | None:
    """The most memory that this process has had so far, or its GPU where one is used, in MiB."""
    on_gpu = torch.device(device).type == "cuda"
    return round(torch.cuda.max_memory_allocated(device) / 2 ** 20, 1) if on_gpu else data.peak_mb()


def planted_shop(users: int):
    """A planted shop, written and read again."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        data.write_data(folder, "planted", data.planted(users=users), data.LAYOUTS["planted"])
        return data.read_data(folder)


def planted_texts(n: int) -> tuple[list[tuple[str, str]], dict]:
    """n distinct texts of the planted shop, evenly over its kinds, and its layout; many are told apart by a number."""
    source = planted_shop(2000)
    repeats = -(-n // len(source.texts))
    texts = [(kind, f"{text} {turn}" if turn else text) for turn in range(repeats) for kind, text in source.texts]
    return [texts[i * max(n, len(source.texts)) // n] for i in range(n)], source.layout


def text_table(lm, tokenizer, texts: list, spec: dict, budget: int | None = None) -> dict:
    """The LLM's text table, as arrays. budget: padded tokens in one pass, None: as uip.py chooses."""
    table = uip.score_texts(lm, uip.Layout.build(spec, tokenizer), texts, budget=budget or uip.auto_budget(lm))
    return {name: array.numpy() for name, array in table._asdict().items()}


def ids_of_users(source, table: dict, codes, device: str, stage=lambda name, call: call()):
    """(evidence, codebook, z, n, responsibilities) of each profile, by EM on the training rows; stage: a stop-watch."""
    train = source.part == 0
    to = lambda array: torch.from_numpy(array).long().to(device)
    rows, user, item = to(np.flatnonzero(train)), to(source.user), to(source.x[:, 1])
    lists = stage("evidence", lambda: data.row_texts(source, train))
    for p, k in enumerate(codes):
        evidence = stage("evidence", lambda: codebook.Evidence(*(
            tensor.to(device) for tensor in profile_evidence(source, table, lists, p, ""))))
        book, z, n = stage("fit_codebook", lambda: fit_codebook(
            evidence._replace(told=evidence.told[rows]), user[rows], item[rows], len(source.users), k))
        yield evidence, book, z, n, stage("IDs of users", lambda: responsibilities(book, z, n))


# ------------------------------------------------------------------------------------------------------- em

# Office_Products 2014 as data.py makes it, in tokens of SmolLM2, for estimates of other categories.
OFFICE = {"items": 2420, "texts": 3123, "tokens": 59_338}
SHOPS = {"Video_Games": 10_672, "Clothing": 23_033, "Movies_and_TV": 50_052}     # items of the 2014 5-cores


def plain_rows(lm, rows: int, width: int, predictions: int) -> None:
    """The limit: `rows` plain causal rows of `width` tokens, the head on some predictions, backward to the inputs."""
    x = torch.randn(rows, width, lm.config.hidden_size, device=lm.device, dtype=lm.dtype).requires_grad_()
    states = lm.base_model(inputs_embeds=x, use_cache=False).last_hidden_state.flatten(0, 1)
    logits = lm.get_output_embeddings()(states[:predictions]).float()
    logits.log_softmax(-1)[:, 0].sum().backward()


def naive_nll(lm, layout: uip.Layout, users: list[list[tuple[str, str]]], theta: Tensor) -> Tensor:
    """The obvious way, for reference: one text a row behind its own prompt, padded, logits everywhere. → NLL [B]

    For texts that see one profile: of several names in one row, each would see those before it.
    """
    ids, positions, slots, labels = [], [], [], []
    for user, texts in enumerate(users):
        for kind, text in texts:
            lead, view, cut = layout.kinds[kind]
            row = [layout.bos]
            for p, name in enumerate(layout.names):
                if view[p]:
                    row += [*name, *[layout.bos] * layout.m]
                    slots += [(len(ids), len(row) - layout.m + i, user, p, i) for i in range(layout.m)]
            prompt = len(row)
            row += lead
            for token in layout.encode([text])[0][:cut]:
                labels.append((len(ids), len(row) - 1, token, user))
                row.append(token)
            ids.append(torch.tensor(row))
            positions.append(torch.cat([torch.arange(prompt), layout.start + torch.arange(len(row) - prompt)]))
    at, label = torch.tensor(slots).T, torch.tensor(labels).T
    x = pad_sequence(ids, batch_first=True, padding_value=layout.bos).to(lm.device)
    x = lm.get_input_embeddings()(x).index_put((at[0], at[1]), theta[at[2], at[3], at[4]].to(lm.dtype))
    positions = pad_sequence(positions, batch_first=True).to(lm.device)                     # (texts, width)
    logp = lm(inputs_embeds=x, position_ids=positions).logits.float().log_softmax(-1)       # (texts, width, V)
    return theta.new_zeros(len(users)).index_add(0, label[3].to(theta.device), -logp[label[0], label[1], label[2]])



def text_speed(lm, layout, texts: list, *, budget: int | None = None, repeat: int = 3, naive: int = 32,
               full=None) -> dict:
    """score_texts beside the limit and the naive way, in turn.

    The limit is the LLM's work alone: forward and backward to the inputs over plain causal rows with as many tokens
    (texts, leads, soft tokens), in equal batches. budget: padded tokens in one pass, None: as uip.py chooses. full: the
    LLM in fp32; None: the naive way runs in the LLM's own type only.
    """
    budget, rows = budget or uip.auto_budget(lm), uip.pack([[text] for text in texts], layout)
    lengths = [uip.length(row) + layout.m * sum(row[0].view) for row in rows]
    labels, some = [len(text.ids) - text.lead for text, in rows], range(0, len(texts), max(1, len(texts) // naive))
    theta = uip.shared_prompt(lm, layout.m).repeat(len(layout.names), 1, 1)

    def ours():
        uip.score_texts(lm, layout, texts, theta, budget=budget)

    def limit():
        for group in uip.batches(lengths, budget):
            width = round(sum(lengths[i] for i in group) / len(group))
            plain_rows(lm, len(group), width, sum(labels[i] for i in group))

    def naive_way(model):
        for start in range(0, len(some), 8):
            part = [[texts[i]] for i in some[start:start + 8]]
            x = theta.to(model.device).expand(len(part), -1, -1, -1).contiguous().requires_grad_()
            naive_nll(model, layout, part, x).sum().backward()

    gc.set_threshold(100_000)                                          # as uip.py fit does
    ways = {"ours": ours, "limit": limit, "naive_same_dtype": lambda: naive_way(lm)}
    if full is not None:
        ways["naive"] = lambda: naive_way(full)
    turns = [{way: seconds(run, lm.device) for way, run in ways.items()} for _ in range(repeat + 1)]
    taken = {way: [turn[way] for turn in turns[1:]] for way in ways}                         # the first is a warm-up
    ratio = lambda way, scale=1.0: round(float(np.median(np.array(taken[way]) * scale / np.array(taken["ours"]))), 3)
    middle, share = float(np.median(taken["ours"])), len(texts) / len(some)
    return {"texts": len(texts), "tokens": sum(lengths), "value_tokens": sum(labels), "naive_texts": len(some),
            "seconds": taken, "tokens_per_s": round(sum(lengths) / middle, 1),
            "ms_per_text": round(1e3 * middle / len(texts), 3), "of_limit": ratio("limit"),
            **({"vs_naive": ratio("naive", share)} if full is not None else {}),
            "vs_naive_same_dtype": ratio("naive_same_dtype", share),
            "budget": budget, "dtype": str(lm.dtype)[6:], "parameters": sum(w.numel() for w in lm.parameters()),
            "peak_mb": peak_mb(lm.device), "machine": machine(lm.device)}


def estimates(tokens_per_s: float) -> dict:
    """LLM minutes of other categories: items × texts and tokens per item of Office_Products / speed. An estimate."""
    each = OFFICE["tokens"] / OFFICE["items"]
    return {name: {"items": items, "minutes": round(items * each / tokens_per_s / 60, 1), "estimate": True}
            for name, items in SHOPS.items()}


def bench_em(args) -> dict:
    """The text table beside the LLM's limit and the naive way."""
    lm, tokenizer = uip.load_lm(args.lm, args.dtype, args.device)
    full = uip.load_lm(args.lm, "float32", args.device)[0] if lm.dtype != torch.float32 else lm
    texts, spec = planted_texts(args.texts)
    found = text_speed(lm, uip.Layout.build(spec, tokenizer), texts, budget=args.budget, repeat=args.repeat,
                       naive=args.naive, full=full)
    return {"lm": uip.lm_identity(args.lm), **found, "estimates": estimates(found["tokens_per_s"])}


# ------------------------------------------------------------------------------------------ k-means and bank

def kmeans_rivals(x: Tensor, c: Tensor, iters: int) -> dict:
    """The same iterations from the same start by others: {name: call}; scikit-learn and faiss where installed."""
    calls = {}
    with contextlib.suppress(ImportError):
        from sklearn.cluster import KMeans
        model = KMeans(len(c), init=c.numpy(), n_init=1, max_iter=iters, tol=0, algorithm="lloyd")
        calls["sklearn"] = lambda: torch.from_numpy(model.fit(x.numpy()).cluster_centers_)
    with contextlib.suppress(ImportError):
        import faiss
        faiss.omp_set_num_threads(torch.get_num_threads())
        other = faiss.Kmeans(x.shape[1], len(c), niter=iters, min_points_per_centroid=1, max_points_per_centroid=len(x))
        calls["faiss"] = lambda: other.train(x.numpy(), init_centroids=c.numpy()) and torch.tensor(other.centroids)
    return calls


def kmeans_speed(n: int, d: int, k: int, iters: int = 10, rounds: int = 5, device: str = "cpu") -> dict:
    """Best seconds of `rounds` alternating runs, and the ratio other / ours (above 1: ours is faster).

    Equal starts, equal iterations; inertia, of the centroids each returns, shows that the answers are equal too.
    """
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(k)).to(device)
    rivals = kmeans_rivals(x, x[:k].clone(), iters) if device == "cpu" else {}
    calls = {"ours": lambda: kmeans(x, k, init=x[:k], iters=iters).centroids, **rivals}
    inertia = {name: float(assign(x, call())[1].double().sum()) for name, call in calls.items()}      # a warm-up, too
    runs = [[seconds(call, device) for call in calls.values()] for _ in range(rounds)]
    best = dict(zip(calls, map(min, zip(*runs))))
    ratio = {name: value / best["ours"] for name, value in best.items() if name != "ours"}
    return {"n": n, "d": d, "k": k, "iters": iters, "seconds": best, "ratio": ratio, "inertia": inertia}


def bench_kmeans(args) -> dict:
    """k-means at d = 576 and 4,096 (SmolLM2's and Llama-2-7B's width), K = 4 and 32."""
    found = [kmeans_speed(n, d, k) for n, d in ((args.rows, 576), (args.rows // 5, 4096)) for k in (4, 32)]
    return {"kmeans": found, "versions": {name: getattr(sys.modules.get(name), "__version__", "not installed")
                                          for name in ("sklearn", "faiss")}, "machine": machine()}


def bench_bank(args, batch: int = 10_000) -> dict:
    """Build, open and lookups of many users: in batches beside SQLite's primary key, in Python lists, and alone.

    Readers share one page cache.
    """
    n, rng = args.users, np.random.default_rng(0)
    users, codes = np.char.add("u", rng.permutation(n).astype(str)), rng.integers(1, 5, (n, 2))
    median = lambda look, groups: float(np.median([seconds(lambda: look(some)) for some in groups]))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build = seconds(lambda: Bank.build(folder / "bank", users, codes))
        opened = min(seconds(lambda: Bank.open(folder / "bank")) for _ in range(3))
        bank, batches = Bank.open(folder / "bank"), [users[rng.integers(0, n, batch)] for _ in range(50)]
        each = median(bank.lookup, batches) / batch
        for _ in range(2):                                             # the first turn brings the pages into memory
            single = [seconds(lambda: bank.lookup(user)) for some in batches[:2] for user in some.tolist()]
        few = min(n, 1_000_000)
        long = np.array([f"A{number:013d}" for number in rng.permutation(few)])                   # 14 characters
        other = Bank.build(folder / "long", long, codes[:few])
        lists = median(other.lookup, [long[rng.integers(0, few, batch)].tolist() for _ in range(20)]) / batch
        with contextlib.closing(sqlite3.connect(folder / "bank.sqlite")) as db:
            db.execute("CREATE TABLE bank (user TEXT PRIMARY KEY, a INT, b INT) WITHOUT ROWID")
            rows = ((str(users[i]), int(codes[i, 0]), int(codes[i, 1])) for i in users.argsort())
            db.executemany("INSERT INTO bank VALUES (?, ?, ?)", rows)
            sql = "SELECT a, b FROM bank WHERE user = ?"
            lite = median(lambda some: [db.execute(sql, (user,)).fetchone() for user in some],
                          map(np.ndarray.tolist, batches)) / batch
        size = sum((folder / "bank" / name).stat().st_size for name in Bank.FILES[:3]) / n
    return {"users": n, "build_s": build, "bytes_per_user": size, "open_ms": 1e3 * opened, "lookups_per_s": 1 / each,
            "vs_sqlite": lite / each, "list_lookups_per_s": 1 / lists,
            "single_p99_us": 1e6 * float(np.quantile(single, 0.99)), "sqlite": sqlite3.sqlite_version,
            "machine": machine()}


# ------------------------------------------------------------------------------------------- ctr, data, scale

SIZES = (20_000, 10_000, 16, 8)


def random_rows(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random rows with planted answers, an effect per value and a user × item taste: x int32 [R, 4], y [R]."""
    rng = np.random.default_rng(seed)
    x = np.stack([rng.integers(0, size, rows) for size in SIZES], 1)
    logit = sum(rng.normal(0, 0.7, size)[column] for size, column in zip(SIZES, x.T))
    user, item = (rng.normal(0, 1, (size, 2))[column] for size, column in zip(SIZES, x.T[:2]))
    y = rng.random(rows) < 1 / (1 + np.exp(-logit - (user * item).sum(1)))
    return torch.from_numpy(x.astype(np.int32)), torch.from_numpy(y.astype(np.float32))


def deepfm_epoch(x: Tensor, y: Tensor, rows: int, seed: int = 0) -> tuple[float, float]:
    """One epoch of DeepFM over the first `rows`, batches of 1,024: (seconds, AUC of the other rows)."""
    torch.manual_seed(seed)
    model = ctr.DeepFM(SIZES, dropout=0.0).to(x.device)
    adam, generator = ctr.optimiser(model, 1e-3, 1e-6), torch.Generator().manual_seed(seed)
    taken = seconds(lambda: ctr.train_epoch(model, adam, x[:rows], y[:rows], 1024, generator), x.device)
    return taken, ctr.auc(y[rows:].cpu(), ctr.predict(model, x[rows:]))


def bench_ctr(args) -> dict:
    """DeepFM: one epoch on random rows; the AUC is of a tenth as many further rows. Best time of three seeds."""
    x, y = random_rows(args.rows + max(1000, args.rows // 10))
    taken, score = zip(*(deepfm_epoch(x, y, args.rows, seed) for seed in range(3)))
    return {"rows": args.rows, "seconds": round(min(taken), 3), "rows_per_s": round(args.rows / min(taken)),
            "auc": round(float(np.mean(score)), 4), "peak_mb": data.peak_mb(), "machine": machine()}


def write_reviews(path: Path, rows: int) -> None:
    """Review lines in the form of 2018, of 40 words on average, by users of 10 rows each and as many items as users."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(2, 11, 5000)])
    texts = [" ".join(words[rng.integers(0, 5000, size)].tolist()) for size in rng.geometric(1 / 40, 20_000)]
    with gzip.open(path, "wt", compresslevel=1) as file:
        for row in range(rows):
            text = texts[row * 104_729 % len(texts)]
            file.write(json.dumps({
                "overall": float(row % 5 + 1), "verified": True, "reviewTime": "06 17, 2018", "reviewerName": text[:12],
                "reviewerID": f"A{row * 7919 % (rows // 10 + 1):013d}", "asin": f"B{row * row % (rows // 10 + 3):09d}",
                "reviewText": text, "summary": text[:20], "unixReviewTime": 1_529_193_600 + row}) + "\n")


def bench_data(args) -> dict:
    """Reading reviews to unique rows beside json.loads of the same lines: medians of three, in seconds of the CPU."""
    def plain(path):
        with gzip.open(path) as file:
            for line in file:
                json.loads(line)

    ours = lambda path: data.read_reviews(path)[0].dataset({}, {}, {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "reviews.json.gz")
        write_reviews(path, args.rows)
        runs = [[seconds(lambda: call(path), clock=time.process_time) for call in (ours, plain)] for _ in range(3)]
    each, other = np.median(runs, axis=0).tolist()
    return {"rows": args.rows, "rows_per_s": round(args.rows / each), "of_json": round(other / each, 3),
            "peak_mb": data.peak_mb(), "machine": machine()}


def random_table(source, width: int = 576) -> dict:
    """A text table of random gradients, as wide as SmolLM2's: it costs what follows as much as a true one."""
    rng, count = np.random.default_rng(0), len(source.texts)
    tokens = np.array([len(text.split()) + 1 for _, text in source.texts], np.float32)
    gradient = rng.standard_normal((count, len(source.layout["profiles"]), width), dtype=np.float32)
    return {"tokens": tokens, "gradient": gradient * np.sqrt(tokens)[:, None, None]}


def scale_speed(users: int, score=None, device: str = "cpu", epoch: bool = False) -> dict:
    """A planted shop of so many users through data, evidence, codebooks, IDs, IDs as of every row, and a bank.

    score(texts, layout spec) → table; None: random gradients. epoch: also one epoch of DeepFM on the result.
    users_per_s counts everything between the table and the bank. update_us: one user's ID after one more row.
    """
    took, codes, probability, columns = {}, [], [], []

    def stage(name: str, call):
        found = []
        took[name] = took.get(name, 0.0) + seconds(lambda: found.append(call()), device)
        return found[0]

    with tempfile.TemporaryDirectory() as folder:
        shop = stage("draw the shop", lambda: data.planted(users=users))
        with contextlib.redirect_stdout(io.StringIO()):
            stage("write data", lambda: data.write_data(Path(folder, "data"), "planted", shop, data.LAYOUTS["planted"]))
        del shop
        source = stage("read data", lambda: data.read_data(Path(folder, "data")))
        table = stage("text table", lambda: score(source.texts, source.layout) if score else random_table(source))
        before, first, train = data.peak_mb(), len(took), source.part == 0
        user, seen = (torch.from_numpy(column).long().to(device)
                      for column in (source.user, ctr.rows_seen(source, source.part, "warm")))
        for evidence, book, z, n, r in ids_of_users(source, table, (4, 3), device, stage):
            codes.append(torch.where(n > 0, r.argmax(1) + 1, 0).cpu().numpy())
            probability.append(r.max(1).values.cpu().numpy())
            columns.append(stage("IDs as of every row",
                                 lambda: codebook.ids_before(book, evidence, user, seen)[0] + 1).cpu().numpy())
            one = [seconds(lambda: responsibilities(book, z[u:u + 1] + z[:1], n[u:u + 1] + 1).argmax(1))
                   for u in range(100)]
        speed = users / sum(list(took.values())[first:])
        stage("bank", lambda: Bank.build(Path(folder, "bank"), source.users, np.stack(codes, 1),
                                         probability=np.stack(probability, 1)))
    if epoch:
        fold = stage("CTR rows", lambda: ctr.make_fold(source, "warm", "liked", 0))
        x = torch.from_numpy(np.concatenate([fold.x, np.stack(columns, 1).astype(np.int32)], 1)[train]).to(device)
        y, model = torch.from_numpy(fold.y[train]).to(device), ctr.DeepFM([*fold.sizes, 5, 4]).to(device)
        adam, generator = ctr.optimiser(model, 1e-2, 1e-5), torch.Generator().manual_seed(0)
        stage("one epoch of DeepFM", lambda: ctr.train_epoch(model, adam, x, y, 8192, generator))
    arrays = sum(array.nbytes for array in (*table.values(), *source) if isinstance(array, np.ndarray)) / 2 ** 20
    return {"users": users, "rows": len(source.user), "texts": len(source.texts), "users_per_s": round(speed),
            "em_s": round(took["fit_codebook"] + took["IDs of users"], 3),
            "seconds": {name: round(value, 3) for name, value in took.items()},
            "update_us": round(1e6 * float(np.median(one)), 1),
            "arrays_mb": round(arrays, 1), "peak_mb_before": before, "peak_mb": data.peak_mb(),
            **({"gpu_peak_mb": peak_mb(device)} if device != "cpu" else {})}


def real_speed(folder: str, profiles: str) -> dict:
    """Seconds of everything between the text table and the IDs of a data set that uip.py fit was run on."""
    source, known = data.read_data(folder), codebook.read_profiles(profiles)
    table = codebook.read_table(Path(profiles, known.meta["table"]))[0]
    codes = known.meta["settings"]["codes"]
    taken = [seconds(lambda: list(ids_of_users(source, table, codes, "cpu"))) for _ in range(3)]
    return {"shop": source.name, "users": len(source.users), "rows": len(source.user), "texts": len(source.texts),
            "em_s": round(min(taken), 3)}


def bench_scale(args) -> dict:
    """Planted shops from small to large; with --lm the table is the LLM's, whose time does not depend on the users."""
    score, found = functools.partial(text_table, *uip.load_lm(args.lm)) if args.lm else None, []
    if args.lm:
        score(*planted_texts(16))                                      # a warm-up
    for users in args.users:
        found.append(scale_speed(users, score))
        print(json.dumps(found[-1]), flush=True)
    largest, smallest = found[-1]["seconds"]["text table"], found[0]["seconds"]["text table"]
    real = [real_speed(args.office, args.profiles)] if args.office else []
    return {"scale": found + real, "users_per_s": found[-1]["users_per_s"], "peak_mb": data.peak_mb(),
            **({"llm_seconds_ratio": round(largest / smallest, 3)} if args.lm else {}),
            "table": args.lm or "random gradients of width 576", "machine": machine()}


# ------------------------------------------------------------------------------------------------------ gpu

class Chunks:
    """A tokenizer for LLMs of random weights: pieces of up to four characters, hashed into the vocabulary."""
    bos_token_id = eos_token_id = 1

    def __init__(self, vocabulary: int):
        self.token = functools.cache(lambda piece: 3 + zlib.crc32(piece.encode()) % (vocabulary - 3))

    def __call__(self, texts: list[str], **_) -> dict:
        return {"input_ids": [list(map(self.token, re.findall(r"\S{1,4}", text))) for text in texts]}


SHAPES = {"SmolLM2-135M": (576, 1536, 30, 9, 3, 49_152), "Llama-2-7B": (4096, 11_008, 32, 32, 32, 32_000),
          "tiny": (64, 128, 2, 4, 2, 512)}       # hidden, MLP, layers, heads, key-value heads, vocabulary


def random_lm(shape: str, device: str, dtype: torch.dtype):
    """(lm, tokenizer): a Llama of random weights, built on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    hidden, mlp, layers, heads, kv, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, initializer_range=0.4 if shape == "tiny" else 0.02)
    torch.manual_seed(1)
    attention = "eager" if device == "cpu" else "sdpa"
    with torch.device(device if shape == "Llama-2-7B" else "cpu"):     # equal weights on all devices, but for the large
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return lm.to(device).eval().requires_grad_(False), Chunks(vocabulary)


def parity(lm, layout, texts: list) -> dict:
    """Largest errors, in parts of the largest value: text gradients summed, packed, one at a time; cache; mask."""
    theta = uip.shared_prompt(lm, layout.m).repeat(len(layout.names), 1, 1)
    summed = uip.score_texts(lm, layout, texts).gradient.sum(0)                              # (P, m·d)

    def gradient(value, x):
        return torch.autograd.grad(value.sum(), x)[0].sum(0).flatten(1).cpu()

    def packed(cache, rows=[texts], layout=layout):
        x = theta.to(lm.device).repeat(len(rows), 1, 1, 1).requires_grad_()
        batch = uip.collate(uip.pack(rows, layout), layout, cache, device=lm.device, dtype=lm.dtype)
        return gradient(uip.nll(lm, batch, x), x)

    cached, single = packed(uip.prefix(lm, layout)), sum(packed(None, [[text]]) for text in texts)
    renamed = uip.replace(layout, names=(layout.names[0][::-1], *layout.names[1:]))          # the others may not see it
    error = lambda a, b: float((a - b).abs().max() / b.abs().max())
    plain, other = packed(None), packed(None, [texts], renamed)
    return {"summed_packed": error(summed, cached), "summed_single": error(summed, single),
            "cache_on_off": error(plain, cached), "own_name_mask": error(other[1:], plain[1:])}


def same_ids(a: list, b: list) -> list[float]:
    """The share of users with equal IDs, for each profile."""
    return [float((one == other).double().mean()) for one, other in zip(a, b)]


class GPU:
    """The parts of `bench.py gpu`; each returns its figures. Without --lm, LLMs have random weights."""

    def __init__(self, args):
        self.args, self.small = args, args.small
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
        self.shape = "tiny" if args.small else "SmolLM2-135M"
        self.texts, self.spec = planted_texts(96 if args.small else 332)

    def model(self, dtype: torch.dtype, device: str | None = None):
        if self.args.lm:
            return uip.load_lm(self.args.lm, str(dtype)[6:], device or self.device)
        return random_lm(self.shape, device or self.device, dtype)

    def ids(self, source, codes, device: str, dtype: torch.dtype = torch.float32) -> tuple[list, float, float]:
        """Each profile's IDs of a data set, made on a device; seconds of the text table and of the EM."""
        began = time.perf_counter()
        table = text_table(*self.model(dtype, device), source.texts, source.layout, self.args.budget)
        middle = time.perf_counter()
        ids = [torch.where(n > 0, r.argmax(1), -1).cpu() for *_, n, r in ids_of_users(source, table, codes, device)]
        return ids, round(middle - began, 2), round(time.perf_counter() - middle, 2)

    def parity(self, dtype: torch.dtype) -> dict:
        lm, tokenizer = self.model(dtype)
        return parity(lm, uip.Layout.build(self.spec, tokenizer), self.texts[:: len(self.texts) // 24])

    def equal_answers(self) -> dict:
        """A planted shop of 240 users: IDs here, here again, and on the CPU; and one epoch of DeepFM."""
        source = planted_shop(240)
        here, again, cpu = (self.ids(source, (4, 3), device)[0] for device in (self.device, self.device, "cpu"))
        x, y = random_rows(20_000)
        score = [deepfm_epoch(x.to(device), y.to(device), 18_000)[1] for device in (self.device, "cpu")]
        return {"equal_to_cpu": min(same_ids(here, cpu)), "fit_twice_equal": min(same_ids(here, again)),
                "ari_to_cpu": [ari(*map(Tensor.numpy, pair)) for pair in zip(here, cpu)], "auc": score,
                "auc_gap": score[0] - score[1]}

    def text_speed(self, lm, tokenizer, count: int) -> dict:
        """The text table beside its limit and the naive way, and one step of per-user tuning for 24 users."""
        layout, count, budget = uip.Layout.build(self.spec, tokenizer), 96 if self.small else count, self.args.budget
        rows = uip.pack([self.texts[i::24] for i in range(24)], layout)
        theta = uip.shared_prompt(lm, 1).repeat(len(rows), len(layout.names), 1, 1)
        tune = lambda some: uip.tune_users(lm, layout, rows[:some], theta[:some], steps=1,
                                           budget=budget or uip.auto_budget(lm))
        tune(2)
        tuned = seconds(lambda: tune(24), lm.device)
        each = text_speed(lm, layout, planted_texts(count)[0], budget=budget, repeat=1 if self.small else 3,
                          naive=min(count, 256))
        return {**each, "reference_tokens_per_s": sum(map(uip.length, rows)) / tuned,
                "estimates": estimates(each["tokens_per_s"])}

    def kmeans(self) -> dict:
        sizes = ((1000, 64),) if self.small else ((100_000, 576), (100_000, 4096))
        return {"kmeans": [kmeans_speed(n, d, k, rounds=2, device=self.device) for n, d in sizes for k in (4, 32)]}

    def many_texts(self) -> dict:
        texts, spec = planted_texts(500 if self.small else 50_000)
        model = self.model(torch.float32 if self.small else torch.bfloat16)
        return {"texts": len(texts),
                "seconds": seconds(lambda: text_table(*model, texts, spec, self.args.budget), self.device)}

    def office(self) -> dict:
        """A data set's text table and IDs here, and the share of users with the IDs that --profiles holds."""
        source, known = data.read_data(self.args.office), codebook.read_profiles(self.args.profiles)
        found = {"texts": len(source.texts), "users": len(source.users)}
        for dtype in (torch.float32, torch.bfloat16):
            ids, table_s, em_s = self.ids(source, known.meta["settings"]["codes"], self.device, dtype)
            cpu = torch.from_numpy(known.ids).T
            found[str(dtype)[6:]] = {"table_s": table_s, "em_s": em_s, "equal_to_cpu": same_ids(ids, cpu),
                                     "ari_to_cpu": [ari(*map(Tensor.numpy, pair)) for pair in zip(ids, cpu)]}
        return found

    def demo(self) -> dict:
        """The demo on this machine, by the summary that reproduce.sh wrote; env and lm depend on a network."""
        summary = data.read_json(Path(self.args.demo, "summary.json"), "seconds", "ari", "auc")
        return {"demo_seconds": {stage: summary["seconds"][stage] for stage in ("data", "profiles", "bank", "ctr")},
                "ari": summary["ari"], "auc": summary["auc"]}


def bench_gpu(args) -> dict:
    """What one GPU is asked for, each part guarded: a failed part is recorded, and the rest goes on."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    gpu, half, began = GPU(args), torch.bfloat16, time.time()
    large = "tiny" if args.small else "Llama-2-7B"
    parts = {"parity, float32": lambda: gpu.parity(torch.float32), "parity, bfloat16": lambda: gpu.parity(half),
             "equal answers": gpu.equal_answers,
             f"{gpu.shape}, bfloat16": lambda: gpu.text_speed(*gpu.model(half), 16_384), "k-means": gpu.kmeans,
             "Llama-2-7B, random weights": lambda: gpu.text_speed(*random_lm(large, gpu.device, half), 2048),
             "50,000 texts": gpu.many_texts, **({"Office_Products": gpu.office} if args.office else {}),
             "planted shop": lambda: scale_speed(500 if args.small else 1_000_000, device=gpu.device, epoch=True),
             **({"demo": gpu.demo} if args.demo else {})}
    found = {"machine": machine(gpu.device), "gpu": []}
    for name, part in parts.items():
        start = time.time()
        try:
            result = part() if start - began < args.minutes * 60 else {"skipped": f"after {args.minutes} minutes"}
        except Exception as error:                                     # whatever fails, the others go on
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        found["gpu"].append({"part": name, **result, "part_seconds": round(time.time() - start, 1)})
        Path(args.out).mkdir(parents=True, exist_ok=True)
        data.write_json(Path(args.out, "gpu.json"), found)
        print(json.dumps(found["gpu"][-1])[:600], flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return found


BENCHES = {"em": bench_em, "kmeans": bench_kmeans, "bank": bench_bank, "ctr": bench_ctr, "data": bench_data,
           "scale": bench_scale, "gpu": bench_gpu}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for name, run in BENCHES.items():
        sub = commands.add_parser(name, help=run.__doc__.split("\n")[0], allow_abbrev=False)
        sub.add_argument("--out", help="JSON file" if name != "gpu" else "folder for gpu.json", required=name == "gpu")
    whole = data.positive_int
    for names, flag, default, kind, what in (
            ("kmeans", "rows", 100_000, whole, "rows"), ("ctr data", "rows", 1_000_000, whole, "rows"),
            ("em gpu scale", "lm", None, str, "causal LM: folder or hub id; None: random weights, or a random table"),
            ("em gpu", "device", "auto", str, "cpu, cuda, cuda:1 …"),
            ("em gpu", "budget", None, whole, "padded tokens in one pass; None: as uip.py chooses"),
            ("em", "dtype", "float32", str, "float32, bfloat16 or float16"),
            ("em", "texts", 512, whole, "texts of the planted shop"),
            ("em", "naive", 32, whole, "texts for the naive way"),
            ("em", "repeat", 3, whole, "turns after the warm-up"),
            ("gpu scale", "office", None, str, "folder of Office_Products, made by data.py; needs --profiles"),
            ("gpu scale", "profiles", None, str, "what uip.py fit made of it on a CPU"),
            ("gpu", "demo", None, str, "folder of the demo's records, made by reproduce.sh on this machine"),
            ("gpu", "minutes", 7, whole, "no part starts after so many"),
            ("bank", "users", 10_000_000, whole, "users"),
            ("scale", "users", [1000, 100_000], whole, "users of each shop, ascending")):
        for name in names.split():
            commands.choices[name].add_argument(
                f"--{flag}", default=default, type=kind, help=f"{what} [{default}]",
                required=(name, flag) == ("em", "lm"), nargs="+" if isinstance(default, list) else None)
    commands.choices["gpu"].add_argument("--small", action="store_true", help="tiny sizes, to try the code")
    args = parser.parse_args(argv)
    found = BENCHES[args.bench](args)
    if args.out and args.bench != "gpu":
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        data.write_json(args.out, found)
    print(json.dumps(found))


if __name__ == "__main__":
    data.run_command("bench.py", main)
