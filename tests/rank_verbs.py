"""What `test_ranks` looks at: every verb that is split over ranks, in two processes and in one, and what ends them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from fixtures.known_saes import random_sae
from fixtures.ranks import fork_ranks, import_all
from fixtures.tiny_models import TEXTS, WIDTH, WORDS, make_model
from fixtures.training_runs import source
from fixtures.worded_classes import COMMON, run
from saekit import files, ranks
from saekit.cli import app
from saekit.evaluation.run import evaluate
from saekit.evaluation.settings import EvaluationSettings
from saekit.explanation.run import explain
from saekit.explanation.settings import ExplainSettings
from saekit.files import digest_bytes, digest_file
from saekit.models.loading import load_model
from saekit.rows import capture_texts, shards
from saekit.rows.arrays import ArrayRows
from saekit.rows.capture import capture
from saekit.rows.settings import CaptureSettings
from saekit.rows.stream import stream
from saekit.sae.model import SAE
from saekit.training.config import TopK
from saekit.training.loop import train
from saekit.training.settings import TrainSettings
from saekit.training.step import STEPS, plain_step

FEW = EvaluationSettings(max_rows=700, batch_rows=64)
PARTS = [{"name": "base", "width": 2}, {"name": "tuned", "width": 4}]
TOKENS = EvaluationSettings(max_rows=700, batch_rows=64, tokens=300)


def rows(n=1500):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0)) + 1
    return ArrayRows(x, document=torch.arange(n) // 7)


def of_width():
    return random_sae(d=WIDTH).replace(provenance={"hook": "layers.1"})


# ---------------------------------------------------------------- the verbs


def plain_json(result):
    """Return a result as JSON, without what no run repeats."""
    return json.loads(json.dumps(result.to_json()))


def evaluations(folder):
    model = folder / "model"
    lm = load_model(model)
    sae, other = random_sae(), random_sae("jumprelu", seed=1)
    return {
        "evaluate rows": lambda: plain_json(evaluate([sae, other], rows(), settings=FEW)),
        "evaluate a crosscoder": lambda: plain_json(
            evaluate(sae.replace(provenance={"parts": PARTS}), rows(), settings=FEW)
        ),
        "evaluate a few rows": lambda: plain_json(evaluate(sae, rows(40), settings=FEW)),
        "evaluate without documents": lambda: plain_json(evaluate(sae, rows().x, settings=FEW)),
        "evaluate a model": lambda: plain_json(evaluate(of_width(), model=lm, data=TEXTS * 9, settings=TOKENS)),
        "evaluate a stream": lambda: plain_json(
            evaluate(of_width(), stream(lm, TEXTS * 9, layer=1), settings=EvaluationSettings(max_rows=333))
        ),
        "evaluate one text": lambda: plain_json(evaluate(of_width(), model=lm, data=TEXTS[5:6], settings=TOKENS)),
    }


def captures(folder):
    """Return captures into memory and into a folder of this job's own, as what they hold."""
    lm = load_model(folder / "model")
    out = folder / f"rows-{os.environ['WORLD_SIZE']}"
    texts = TEXTS * 40

    def of(**more):
        return lambda: read(capture(lm, texts, **more))

    return {
        "capture": of(layer=1, tokens=1500),
        "capture all of two layers": of(layer=[0, 2]),
        "capture into a folder": of(layer=1, tokens=2222, out=out, settings=CaptureSettings(shard_rows=256)),
        "capture again": of(layer=1, tokens=2222, out=out, settings=CaptureSettings(shard_rows=256)),
        "captured": lambda: {path.name: digest_file(path) for path in sorted(out.iterdir()) if path.suffix != ".lock"},
    }


def read(found):
    if isinstance(found, dict):
        return {name: read(each) for name, each in found.items()}
    [batch] = found.batches(10**6)
    columns = [batch.x, batch.token, batch.document, batch.position]
    return [found.info["digest"], found.n_rows, *(digest_bytes(each.numpy().tobytes()) for each in columns)]


def classifications(folder):
    """Return a classification with random and untrained dictionaries, from fits in a folder, and what is in it."""
    lm, out = load_model(folder / "model"), folder / f"classified-{os.environ['WORLD_SIZE']}"
    texts = [{"text": TEXTS[i % 12] + f" {WORDS[i % 20]}" * (i % 5), "label": "ab"[i // 3 % 2]} for i in range(48)]
    few = {**COMMON, "ks": (2,), "control_ks": (2,), "arms": ("majority", "dense", "random", "untrained", "full")}

    def once():
        return timeless(plain_json(run(lm, of_width(), texts, label="label", out=out, **{**few, "save_arm": "none"})))

    def files():
        found = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"]
        kept = [path for path in found if "features" in path.parts]
        return [
            sorted(path.relative_to(out).as_posix() for path in found),
            [digest_file(path) for path in sorted(kept)],
        ]

    return {"classify": once, "classify again": once, "classified": files}


def explanations(folder):
    """Return an explanation with controls that are made of rows of the model, and of one of a random model."""
    lm = load_model(folder / "model")
    settings = ExplainSettings(tokens=900, cards=4, logit_tokens=2, controls=("shuffled", "random", "randomized"))
    return {"explain": lambda: timeless(plain_json(explain(of_width(), lm, TEXTS * 9, settings=settings)))}


def timeless(value):
    """Return a result without the seconds in it."""
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if "seconds" not in key}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def verbs(rank, folder):
    capture_texts._GROUP_TOKENS = 256  # several groups for each rank
    return {
        name: work()
        for name, work in {
            **evaluations(folder),
            **captures(folder),
            **classifications(folder),
            **explanations(folder),
        }.items()
    }


# ---------------------------------------------------------------- what is refused, and what ends them


def told(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def refused(rank, folder):
    settings = EvaluationSettings(seed=rank)
    found = {
        "settings": told(lambda: evaluate(random_sae(), rows(), settings=settings)),
        "rows": told(lambda: evaluate(random_sae(), rows(1500 + rank))),
        "texts": told(lambda: capture(folder / "model", TEXTS[rank:], layer=1)),
        "sae": told(lambda: evaluate(random_sae(seed=rank), rows())),
        "latents": told(
            lambda: explain(of_width(), folder / "model", TEXTS * 9, settings=ExplainSettings(latents=(rank,)))
        ),
        "verb": told(lambda: train(TopK(8, k=2), rows()) if rank else evaluate(random_sae(), rows())),
        "no rows": told(lambda: evaluate(random_sae())),
    }
    ranks.leave()
    return found


def command(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = app.run([str(each) for each in arguments])
    return [status, out.getvalue(), err.getvalue()]


def commands(rank, folder):
    """Evaluate from the command line, and start what is not split."""
    return {
        "evaluate": command("evaluate", folder / "sae", "--rows", folder / "rows.npy", "--out", folder / "evaluated"),
        "capture": command(
            "capture", "--model", folder / "model", "--data", folder / "texts.txt", "--layer", 1, "--out", folder / "c"
        ),
        "compare": command("compare", folder / "sae", folder / "sae"),
        "show": command("show", folder / "sae"),
    }


def on_a_full_disk(rank, folder):
    def full(*args, **more):
        raise OSError(28, "No space left on device")

    if rank == 0:
        files.write_atomic = full
    return command("evaluate", folder / "sae", "--rows", folder / "rows.npy", "--out", folder / "full")


def captured_on_a_full_disk(rank, folder):
    """Capture into shards until the disk of rank 0 is full, then again with room."""
    lm, out = load_model(folder / "model"), folder / "full-rows"
    capture_texts._GROUP_TOKENS = 256
    write, written = shards.write_bytes, 0

    def full(path, data):
        nonlocal written
        written += 1
        if written > 3:
            raise OSError(28, "No space left on device")
        write(path, data)

    shards.write_bytes = full
    settings = CaptureSettings(shard_rows=256)
    first = told(lambda: capture(lm, TEXTS * 40, layer=1, out=out, settings=settings))
    return {"first": first, "left": told(lambda: shards.ShardRows(out))}


def captured_again(folder):
    """Go on with the capture that a full disk ended."""
    lm = load_model(folder / "model")
    capture_texts._GROUP_TOKENS = 256
    settings = CaptureSettings(shard_rows=256)
    again = read(capture(lm, TEXTS * 40, layer=1, out=folder / "full-rows", settings=settings))
    return {"again": again, "whole": read(capture(lm, TEXTS * 40, layer=1))}


def at_rows(rank, what):
    """Evaluate, and do something on rank 1 when half of the rows are measured."""
    seen = 0

    def forward(self, x, **more):
        nonlocal seen
        seen += len(x)
        if rank == 1 and seen > 300:
            what()
        return encode(self, x, **more)

    encode = SAE.encode
    SAE.encode = forward
    evaluate(random_sae(), rows(), settings=FEW)


def nan(rank):
    decode = SAE.decode
    at_rows(rank, lambda: setattr(SAE, "decode", lambda *given: decode(*given) * float("nan")))


def killed(rank):
    at_rows(rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def frozen(rank):
    """Freeze rank 1; what is left of it goes with rank 0."""
    ranks.SILENT, ranks.GRACE = 2.0, 1.0
    parent, me = os.getppid(), os.getpid()

    def freeze():
        if not os.fork():
            while (Path("/proc") / str(first)).exists() and os.getppid() == me and time.monotonic() < limit:
                time.sleep(0.05)
            os.kill(me, signal.SIGKILL)
            os._exit(0)
        os.kill(me, signal.SIGSTOP)

    limit = time.monotonic() + 60
    place = Path(os.environ["TMPDIR"]) / f"first-of-{parent}"
    if rank == 0:
        place.write_text(str(me))
    while not place.is_file() or not place.read_text():
        time.sleep(0.01)
    first = int(place.read_text())
    at_rows(rank, freeze)


def idle(rank):
    """Do nothing on rank 1 in a step."""
    ranks.IDLE, ranks.GRACE = 2.0, 1.0
    run_with_step(rank, lambda: threading.Event().wait())


def busy(rank):
    """Work for longer on rank 1 in a step than a rank may do nothing."""
    ranks.IDLE, ranks.SILENT = 1.5, 3.0

    def work():
        until = time.process_time() + 2.5
        while time.process_time() < until:
            pass

    run_with_step(rank, work)


def run_with_step(rank, what):
    def step(learner, x):
        if rank == 1 and learner.step == 5:
            what()
        return plain_step(learner, x)

    STEPS["plain"] = step
    train(TopK(24, k=3), source(1280), settings=TrainSettings(batch_rows=64, step="plain"), progress=False)


# ---------------------------------------------------------------- all of it


def prepare(rank, folder):
    make_model("llama", folder / "model")
    random_sae().save(folder / "sae")
    import numpy as np

    (folder / "texts.txt").write_text("\n".join(TEXTS * 3))
    np.save(folder / "rows.npy", rows().x.numpy())


def main(folder, only=""):
    torch.set_num_threads(1)
    import_all()
    found = {}

    def launch(name, job, n=2):
        if only in name:
            found[name] = fork_ranks(n, job, folder / "jobs" / name)

    fork_ranks(1, lambda rank: prepare(rank, folder), folder / "jobs" / "prepare")
    launch("one", lambda rank: verbs(rank, folder), n=1)
    launch("two", lambda rank: verbs(rank, folder))
    launch("refused", lambda rank: refused(rank, folder))
    launch("commands", lambda rank: commands(rank, folder))
    launch("full disk", lambda rank: on_a_full_disk(rank, folder))
    launch("full disk of rows", lambda rank: captured_on_a_full_disk(rank, folder))
    launch("rows again", lambda rank: captured_again(folder))
    launch("nan", nan)
    launch("killed", killed)
    launch("frozen", frozen)
    launch("idle", idle)
    launch("busy", busy)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
