"""Text sources as streams of documents: files of several kinds, folders, pipes, datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain

from common.chat import render
from common.errors import DataError
from common.text_sources.hub import dataset_rows
from common.text_sources.names import Dataset, Sources, TextFile, list_files, shown
from common.text_sources.rows import missing_column, rows_of
from common.text_sources.streams import of_known_kind

_LEAST_WORDS = 40  # of a paragraph of the sample
_FIRST_ROWS = 100  # of a file, before it is judged by how many of them have no text
_CHARACTERS_A_TOKEN = 8  # more than those of ordinary text have
_MOST_LOOKED_AT = 1 << 30  # characters


class Documents(Iterator[str]):
    """The non-empty documents of sources, in their order, read as they are asked for.

    A row whose text is null or missing is passed over and counted. A file is refused once more
    than half of its rows, of the first hundred at least or of all, are such.

    Attributes:
        files: what the sources stand for.
        source_notes: what a user should know of the sources, in lines.
    """

    def __init__(self, sources: Sources, field: str, template: str) -> None:
        """List the files; arguments and errors are those of `read_documents`."""
        self.files, self.source_notes = list_files(sources)
        self._reader = _Reader(field, template)
        # Which does not refer to this object, so that a reading that is given up ends at once.
        self._documents = _all(self._reader, self.files, sources)

    def __iter__(self) -> Iterator[str]:
        """Return the documents that are left, without a call for each."""
        return self._documents

    def __next__(self) -> str:
        """Return the next document; errors are those of `read_documents`."""
        return next(self._documents)

    @property
    def skipped(self) -> int:
        """Rows that were passed over so far."""
        return self._reader.skipped

    @property
    def row_notes(self) -> tuple[str, ...]:
        """What a user should know of the rows that were read so far, in lines."""
        if not self.skipped:
            return ()
        line = skipped_note(self.skipped, self._reader.field)
        return (f"{line}, the first is {self._reader.first_skipped}",)

    @property
    def notes(self) -> tuple[str, ...]:
        """Both."""
        return (*self.source_notes, *self.row_notes)

    def of_file(self, file: TextFile | Dataset) -> Iterator[str]:
        """Return the documents of one of the files; errors are those of `read_documents`."""
        return self._reader.of_file(file)


def _all(reader: _Reader, files: Sequence[TextFile | Dataset], sources: Sources) -> Iterator[str]:
    documents = chain.from_iterable(map(reader.of_file, files))
    first = next(documents, None)
    if first is None:
        raise _no_text(sources)
    yield first
    yield from documents


class _Reader:
    """Makes documents of rows, and counts those without text."""

    def __init__(self, field: str, template: str) -> None:
        self.skipped, self.first_skipped = 0, ""
        self.field, self._template = field, template

    def of_file(self, file: TextFile | Dataset) -> Iterator[str]:
        missing, number, plain = _Missing(self.field), 0, self._template == "none"
        rows = dataset_rows if isinstance(file, Dataset) else rows_of
        for number, (where, row) in enumerate(rows(file, self.field), 1):  # type: ignore[arg-type]
            document = row.get(self.field) if isinstance(row, dict) else None
            if not (plain and isinstance(document, str)):
                value = missing.value_of(row, where, number)
                if value is None:
                    self.first_skipped = self.first_skipped or where
                    self.skipped += 1
                    continue
                document = render(value, self._template, f"{where} field '{self.field}'")
            if not document.isascii():
                _check_characters(document, f"{where} field '{self.field}'")
            if document and not document.isspace():
                yield document
        missing.judge(number)


class _Missing:
    """The rows of a file that have no text."""

    def __init__(self, field: str) -> None:
        self._field = field
        self._count = 0
        self._first: DataError | None = None

    def value_of(self, row: object, where: str, number: int) -> str | list[object] | None:
        """Return the text or the messages of a row; None if it has none.

        Raises:
            DataError: a value of another type, or too many rows without one.
        """
        if not isinstance(row, dict):
            raise missing_column([type(row).__name__], self._field, where)
        value: object = row.get(self._field)
        if isinstance(value, str | list):
            return value
        if value is not None:
            raise DataError(
                f"{where}: no text under '{self._field}' but {type(value).__name__}",
                "mend the row, or name another field with --field",
            )
        self._count += 1
        if self._first is None:
            self._first = self._error(row, where)
        if number >= _FIRST_ROWS:
            self.judge(number)
        return None

    def judge(self, rows: int) -> None:
        """Refuse a file if most of its rows so far have no text.

        Raises:
            DataError: naming the first of them.
        """
        if self._first is not None and 2 * self._count > rows:
            like = f", like {self._count} of {rows} rows" if rows > 1 else ""
            raise DataError(self._first.problem + like, self._first.remedy)

    def _error(self, row: Mapping[str, object], where: str) -> DataError:
        if self._field in row:
            problem = f"{where}: no text under '{self._field}' but null"
            return DataError(problem, "name another field with --field")
        return missing_column(row, self._field, where)


def _check_characters(document: str, where: str) -> None:
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds half a surrogate pair", "mend the text") from error


def read_documents(sources: Sources, field: str = "text", template: str = "none") -> Documents:
    """Return the non-empty documents of one source or several, in their own order.

    Rows are read as they are asked for; only a JSON array is read as a whole.

    Args:
        sources: each a file `.txt`, `.jsonl`, `.json` (an array of objects, or an object a line),
            `.csv`, `.tsv` (names first) or `.parquet`, all but the last also compressed: `.gz`,
            `.zst`, `.bz2`, `.xz`; a folder or a pattern of such files of one kind; `-` or `-:KIND`
            for standard input; `hf:NAME[:CONFIG][:SPLIT]`.
        field: key or column that holds the text, or with a template a list of messages.
        template: chat template of `common.chat` that every document is put into.

    Raises:
        DataError: at once for names, see `common.text_sources.names.list_files`; when they are
            met, for unknown kind, wrong encoding, damage, a value that is no text or that
            `common.chat.render` refuses, mostly rows without text, or no text at all.
    """
    return Documents(sources, field, template)


def read_text(
    sources: Sources, field: str = "text", note: Callable[[str], None] = lambda line: None
) -> str:
    """Return all sources as one text.

    Plain text is as it is in its file; other documents, and files, follow each other line by line.

    Args:
        sources: see `read_documents`.
        field: likewise.
        note: takes lines about what was passed over.

    Raises:
        DataError: as `read_documents`.
    """
    documents = read_documents(sources, field)
    texts = []
    for file in map(_known, documents.files):
        separator = "" if isinstance(file, TextFile) and file.kind == ".txt" else "\n"
        texts.append(separator.join(documents.of_file(file)))
    text = "\n".join(each for each in texts if each)
    if not text:
        raise _no_text(sources)
    for line in documents.notes:
        note(line)
    return text


def look_at_documents(
    sources: Sources, field: str, template: str, tokens: int, note: Callable[[str], None]
) -> None:
    """Read about as much as a run takes, so that what is wrong with it is said before the run.

    Of a dataset, which the network brings, only the first document is read. How many rows have no
    text is for the run to say, which may read more or fewer.

    Args:
        sources: see `read_documents`.
        field: likewise.
        template: likewise.
        tokens: that the run takes.
        note: takes lines about the sources.

    Raises:
        DataError: as `read_documents`.
    """
    documents = read_documents(sources, field, template)
    wanted = min(_CHARACTERS_A_TOKEN * tokens, _MOST_LOOKED_AT)
    found = False
    for file in documents.files:
        for document in documents.of_file(file):
            found = True
            wanted -= len(document)
            if wanted <= 0 or isinstance(file, Dataset):
                break
        if wanted <= 0:
            break
    if not found:
        raise _no_text(sources)
    for line in documents.source_notes:
        note(line)


def skipped_note(count: int, field: str) -> str:
    """Say how many rows were passed over."""
    rows = "row was" if count == 1 else "rows were"
    return f"{count:,} {rows} passed over, without text under '{field}'"


def _known(file: TextFile | Dataset) -> TextFile | Dataset:
    return of_known_kind(file) if isinstance(file, TextFile) else file


def _no_text(sources: Sources) -> DataError:
    return DataError(f"{shown(sources)}: holds no text", "pass a source with at least one document")


@cache
def sample_text() -> str:
    """Return English prose that every Python has: its reference's topics (`pydoc_data.topics`)."""
    from pydoc_data.topics import topics

    paragraphs: list[str] = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            if len(paragraph.split()) >= _LEAST_WORDS:
                paragraphs.append(" ".join(paragraph.split()))
    return "\n".join(paragraphs)
