"""File access for runs on Ray: reads rows from files, writes blocks to files, and maintains a run's journal.

Ray imports this module in the processes that read and write files, so this module does not import JAX.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet
from ray.data.datasource import BlockBasedFileDatasink, FileBasedDatasource

from bert_jax.errors import InputError, listed, quoted

ROW = "row"
"""Name of the column that contains the file name and the row number of each row."""
LINE = "line"
"""Name of the column that contains each row as JSON while Ray processes the row."""
ROWS_PER_TABLE = 1024


class RowSource(FileBasedDatasource):
    """Reads the rows of files. The `row` column contains the file name and the zero-based row number.

    Rows of CSV and Parquet files keep their columns, and CSV columns contain strings. For other files, the `line`
    column contains each row as JSON.
    """

    def __init__(self, paths: list[str], format: str):
        super().__init__(paths)
        self.format = format

    def head(self, count: int) -> list[dict[str, Any]]:
        """Returns the first `count` rows, or all rows if there are fewer. The rows are read in this process."""
        tables = itertools.chain.from_iterable(read() for read in self.get_read_tasks(1))
        return list(itertools.islice((row for table in tables for row in table.to_pylist()), count))

    def _open_input_source(self, filesystem: pyarrow.fs.FileSystem, path: str, **options: object) -> Any:
        if self.format == "parquet":
            return filesystem.open_input_file(path)
        return super()._open_input_source(filesystem, path, **options)

    def _read_stream(self, file: Any, path: str) -> Iterator[pyarrow.Table]:
        count = 0
        for table in self._tables(file):
            names = [f"{path}:{count + i}" for i in range(len(table))]
            count += len(table)
            yield table.append_column(ROW, pyarrow.array(names, pyarrow.string()))

    def _tables(self, file: Any) -> Iterator[pyarrow.Table]:
        if self.format == "parquet":
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(ROWS_PER_TABLE):
                yield pyarrow.Table.from_batches([batch])
            return
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="" if self.format == "csv" else "\n")
        if self.format == "csv":
            csv.field_size_limit(2**24)
            reader = csv.DictReader(lines)
            schema = pyarrow.schema([(name, pyarrow.string()) for name in reader.fieldnames or ()])
            while rows := list(itertools.islice(reader, ROWS_PER_TABLE)):
                if any(None in row or None in row.values() for row in rows):
                    raise InputError(f"A row of a CSV file has more or fewer cells than its header, {schema.names}.")
                yield pyarrow.Table.from_pylist(rows, schema)
            return
        while some := [line.rstrip("\r\n") for line in itertools.islice(lines, ROWS_PER_TABLE)]:
            made = [json.dumps({"text": line}) if self.format == "text" else line for line in some if line.strip()]
            yield pyarrow.table({LINE: pyarrow.array(made, pyarrow.string())})


class FileSink(BlockBasedFileDatasink):
    """Writes each block to a file in the output folder."""

    def __init__(self, path: str, format: str):
        super().__init__(path, file_format=format)
        self.format = format

    def write_block_to_file(self, block: Any, file: Any) -> None:
        """Writes a Ray Data block to an open file."""
        table = block.to_arrow()
        if self.format == "csv":
            pyarrow.csv.write_csv(table, file)
        elif self.format == "parquet":
            pyarrow.parquet.write_table(table, file)
        else:
            file.write("".join(line + "\n" for line in table[LINE].to_pylist()).encode())


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message or, if there is no message, the name of the error's type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def content_of(name: str) -> list[Any]:
    """Returns the name of a file or folder, and the paths, sizes and modification times of its files.

    A run is resumed only if all of these values are unchanged.
    """
    try:
        files, path = pyarrow.fs.FileSystem.from_uri(name)
        selected = pyarrow.fs.FileSelector(path, recursive=True)
        found = files.get_file_info(
            selected if files.get_file_info(path).type == pyarrow.fs.FileType.Directory else [path]
        )
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read {name}: {first_line(error)}") from None
    return [name, sorted([info.path, info.size, info.mtime_ns] for info in found)]


class Journal:
    """The `OUT.run.json` file, which records what a run computes and whether the run is complete.

    `OUT` stands for the path of the output folder.
    """

    def __init__(self, output: str, run: Mapping[str, Any]):
        self.run, self.checkpoint = json.loads(json.dumps(run)), f"{output}.checkpoint"
        try:
            self.files, self.output = pyarrow.fs.FileSystem.from_uri(output)
        except (ValueError, OSError) as error:
            raise InputError(f"output is {quoted(output)}: {first_line(error)}") from None
        self.path, self.complete = f"{self.output}.run.json", False
        if not self._exists(self.path):
            if self._exists(self.output):
                raise InputError(f"{output} exists, and there is no run to resume. Use another output.")
            return
        try:
            with self.files.open_input_stream(self.path) as file:
                before = json.loads(file.read())
            self.complete = before["complete"]
            different = [name for name in self.run if before["run"].get(name) != self.run[name]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{self.path} is damaged. Remove it and the output.") from None
        if different:
            raise InputError(f"{output} belongs to another run ({listed(different)} differ). Use another output.")

    def _exists(self, path: str) -> bool:
        return bool(self.files.get_file_info(path).type != pyarrow.fs.FileType.NotFound)

    def begin(self) -> None:
        """Marks the run as started."""
        self._write(False)

    def end(self) -> None:
        """Marks the run as complete and removes files that only an unfinished run needs."""
        self._write(True)
        self._delete(f"{self.output}.checkpoint")

    def abandon(self) -> None:
        """Removes all traces of a run that failed before it wrote any rows, so that a corrected call can start anew."""
        if not self._exists(self.output) or not self.files.get_file_info(pyarrow.fs.FileSelector(self.output)):
            self._delete(self.path, self.output, f"{self.output}.checkpoint")

    def _delete(self, *paths: str) -> None:
        for path in paths:
            if (kind := self.files.get_file_info(path).type) != pyarrow.fs.FileType.NotFound:
                (self.files.delete_file if kind == pyarrow.fs.FileType.File else self.files.delete_dir)(path)

    def _write(self, complete: bool) -> None:
        new = f"{self.path}.new"
        with self.files.open_output_stream(new) as file:
            file.write(json.dumps({"run": self.run, "complete": complete}, indent=1).encode())
        self.files.move(new, self.path)
