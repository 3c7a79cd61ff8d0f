"""Choices made on validation cases and kept with a run, each with what it was measured to gain."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import ClassVar, Self

from medseg.config import Record

__all__ = ["Choice"]


class Choice(Record):
    """What validation decided; a JSON file in the folder of the run, which prediction looks for."""

    file: ClassVar[str]  # its name
    cases: int

    @property
    def reason(self) -> str:
        """One sentence for people: what was decided, and the figures that say so."""
        raise NotImplementedError

    @classmethod
    def of(cls, folder: str | PathLike[str]) -> Self | None:
        """The choice stored in the folder of a run, None where there is none.

        Raises
        ------
        ValueError
            If the file there is not valid.
        """
        path = Path(folder) / cls.file
        return cls.load(path) if path.is_file() else None

    def store(self, folder: str | PathLike[str]) -> Self:
        """Keep it in the folder of a run, in place of a former one."""
        self.save(Path(folder) / self.file, force=True)
        return self
