"""The command lines of train.py and evaluate.py: the only place that knows LightningCLI."""

import ctypes
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from torch import nn

from lit_adv.callbacks import AttackEvaluation, Audit
from lit_adv.datamodules import ImageDataModule
from lit_adv.evaluation import versions
from lit_adv.probes import IMAGES
from lit_adv.report import Report
from lit_adv.suggestions import explain
from lit_adv.tasks import Checkpoint, Classification, Task, export_checkpoint, load_weights

Arguments = Sequence[str] | None

# Warnings about Lightning's own calls, and one about loaders that need no workers: their images lie in memory.
_NOT_OURS = (
    r"\s*(By default only one JsonargparseDeprecationWarning|skip_none parameter was deprecated)",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r".*does not have many workers",
)


def train_main(args: Arguments = None) -> None:
    """Run ``train.py``: fit or validate a task that a configuration describes.

    Args:
        args: Command line; ``None``: the process's own.
    """
    _run(lambda: TrainCLI(args))


def evaluate_main(args: Arguments = None) -> None:
    """Run ``evaluate.py``: attack a trained network, print the table, write the report.

    Args:
        args: Command line; ``None``: the process's own.
    """
    _run(lambda: EvaluateCLI(args).evaluate())


def under_test(
    checkpoint: Path | None = None, module: nn.Module | None = None, allow: Sequence[str] = ()
) -> LightningModule:
    """The network to evaluate, as a task.

    Args:
        checkpoint: Checkpoint written by training; with ``module`` too, its weights are put into that module.
        module: Any network from images in [0, 1] to logits, by its class path.
        allow: Further packages whose classes the checkpoint may name, if you trust them.

    Raises:
        ValueError: If neither is given.
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If the checkpoint cannot be used.
    """
    if module is None and checkpoint is None:
        raise ValueError("nothing to evaluate: give --model.checkpoint PATH or --model.module CLASS_PATH")
    if module is None:
        assert checkpoint is not None
        return Classification(Checkpoint(checkpoint, allow=allow))
    return Classification(module if checkpoint is None else load_weights(module, checkpoint))


class Parser(LightningArgumentParser):
    """Answers a faulty configuration with one error that names the nearest valid class or key."""

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """No abbreviations: a flag cut short is a misspelt one."""
        return []

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        _exit(explain(message, self._keys()))

    def _keys(self) -> list[str]:
        """The keys of this parser, or of its subcommands'."""
        found = [action.dest for action in self._actions]
        for action in self._actions:
            if isinstance(action.choices, dict):
                found += [key for parser in action.choices.values() for key in parser._keys()]
        return [key for key in found if key not in ("help", "print_config", "subcommand")]


class AdvCLI(LightningCLI):
    """What both command lines share: defaults, the name of the run, its logger."""

    def __init__(
        self,
        model: type[LightningModule] | Callable[..., LightningModule],
        trainer: Mapping[str, Any] | None = None,
        data: type[LightningDataModule] = ImageDataModule,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            data,
            # Attacks in validation and test need gradients; all that is logged is logged once an epoch.
            trainer_defaults={"inference_mode": False, "log_every_n_steps": 1, **(trainer or {})},
            seed_everything_default=0,
            subclass_mode_data=True,
            parser_class=Parser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_kwargs={"overwrite": True},
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the name of the run."""
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Name of the run; default: the first configuration's.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line given, or the process's own."""
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer."""
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self.trainer = self.instantiate_trainer()

    @property
    def run_name(self) -> str:
        """Name of the run: given, or that of the first configuration file."""
        if name := self._get(self.config, "name"):
            return str(name)
        configs = self._get(self.config, "config") or []
        return Path(str(configs[0])).stem if configs else "run"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with its logger, runs/<name>, unless the configuration has another."""
        config = self._get(self.config_init, "trainer")
        if config.get("logger") in (None, True) and not config.get("fast_dev_run"):
            from pytorch_lightning.loggers import TensorBoardLogger

            root = config.get("default_root_dir") or "runs"
            kwargs["logger"] = TensorBoardLogger(save_dir=root, name=self.run_name)
        return super().instantiate_trainer(**kwargs)


class TrainCLI(AdvCLI):
    """``train.py``: subcommands fit and validate."""

    def __init__(self, args: Arguments = None) -> None:
        # any data: a regression trains on pairs, which are no labelled images
        super().__init__(Task, data=LightningDataModule, subclass_mode_model=True, args=args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """What can be run, and which of the trainer's arguments come from the configuration instead."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the length of training and where the trained network is put."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--epochs",
            type=int | None,
            default=None,
            help="Epochs of training; trainer.max_epochs goes before it.",
        )
        parser.add_argument(
            "--save_as",
            type=Path | None,
            default=None,
            help="File for the best weights, without training state.",
        )

    def instantiate_classes(self) -> None:
        """Build everything; the task notes the configuration it came from."""
        super().instantiate_classes()
        run = self.config_init[self.subcommand]
        if run.get("weights_only") is None:
            run["weights_only"] = True  # a checkpoint to go on from is read without running code, too
        plain = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        self.model.remember(plain[self.subcommand]["model"])

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, keeping the epoch that is best on validation images."""
        config = self._get(self.config_init, "trainer")
        if config.get("max_epochs") is None:
            kwargs["max_epochs"] = self._get(self.config, "epochs")
        callbacks = _as_list(config.get("callbacks"))
        wanted = config.get("enable_checkpointing") is not False and not config.get("fast_dev_run")
        if wanted and not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
            kwargs["callbacks"] = [*callbacks, best_epoch(callbacks, *self.model.best)]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Find out before the training, not after it, whether its result can be put where it is wanted."""
        target = self._get(self.config, "save_as")
        if target is None or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"save_as {target}: its folder cannot be made ({error.strerror}); choose another"
            ) from None

    def after_fit(self) -> None:
        """Put the best weights where the configuration wants them."""
        target = self._get(self.config, "save_as")
        if target is None or self._get(self.config, "trainer").fast_dev_run:
            return
        keeper = self.trainer.checkpoint_callback
        if not isinstance(keeper, ModelCheckpoint) or not keeper.best_model_path:
            raise ValueError(f"save_as {target} needs a checkpoint of the run: set trainer.enable_checkpointing: true")
        if self.trainer.is_global_zero:
            export_checkpoint(Path(keeper.best_model_path), Path(target))
            print(f"best weights, from {keeper.best_model_path}: {target}")


class EvaluateCLI(AdvCLI):
    """``evaluate.py``: the attacks are callbacks of the trainer's test."""

    def __init__(self, args: Arguments = None) -> None:
        # the attacks' own bars show more, and two kinds of bar cannot share a terminal
        super().__init__(under_test, {"enable_progress_bar": False}, run=False, args=args)
        root = Path(self._get(self.config, "trainer").get("default_root_dir") or "runs")
        for attack in self.attacks:
            if self._get(self.config, "max_samples") is not None:
                attack.protocol = replace(attack.protocol, max_samples=self._get(self.config, "max_samples"))
            if attack.dirpath is None:
                attack.dirpath = root / self.run_name  # not the version's folder: a broken run must be found again
        if self._get(self.config, "audit") and self.audit is None:
            audit = Audit(self._get(self.config, "audit_images"), root / self.run_name)
            self.trainer.callbacks.append(audit)  # type: ignore[attr-defined]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add where the report is put."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--report", type=Path | None, default=None, help="Folder of the report; default: the run's own."
        )
        parser.add_argument(
            "--max_samples", type=int | None, default=None, help="Test images to look at, for every attack."
        )
        parser.add_argument("--audit", type=bool, default=True, help="Whether to probe if the figures can be believed.")
        parser.add_argument(
            "--audit_images", type=int, default=IMAGES, help="Images that the audit probes, right at first."
        )

    @property
    def attacks(self) -> list[AttackEvaluation]:
        """The attacks among the trainer's callbacks."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, AttackEvaluation)]

    @property
    def audit(self) -> Audit | None:
        """The audit among the trainer's callbacks."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, Audit)), None)

    def attack(self) -> Report | None:
        """Test and attack the network; ``None`` on all processes but the first."""
        if not self.attacks:
            raise ValueError("no attack is configured: give --config configs/evaluate/NAME.yaml, or add a callback")
        measured = self.trainer.test(self.model, self.datamodule, verbose=False)
        if not self.trainer.is_global_zero:
            return None
        accuracy = measured[0].get("test/accuracy") if measured else None
        facts = versions()
        if accuracy is not None:
            images = len(self.datamodule.dataset("test"))
            facts = {"accuracy on the test set": f"{100 * accuracy:.2f} % of {images:,} clean images", **facts}
        outcomes = [attack.outcome for attack in self.attacks if attack.outcome is not None]
        probed = self.audit.probed if self.audit is not None else []
        return Report(outcomes, self.model_name, self.datamodule.name, facts, probed)

    def evaluate(self) -> Report | None:
        """Test and attack the network, print the table, write the report."""
        report = self.attack()
        folder = self._get(self.config, "report") or self.trainer.log_dir or "runs"  # log_dir asks all processes
        if report is None:
            return None
        report.show()
        print(f"report: {report.write(Path(folder))['html']}")
        return report

    @property
    def model_name(self) -> str:
        """Name of the network in the report: its checkpoint's, else its class's."""
        checkpoint = self.config.model.checkpoint
        return Path(checkpoint).stem if checkpoint else type(self.model.model).__name__


def best_epoch(callbacks: Sequence[Callback], metric: str = "val/accuracy", mode: str = "max") -> ModelCheckpoint:
    """Keeps the epoch of best robust accuracy under the first probe, or of the best metric if none probes.

    Args:
        callbacks: The trainer's others, probes among them.
        metric: What the task measures. mode: "max" or "min" of it.
    """
    probe = next((callback for callback in callbacks if isinstance(callback, AttackEvaluation)), None)
    return ModelCheckpoint(
        monitor=f"val/robust_accuracy/{probe.name}" if probe else metric,
        mode="max" if probe else mode,
        filename="epoch{epoch:03d}",
        auto_insert_metric_name=False,  # the slash in the metric's name would make folders
        every_n_epochs=probe.every_n_epochs if probe else 1,
        save_last=True,
    )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _run(main: Callable[[], object]) -> None:
    """Run a command line; an error that this package raised on purpose is told in one line."""
    keep_memory()
    try:
        with quiet():
            main()
    except (ValueError, TypeError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if "jsonargparse" in raised_in.parts:
            _exit(explain(str(error)))
        if Path(__file__).parent not in raised_in.parents:
            raise
        _exit(str(error))


def keep_memory() -> None:
    """Have glibc keep freed memory: returning it after every layer and faulting it in again costs a fifth of the time.

    Concerns this process and CPU memory alone; elsewhere than on Linux with glibc nothing happens.
    """
    trim_threshold, mmap_threshold = -1, -3  # names of mallopt's parameters in malloc.h
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 1 << 30)


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings about Lightning's own calls, and without its advertisements; the rest of what it says stays."""
    log = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    if not log.filters:
        log.addFilter(lambda record: not record.getMessage().startswith("\N{ELECTRIC LIGHT BULB} Tip"))
    with warnings.catch_warnings():
        for message in _NOT_OURS:
            warnings.filterwarnings("ignore", message=message)
        yield


def _exit(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)
