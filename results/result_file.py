"""Files of results: where they lie, what makes them, reading and writing them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from common.errors import ResultError
from common.files import write_json
from common.typed_json import plain, read_document

Document = TypeVar("Document")


@dataclass(frozen=True, kw_only=True)
class ResultFile(Generic[Document]):
    """One kind of file.

    Attributes:
        name: of the file in its directory.
        maker: the command that writes it, for remedies.
        content: dataclass of the document. A file must have its defaults of `kind`, if there is
            one, and of `schema_version`.
    """

    name: str
    maker: str
    content: type[Document]

    def path(self, place: Path) -> Path:
        """Return where the file is: in a directory, or the place itself."""
        return place / self.name if place.is_dir() else place

    def read(self, place: Path, remedy: str | None = None) -> Document:
        """Read a file.

        Args:
            place: the file, or the directory that holds it.
            remedy: the end of every error; to make it anew by default.

        Raises:
            ResultError: missing, damaged, of another kind or version, or the first key that is
                missing or holds something else.
        """
        content: Any = self.content
        kind = {"kind": content.kind} if hasattr(content, "kind") else {}
        return read_document(
            self.path(place),
            self.content,
            error=ResultError,
            remedy=remedy or f"make it anew with '{self.maker}'",
            expected=kind | {"schema_version": content.schema_version},
        )

    def write(self, directory: Path, document: Document) -> None:
        """Write a document into a directory, whole or not at all.

        Raises:
            OutputError: the system refused it.
        """
        write_json(directory / self.name, plain(document))
