"""Where rows of numbers are kept: a CSV file, TensorBoard's event files."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

__all__ = ["CsvRecord", "TensorBoardRecord", "known_means", "make_parent"]

Row = Mapping[str, float]


def known_means(rows: np.ndarray) -> np.ndarray:
    """Means over the first axis of what is not NaN; NaN if all is."""
    known = ~np.isnan(rows)
    count = known.sum(axis=0)
    total = np.where(known, rows, 0.0).sum(axis=0)
    return np.where(count, total / np.maximum(count, 1), np.nan)


class CsvRecord:
    """A CSV file with a column for each number, written row by row.

    Args:
        path: of the file.
        append: whether rows are added to a file that exists; otherwise it is
            written anew.
    """

    def __init__(self, path: str, append: bool = False) -> None:
        self._path = path
        self._append = append
        self._file: Any = None
        self._writer: Any = None

    def open(self) -> None:
        """Opens the file; the header comes with the first row."""
        make_parent(self._path)
        mode = "a+" if self._append else "w"
        self._file = open(self._path, mode, newline="", encoding="utf-8")
        self._writer = None

    def write(self, row: Row) -> None:
        """Adds a row, which a process that ends now does not lose.

        Raises:
            ValueError: the file that is appended to has other columns.
        """
        if self._writer is None:
            self._writer = csv.writer(self._file)
            if not self._has_header(list(row)):
                self._writer.writerow(row)
        self._writer.writerow([f"{value:.9g}" for value in row.values()])
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _has_header(self, columns: list[str]) -> bool:
        if not self._append:
            return False
        self._file.seek(0)
        header = next(csv.reader(self._file), None)
        self._file.seek(0, os.SEEK_END)
        if header not in (None, columns):
            raise ValueError(
                f"Expected a CSV file to append to with the columns {columns}. "
                f"Received: {header} in {self._path}"
            )
        return header is not None


class TensorBoardRecord:
    """Scalars in an event file that TensorBoard shows.

    One event a row: a call of `tf.summary.scalar` for each number would take
    longer than many a step.

    Args:
        directory: of the event files.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._writer: Any = None

    def open(self) -> None:
        self._writer = tf.summary.create_file_writer(self._directory)

    def write(self, row: Row) -> None:
        """Adds a row; numbers that are not finite are left out."""
        summary = tf.compat.v1.Summary(
            value=[
                tf.compat.v1.Summary.Value(
                    tag=f"search/{name}", simple_value=value
                )
                for name, value in row.items()
                if name != "step" and math.isfinite(value)
            ]
        )
        with self._writer.as_default():
            tf.summary.experimental.write_raw_pb(
                summary.SerializeToString(), step=int(row["step"])
            )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def make_parent(path: str) -> None:
    """Makes the directory that the file at `path` is to be in."""
    directory = os.path.dirname(path)
    if directory:
        os.makedirs(directory, exist_ok=True)
