"""Training: the loop, where one can see it; `fit`, which calls it; and Model, what comes out.

Symbols: P parameters, S steps an epoch, M evaluated users, H heads, L positions.

Everything random is derived from (seed, epoch) or (seed, step), never from a generator that lives on. So a run that
stops anywhere and is resumed ends in the same bits as one that did not stop.
"""

import inspect
import operator
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from minirec import backend, decompose, files, model
from minirec.backend import load as load_backend
from minirec.data.log import check_log, filter_log, renumbered
from minirec.data.split import SPLITS, Targets, batches, training_windows
from minirec.errors import UserError, did_you_mean
from minirec.packing import check_items
from minirec.parameters import Config
from minirec.training import runs
from minirec.training.baselines import rank_baselines
from minirec.training.mpi import launched_ranks
from minirec.training.parallel import Team, sampling_for, usable_cores, worker_map
from minirec.training.progress import Progress
from minirec.training.ranking import MISS, metrics, rank_targets, recommend
from minirec.training.runs import SELECTED_BY
from minirec.training.settings import SIZES, TRAINING, Source, Training, make_settings, model_config, picked

UNKNOWN = MISS + 1  # the rank of a target that the model does not know
SPLITTING = ("split", "k_core", "drop_repeats")  # the options of a log that was read already


def train(log, settings, folder=None, resume=False, on_step=None, on_epoch=None, stop=None, ranks=None):
    """Train a model, and keep the parameters of the epoch that is best on validation.

    log: Log, filtered; settings: as config.json holds them (see settings.py); folder: a pathlib.Path to keep the run
    in, None for none; resume: go on from what the folder keeps, if anything. on_step(epoch, i, n_steps, loss) is called
    after each step, with the loss as a 0-d array on the device; on_epoch(record) after each epoch, with the line of
    metrics.jsonl; stop() after each step: where it returns true, training stops. ranks: the mpi.Ranks that train
    together, of which the first one writes. The loss for on_step is then an estimate from this rank's part of the
    batch, and stop must end all ranks at the same step.
    Returns the records of all epochs, whether training came to its end (False: it was stopped), and the parameters
    {name: array} on the host. Raises UserError for a log without training data, a folder that cannot be used, or a loss
    that is not finite.
    """
    config, training = model_config(settings), settings["training"]
    split = runs.split_log(log, settings)
    starts, lengths = training_windows(log, split, config.max_length)
    check_trainable(starts, split)
    n_steps = -(-len(starts) // training["batch_size"])
    # The workers start first: they must not inherit, and outlive, the lock on the run folder.
    xp, sampling = load_backend(training["backend"]), sampling_for(log, split, config, training)
    team = Team(config, log.sequence, xp, training["workers"], sampling, ranks)
    folder = folder if team.ranks.rank == 0 else None
    with team, runs.opened(folder, resume) if folder else nullcontext():
        run = Progress(settings, folder, team, n_steps, log)  # at its beginning, or where it was stopped
        while not run.complete():
            epoch = len(run.records) + 1
            order = batches(len(starts), training["batch_size"], training["seed"], epoch)
            for i in range(run.step % n_steps, n_steps):
                began, batch = time.perf_counter(), order[i]
                run.step += 1
                run.losses[i] = team.compute_gradients(starts[batch], lengths[batch], (training["seed"], run.step))
                team.update(run.step, training["lr"])  # Adam
                run.seconds += time.perf_counter() - began
                if on_step:
                    on_step(epoch, i + 1, n_steps, run.losses[i] * team.ranks.size)
                if i + 1 < n_steps and stop and stop():
                    run.keep_unfinished(i + 1)
                    return run.records, False, run.best_parameters()
            run.close_epoch(log.sequence, split.valid)  # ranks the validation targets
            if on_epoch:
                on_epoch(run.records[-1])
            if stop and stop():
                break
        return run.records, run.complete(), run.best_parameters()


def check_trainable(starts, split):
    """Raise UserError where a log has nothing to train on, or nothing to validate on."""
    if not len(split.valid.users):
        raise UserError("nothing to validate on: no user has three interactions, of which two are held out")
    if not len(starts):
        raise UserError("nothing to train on: besides what is held out, no user has two interactions")


# From a log to a model


def print_epoch(record):
    """Print an epoch's record as a line on stderr."""
    valid = f"valid HR@10 {record['HR@10']:.4f} {SELECTED_BY} {record[SELECTED_BY]:.4f}"
    text = f"epoch {record['epoch']:3d}  loss {record['loss']:.4f}  {valid}  {record['train_seconds']:.1f} s"
    print(text, file=sys.stderr)


OPTIONS = {name: getattr(Source, name) for name in SPLITTING} | {name: getattr(Training, name) for name in TRAINING}
OPTIONS |= {name: getattr(Config, of_config) for name, of_config in SIZES.items()} | {"workers": None}


def fit(log, attn=Config.attn, seed=Training.seed, folder=None, *, resume=False, on_epoch=print_epoch, **options):
    """Train on a Log, and return the Model that is best on validation.

    attn: the attention weighting; seed: of initial weights, batch order and dropout; folder: a run folder to keep,
    which `load` and the command line read (None: nothing is written).
    The log: split, "leave-one-out" or "temporal"; k_core, keep users and items with at least so many interactions;
    drop_repeats, count an item once where it directly follows itself.
    The model: max_length, the latest items that it sees; hidden, its size D; blocks; heads; dropout.
    Training: loss, "ce" over all items, "sampled" over `negatives` of them, "bce" against one unseen item; epochs, at
    most so many; batch_size; lr, the learning rate; patience, epochs without a gain that end it; filter_seen, rank only
    items that a user has not had; backend, "numpy" or "cupy"; workers, processes (None: all usable cores).
    resume: go on with the run that the folder holds; on_epoch(record): called after each epoch (None: in silence).
    Raises UserError for an option that is not allowed, a log that cannot be trained on, a folder that cannot be used,
    or a loss that is not finite.
    """
    check_log(log, "fit")
    if unknown := options.keys() - OPTIONS:
        raise UserError(f"fit takes no {', '.join(sorted(unknown))}{did_you_mean(min(unknown), OPTIONS)}")
    if resume and not folder:
        raise UserError("resume goes on with the run in a folder, and none is given")
    source = Source(runs.LOG, **picked(options, SPLITTING))
    log = filter_log(log, source.k_core, source.drop_repeats)
    ranks, folder = launched_ranks(), Path(folder) if folder else None
    options |= {"attn": attn, "seed": seed, "workers": options.get("workers") or workers_for(ranks)}
    settings = make_settings(replace(source, sha256=log.sha256()), len(log.items), options)
    records, _, parameters = train(log, settings, folder, resume, on_epoch=on_epoch, ranks=ranks)
    return Model(model_config(settings), parameters, log.items, settings, records, lambda: log, folder)


# A notebook completes the names of **options, and shows their defaults.
_named = {name: p for name, p in inspect.signature(fit).parameters.items() if name != "options"}
_optional = [
    inspect.Parameter(x, inspect.Parameter.KEYWORD_ONLY, default=OPTIONS[x]) for x in OPTIONS if x not in _named
]
fit.__signature__ = inspect.Signature([*_named.values(), *_optional])


def load(folder, data=None, backend=Training.backend, read=runs.load_log):
    """Return the Model of a run folder.

    data: where its log lies now, if that was moved; backend: "numpy" or "cupy"; read(source): how the log is read,
    when it is first needed. Raises UserError where the folder holds no run, or what it holds is damaged.
    """
    folder = Path(folder)
    settings = runs.load_settings(folder)
    config = model_config(settings)
    parameters = runs.load_parameters(folder, config, load_backend(backend))
    items, records = runs.load_items(folder, config), runs.load_records(folder)
    read_log = partial(runs.load_run_log, folder, settings, data, read)
    return Model(config, parameters, items, settings, records, read_log, folder)


def workers_for(ranks):
    """Return the default number of workers of a process: all usable cores, divided among the ranks."""
    return max(1, usable_cores() // ranks.size)


# What comes out


def silent(length):
    """Return a context of a function of a number that does nothing, for those who do not want to see progress."""
    return nullcontext(lambda n: None)


@dataclass
class Model:
    """A trained model, and what can be done with it.

    Items that the model does not know are left out of a log or a history, with a warning; where one is the target, the
    target is a miss.
    """

    config: Config
    parameters: dict = field(repr=False)  # {name: array}, on NumPy or CuPy
    items: list = field(repr=False)  # V names, in the model's numbering
    settings: dict = field(repr=False)  # as config.json holds them (see settings.py)
    records: list = field(repr=False)  # one an epoch, as in metrics.jsonl
    read_log: object = field(repr=False)  # () -> the Log that it was trained on, filtered
    folder: Path | None = None

    @cached_property
    def log(self):
        """The Log that the model was trained on, filtered; one that lies in a file is read when it is first needed."""
        return replace(self.read_log(), items=self.items)  # the same list, not an equal one: compared fast

    @property
    def xp(self):
        return backend.get_array_module(self.parameters["item_embedding"])

    def with_attention(self, attn, blocks=None):
        """Return the Model with other attention weights substituted: everything else stays as it was trained.

        attn: a name from attention.known_weightings(); blocks: numbers of the blocks, from 0; None: all. Raises
        UserError for a name or a block that there is not.
        """
        n_blocks = self.config.n_blocks
        changed = range(n_blocks) if blocks is None else np.atleast_1d(blocks).tolist()
        if not set(changed) <= set(range(n_blocks)):
            raise UserError(f"blocks {blocks}: the model has blocks 0 to {n_blocks - 1}")
        weightings = tuple(attn if i in changed else trained for i, trained in enumerate(self.config.weightings))
        return replace(self, config=replace(self.config, attn=weightings), read_log=lambda: self.log)

    def evaluate(self, log=None, part="test", filter_seen=None, workers=None, progress=silent):
        """Rank the targets of a log among all items; return {"HR@10": ..., "NDCG@10": ..., ..., "users": ..., ...}.

        log: another Log than the one that was trained on (None). It is filtered and split in the same way, and its
        items are matched by name; targets that the model does not know are misses. part: "valid" or "test";
        filter_seen: whether items that the user had before are no candidates (None: as trained); workers: threads
        (None: all usable cores); progress(n): a context whose value is called with numbers of targets that were ranked.
        Without another log, "baselines" holds the same metrics of two rankings by counts. Raises UserError where no
        user has a target, or the model knows none of the items.
        """
        if log is not None:
            check_log(log, "evaluate")
        filter_seen = self.filters_seen(filter_seen)
        targets, ranks, missed = self._rank(log, part, filter_seen, workers, progress)
        counted = {}
        if log is None:
            counted = rank_baselines(self.log, runs.split_log(self.log, self.settings), targets, filter_seen)
        result = {"split": part} | metrics(ranks) | {"users": len(ranks), "unreachable": int((ranks == MISS).sum())}
        result |= missed | {"attn": list(self.config.weightings), "filter_seen": filter_seen}
        return result | {"baselines": {name: metrics(values) for name, values in counted.items()}}

    def ranks(self, part="test", workers=None):
        """Return the rank [M] of each target of the log that was trained on: 0 = best, ranking.MISS = no candidate."""
        return self._rank(None, part, self.filters_seen(None), workers, silent)[1]

    def filters_seen(self, wanted):
        """Return whether items that the user had before are no candidates; wanted None: as trained."""
        return self.settings["training"]["filter_seen"] if wanted is None else wanted

    def _rank(self, log, part, filter_seen, workers, progress):
        """Return the Targets of a log (None: the one trained on), their ranks [M], and {what is unknown: how many}."""
        if part not in ("valid", "test"):
            raise UserError(f"part is {part!r}: choose valid or test")
        if log is None:
            targets = known = getattr(runs.split_log(self.log, self.settings), part)
            sequence, ranked, missed = self.log.sequence, np.arange(len(targets.users)), {}
        else:
            source = self.settings["data"]
            log = filter_log(log, source["k_core"], source["drop_repeats"])
            targets = getattr(SPLITS[source["split"]](log), part)
            sequence, known, ranked, missed = self._known_targets(log, targets)
        if not len(targets.users):
            raise UserError(f"no user has a target for {part}")
        ranks, done = np.full(len(targets.users), UNKNOWN), 0
        with worker_map(workers or usable_cores(), self.xp) as run, progress(len(ranked)) as update:
            for chunk in rank_targets(self.parameters, self.config, sequence, known, filter_seen, run):
                ranks[ranked[done : done + len(chunk)]] = chunk
                done += len(chunk)
                update(len(chunk))
        return targets, ranks, missed

    def _known_targets(self, log, targets):
        """Pick from the targets of another log those that the model can rank; warn of how many others there are.

        Returns the sequence and the Targets in the model's numbering of items, their indices among all targets, and
        {what the model does not know: how many of the others}.
        """
        known, moved = self.known_part(log)
        starts, stops = moved[targets.starts], moved[targets.stops]
        has_target, has_history = moved[targets.stops + 1] > stops, stops > starts
        ranked = np.flatnonzero(has_target & has_history)
        n, no_target, no_history = len(starts), int((~has_target).sum()), int((has_target & ~has_history).sum())
        for count, what in ((no_target, "targets are"), (no_history, "histories before a known target are all")):
            if count:
                tell(f"{count:,} of {n:,} {what} unknown to the model: they count as misses")
        missed = {"unknown_targets": no_target, "unknown_histories": no_history}
        return known.sequence, Targets(targets.users[ranked], starts[ranked], stops[ranked]), ranked, missed

    def known_part(self, log):
        """Return what data.log.renumbered returns for another log, and warn of how much is left out."""
        known, moved = renumbered(log, self.items)
        left_out = len(log.sequence) - len(known.sequence)
        if not len(known.sequence):
            theirs = f"its {len(log.items):,} items, such as {log.items[0]!r}"
            raise UserError(f"the model knows none of {theirs}; those that it knows look like {self.items[0]!r}")
        if left_out:
            unknown = f"{len(set(log.items).difference(self.items)):,} of its {len(log.items):,} items"
            interactions = f"{left_out:,} of {len(log.sequence):,} interactions"
            tell(f"{unknown} are unknown to the model: left out, with {interactions}")
        return known, moved

    def history(self, history):
        """Return a history as item numbers [n]: texts are names of items, numbers those of the model or of a History.

        Names that the model does not know are left out, with a warning.
        """
        numbers = {name: i for i, name in enumerate(self.items)}
        wrong = UserError(f"a history is a list of item names or numbers, oldest first, not {history!r:.60}")
        if isinstance(history, str):  # whose characters are no items
            raise wrong
        theirs = getattr(history, "item_names", None)
        try:
            history = list(history)  # perhaps an iterator, which can be read once
            history = history if theirs in (None, self.items) else [theirs[item] for item in history]
            items = [numbers.get(item, item) if isinstance(item, str) else operator.index(item) for item in history]
        except (TypeError, IndexError):
            raise wrong from None
        unknown = [item for item in items if isinstance(item, str)]
        known = [item for item in items if not isinstance(item, str)]
        if not known:
            why = f"the model knows none of its items: {files.few(unknown)}" if unknown else "it is empty"
            near = did_you_mean("".join(unknown[:1]), self.items)
            raise UserError(f"history: {why}{near or f'; items look like {self.items[0]!r}'}")
        if not 0 <= min(known) <= max(known) < len(self.items):
            raise UserError(f"item numbers go from 0 to {len(self.items) - 1}; a name is a text: {self.items[0]!r}")
        if theirs is None:
            typed = (item for item in history if not isinstance(item, str))
            other = next((item for item in typed if numbers.get(str(item), item) != item), None)
            if other is not None:
                name = self.items[other]
                tell(f"history: {other} is taken as a number, that of item {name!r}; a name is a text: '{other}'")
        if unknown:
            tell(f"left out, unknown to the model: {files.few(unknown)}")
        return np.array(known)

    def recommend(self, history, k=10, filter_seen=None):
        """Return the k best items after a history, oldest item first, as [(name, score)], best first.

        history: item names or numbers, as of model.log.history(0); filter_seen: rank only items not in it (None: as
        trained), which may be fewer than k. Raises UserError for a history of which the model knows nothing.
        """
        (best,) = self.recommend_many([self.history(history)], k, filter_seen, workers=1)
        return best

    def recommend_many(self, histories, k=10, filter_seen=None, workers=None):
        """Yield what `recommend` returns for each of many histories, in order.

        histories: an iterable of arrays of item numbers, or of Histories, none empty, which is read a chunk at a time;
        workers: threads (None: all usable cores). Where filter_seen leaves fewer than k candidates, a list is shorter.
        """
        if not isinstance(k, (int, np.integer)) or k < 1:
            raise UserError(f"k is {k!r}: at least 1 item is recommended")

        def checked(history):
            other = getattr(history, "item_names", None) not in (None, self.items)
            history = np.asarray(self.history(history) if other else history)
            check_items(history, self.config.n_items)
            return history

        filter_seen = self.filters_seen(filter_seen)
        with worker_map(workers or usable_cores(), self.xp) as run:
            for chunk in recommend(self.parameters, self.config, map(checked, histories), k, run, filter_seen):
                for items, scores in zip(*chunk, strict=True):
                    pairs = zip(items, scores, strict=True)
                    yield [(self.items[item], float(score)) for item, score in pairs if score > -np.inf]

    def attention(self, history):
        """Return the attention matrices of a history's latest items (see recommend), [H, L, L] a block."""
        return model.attention_matrices(self.parameters, self.config, self.history(history))

    def decompose(self, workers=None, progress=silent):
        """Return decompose.decompose of the test users' histories, with their names as "users" and a "summary"."""
        test = runs.split_log(self.log, self.settings).test
        histories = [self.log.sequence[a:b] for a, b in zip(test.starts, test.stops, strict=True)]
        n_tokens = int(np.minimum(test.stops - test.starts, self.config.max_length).sum())
        with worker_map(workers or usable_cores(), self.xp) as run, progress(n_tokens) as update:
            result = decompose.decompose(self.parameters, self.config, histories, run, update)
        names = np.array([self.log.users[u] for u in test.users])
        return result | {"users": names[result["sequences"]], "summary": decompose.summarise(result)}

    def save(self, folder):
        """Write a run folder, its log in it: `load` gives this model again, and the same numbers.

        Raises UserError where the folder holds a run, or something else that is no saved model.
        """
        folder, log = Path(folder), self.log
        source = Source(runs.LOG, log.sha256(), **picked(self.settings["data"], SPLITTING))
        with runs.opened(folder, resume=False, saving=True):
            settings = self.settings | {"model": asdict(self.config), "data": asdict(source), "saved": True}
            runs.write_settings(folder, settings, log)
            files.write_json_lines(folder / "metrics.jsonl", self.records)
            files.write_arrays(folder / "checkpoint.npz", {n: backend.to_host(x) for n, x in self.parameters.items()})


def tell(text):
    """Say a remark of ours: a line on stderr on the command line, a warning elsewhere."""
    warnings.warn(text, stacklevel=3)
