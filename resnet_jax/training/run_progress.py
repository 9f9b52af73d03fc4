"""What a run carries beside the state: what it has selected, skipped, and still has to do."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from resnet_jax.config import InputError
from resnet_jax.training.checkpoints import Record
from resnet_jax.training.manifest import Best


@dataclass
class RunProgress:
    """Everything of a run but its state; each checkpoint holds it as JSON.

    Attributes:
      recipe: of the run, as JSON.
      class_names: of the model's outputs.
      multilabel: whether an image may have several labels.
      step: at which the run is, or has ended.
      best: None where nothing was selected yet.
      selected: step of what is reported in the end.
      result: means of the evaluation that is reported, by split.
      sums: of the steps since the last line of the log, which a resumed run adds to.
      skipped: names of the pictures that could not be read.
      skipped_updates: those that were not finite, in `total` and `in_row` up to now.
      eval_pending: the evaluation of this step is still to be made.
      no_better: evaluations since the best one.
      rollbacks: times that the run went back to a checkpoint.
    """

    recipe: dict[str, Any]
    class_names: list[str]
    multilabel: bool
    step: int = 0
    best: Best | None = None
    selected: int | None = None
    result: dict[str, Any] | None = None
    sums: dict[str, float] | None = None
    skipped: list[str] = field(default_factory=list)
    skipped_updates: dict[str, int] = field(default_factory=lambda: {"total": 0, "in_row": 0})
    eval_pending: bool = False
    no_better: int = 0
    rollbacks: int = 0

    def to_record(self) -> Record:
        """Returns what a checkpoint holds beside the state."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Record) -> Self:
        """Returns the progress that a checkpoint holds.

        Raises:
          InputError: it has other fields, as those of another version have.
        """
        known = {f.name for f in fields(cls)}
        if different := known.symmetric_difference(record):
            raise InputError(
                f"the checkpoint is of another version of resnet_jax: its record and this version differ in "
                f"{', '.join(sorted(different))}"
            )
        return cls(**record)
